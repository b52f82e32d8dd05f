"""Ledger, run directory and provenance."""

from __future__ import annotations

import errno
import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import replaced, write_json, write_text
from ade_harness.metrics.counts import Row, hash_rows, matrix_of, sparse_counts
from ade_harness.runs.directory import make_run_dir, new_run_name
from ade_harness.runs.exactness import check_exact, check_rows, incomplete
from ade_harness.runs.ledger import LedgerWriter, read_rows, write_ledger
from ade_harness.runs.provenance import code_state, environment
from ade_harness.runs.record import RunRecord, run_identity, start_record


def make_row(index: int, seed: int = 0, **changes: Any) -> Row:
    rng = np.random.default_rng([seed, index])
    matrix = np.zeros((150, 151), np.int64)
    matrix[rng.integers(0, 150, 30), rng.integers(0, 151, 30)] = rng.integers(1, 9999, 30)
    truth, prediction, pixels = sparse_counts(matrix)
    values = {
        "image_id": f"ADE_val_{index:08d}", "height": 512, "width": 683, "valid_pixels": int(pixels.sum()),
        "ignored_pixels": 3, "ground_truth": truth, "prediction": prediction, "pixels": pixels,
        "label_hash": f"{seed}-{index}", "content_hash": "c", "seconds": 0.5, "rank": 0, "host": "h",
    }  # fmt: skip
    return Row(**(values | changes))


def test_ledger_keeps_every_count(tmp_path: Path) -> None:
    rows = [make_row(i) for i in range(70)]
    writer = LedgerWriter(tmp_path / "ledger")
    for row in rows:
        writer.append(row)
    assert len(read_rows(tmp_path / "ledger")[0]) == 64  # the rest is not durable yet
    writer.flush()
    found, damaged = read_rows(tmp_path / "ledger")
    assert damaged == []
    assert [r.image_id for r in found] == [r.image_id for r in rows]
    assert np.array_equal(matrix_of(found, 150), matrix_of(rows, 150))
    assert found[5].pixels.tolist() == rows[5].pixels.tolist()
    frame = pd.read_parquet(tmp_path / "ledger")
    assert len(frame) == 70
    assert frame.valid_pixels.sum() == sum(r.valid_pixels for r in rows)


def test_ledgers_of_the_version_before_are_read(tmp_path: Path) -> None:
    """They have one column for the hashes of the data set's files and of the prediction's."""
    rows = [make_row(0, content_hash="a" * 32), make_row(1, content_hash="b" * 32, source_hash="c" * 32)]
    write_ledger(tmp_path / "new.parquet", rows)
    table = pq.read_table(tmp_path / "new.parquet")
    joined = pc.binary_join_element_wise(table["content_hash"], table["source_hash"], "")
    old = table.drop_columns(["source_hash"]).set_column(
        table.schema.get_field_index("content_hash"), "content_hash", joined
    )
    expected = read_rows(tmp_path)[0]
    assert [(row.content_hash, row.source_hash) for row in expected] == [("a" * 32, ""), ("b" * 32, "c" * 32)]
    (tmp_path / "new.parquet").unlink()
    pq.write_table(old.replace_schema_metadata({"ade_harness.ledger": "2"}), tmp_path / "old.parquet")
    found, damaged = read_rows(tmp_path)
    assert (damaged, hash_rows(found)) == ([], hash_rows(expected))
    assert [(row.content_hash, row.source_hash) for row in found] == [("a" * 32, ""), ("b" * 32, "c" * 32)]
    write_ledger(tmp_path / "later.parquet", [make_row(2)])  # a run that goes on
    assert len(read_rows(tmp_path)[0]) == len(pd.read_parquet(tmp_path)) == 3


def test_ledger_is_written_without_pandas(tmp_path: Path) -> None:
    """pyarrow imports it to make a column of Python's values: half a second in each rank."""
    none = np.zeros(0, np.uint8)
    given = [
        make_row(0, image_id="été 🏙", host="", calibration=np.arange(45)),
        make_row(1, ground_truth=none, prediction=none, pixels=none.astype(np.int64), valid_pixels=0),
        make_row(2, valid_pixels=2**40),
    ]
    (tmp_path / "rows").write_bytes(pickle.dumps(given))
    code = """
import pickle, sys
from pathlib import Path
from ade_harness.runs.ledger import LedgerWriter
writer = LedgerWriter(Path())
for row in pickle.loads(Path("rows").read_bytes()):
    writer.append(row)
writer.flush()
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=60)
    rows, damaged = read_rows(tmp_path)
    assert damaged == []
    assert [row.image_id for row in rows] == ["ADE_val_00000001", "ADE_val_00000002", "été 🏙"]
    assert [row.pixels.tolist() for row in rows] == [[], make_row(2).pixels.tolist(), make_row(0).pixels.tolist()]
    assert rows[1].valid_pixels == 2**40
    assert rows[2].calibration.tolist() == list(range(45))
    assert rows[2].host == ""
    [segment] = tmp_path.glob("*.parquet")
    assert pq.read_table(segment).validate(full=True) is None


def test_slow_images_become_durable_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("ade_harness.runs.ledger.time", SimpleNamespace(monotonic=lambda: now))
    writer = LedgerWriter(tmp_path)
    for index, (seconds, durable) in enumerate([(129.0, 0), (130.0, 2), (159.0, 2), (160.5, 4)]):
        now = seconds
        writer.append(make_row(index))
        assert len(read_rows(tmp_path)[0]) == durable
    assert [path.name[-15:] for path in sorted(tmp_path.iterdir())] == [f"-{n:06d}.parquet" for n in range(2)]


def test_2000_images_stay_under_10_mb(tmp_path: Path) -> None:
    writer = LedgerWriter(tmp_path)
    for i in range(2000):
        writer.append(make_row(i))
    writer.flush()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 10_000_000


def test_damaged_and_half_files_are_left_out(tmp_path: Path) -> None:
    for start in (0, 10):
        writer = LedgerWriter(tmp_path)
        for i in range(start, start + 10):
            writer.append(make_row(i))
        writer.flush()
    victim = sorted(tmp_path.glob("*.parquet"))[0]
    content = bytearray(victim.read_bytes())
    for broken in (content[: len(content) // 2], content[:60] + bytes([content[60] ^ 1]) + content[61:]):
        victim.write_bytes(bytes(broken))
        rows, damaged = read_rows(tmp_path)
        assert damaged == [victim.name]
        assert len(rows) == 10
    (tmp_path / ".half.parquet.tmp").write_bytes(b"PAR1")
    assert len(read_rows(tmp_path)[0]) == 10


def segments(folder: Path, number: int, rows: int = 1) -> list[Path]:
    """Write so many segments."""
    for first in range(0, number * rows, rows):
        writer = LedgerWriter(folder)
        for index in range(first, first + rows):
            writer.append(make_row(index))
        writer.flush()
    return sorted(folder.glob("*.parquet"))


def test_the_longest_name_that_a_file_can_have_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 251 + ".png")
    write_text(path, "x")
    assert path.read_text() == "x"
    too_long = path.with_name("a" * 300)
    with pytest.raises(HarnessError) as raised, replaced(too_long, hint="Free disk space.") as temporary:
        temporary.write_text("x")
    assert str(raised.value) == f"{too_long}: cannot be written (File name too long)."


def test_a_ledger_larger_than_any_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = segments(tmp_path, 4, rows=2)
    files = [pq.read_metadata(path) for path in paths]
    values = max(sum(f.row_group(0).column(c).num_values for c in range(f.num_columns)) for f in files)
    pixels = sum(len(make_row(i).pixels) for i in range(8))
    size = max(f.row_group(0).total_byte_size for f in files)
    for name, fits, of_a_segment in (
        ("_MAX_ROWS", 8, 1), ("_MAX_VALUES", max(pixels, values), values - 1), ("_MAX_BYTES", size, size - 1),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(f"ade_harness.runs.ledger.{name}", fits)
            assert len(read_rows(tmp_path)[0]) == 8
            patch.setattr(f"ade_harness.runs.ledger.{name}", of_a_segment)
            with pytest.raises(HarnessError, match="declares .* values, more than any ledger can hold"):
                read_rows(tmp_path)
    assert pixels > values  # so that it is the sum over segments that is too large
    for name, too_few in (("_MAX_ROWS", 7), ("_MAX_VALUES", pixels - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(f"ade_harness.runs.ledger.{name}", too_few)
            with pytest.raises(HarnessError, match="holds more images or counts than any data set has"):
                read_rows(tmp_path)


@pytest.mark.slow
def test_pages_carry_checksums(tmp_path: Path) -> None:
    """A changed byte within a page is damage, even where it unpacks to other numbers."""
    [path] = segments(tmp_path, 1, rows=30)
    rows, data = [str(row) for row in read_rows(tmp_path)[0]], path.read_bytes()
    chunk = pq.read_metadata(path).row_group(0).column(7)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    noticed = 0
    for place in range(begin, begin + chunk.total_compressed_size):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        found, damaged = read_rows(tmp_path)
        noticed += bool(damaged)
        assert damaged or [str(row) for row in found] == rows, place
    assert noticed > chunk.total_compressed_size / 2


def test_the_same_image_twice_must_agree(tmp_path: Path) -> None:
    for seed in (0, 0, 1):
        writer = LedgerWriter(tmp_path)
        writer.append(make_row(1, seed))
        writer.flush()
        if seed == 0:
            assert len(read_rows(tmp_path)[0]) == 1
    with pytest.raises(HarnessError, match="recorded twice with different results"):
        read_rows(tmp_path)


def test_a_full_disk_loses_nothing_that_was_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = LedgerWriter(tmp_path / "run" / "ledger", flush_every=1)
    writer.append(make_row(0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ade_harness.files.atomic.os.fsync", full)
    with pytest.raises(HarnessError, match=r"No space left on device.*run\.dir="):
        writer.append(make_row(1))
    monkeypatch.undo()
    assert [r.image_id for r in read_rows(tmp_path / "run" / "ledger")[0]] == ["ADE_val_00000000"]
    assert len(list((tmp_path / "run" / "ledger").iterdir())) == 1  # no half file


# invariant 1: each way to break it


def test_exactness_check_names_what_is_wrong() -> None:
    rows = [make_row(i) for i in range(5)]
    ids = [r.image_id for r in rows]
    total = matrix_of(rows, 150)
    check_exact(rows, total, ids)
    with pytest.raises(HarnessError, match="lacks 1 images .ADE_val_00000004"):
        check_exact(rows[:4], matrix_of(rows[:4], 150), ids)
    with pytest.raises(HarnessError, match="has unknown 1 images .ADE_val_00000004"):
        check_exact(rows, total, ids[:4])
    twice = total + matrix_of(rows[:1], 150)
    with pytest.raises(HarnessError, match=f"differ by {rows[0].valid_pixels} pixels: no score"):
        check_exact(rows, twice, ids)


def test_a_run_without_a_score_shows_five_reasons() -> None:
    failures = {f"ADE_val_{i:08d}": f"reason {i}" for i in range(7)}
    failures["ADE_val_00000009"] = "ADE_val_00000009: names itself"
    lines = incomplete(failures, 3, 11, Path("run")).splitlines()
    assert lines[:5] == [f"ADE_val_{i:08d}: reason {i}" for i in range(5)]
    assert lines[5] == "... and 3 more"
    assert lines[6].startswith("No score: 3 of 11 images are counted.")
    one = incomplete({"ADE_val_00000009": "ADE_val_00000009: names itself"}, 3, 11, Path("run")).splitlines()
    assert one[0] == "ADE_val_00000009: names itself"
    assert len(one) == 2
    five = incomplete({f"i{i}": f"reason {i}" for i in range(5)}, 3, 11, Path("run")).splitlines()
    assert len(five) == 6


def test_rows_are_checked_against_themselves_and_the_files() -> None:
    good = make_row(0)
    whole = replace(good, height=1, width=good.valid_pixels + 3)
    check_rows([whole], {whole.image_id: (1, whole.width)})
    with pytest.raises(HarnessError, match=r"ADE_val_00000000: the ledger has it as .*, the file is 5x5: no score"):
        check_rows([whole], {whole.image_id: (5, 5)})
    for broken in (
        replace(whole, valid_pixels=1),
        replace(whole, ignored_pixels=2),
        replace(whole, pixels=whole.pixels + 1),
    ):
        with pytest.raises(HarnessError, match=r"ADE_val_00000000: \d+ pixels are counted"):
            check_rows([broken], {})


# run directories


def test_two_runs_of_one_second_have_different_names(tmp_path: Path) -> None:
    now = datetime(2026, 1, 2, 3, 4, 5)
    names = {new_run_name("hf/model x", now) for _ in range(50)}
    assert len(names) == 50
    assert all(n.startswith("20260102-030405_hf-model-x_") for n in names)
    assert make_run_dir(None, str(tmp_path), "m") != make_run_dir(None, str(tmp_path), "m")


def record(path: Path, **changes: Any) -> RunRecord:
    """Start a record of a run of a synthetic model."""
    run = {"dir": str(path), "root": "runs", "allow_changed": changes.pop("allow_changed", False)}
    config = {
        "model": {"name": "m", "a": changes.pop("a", 1)}, "dataset": {}, "inference": {}, "metrics": {"calibration": False},
        "runtime": {"seed": 0, "threads": 1, "deterministic": True}, "run": run,
    }  # fmt: skip
    facts = {"device": "cpu", "model": {"sha256": changes.pop("sha256", "1")}, "dataset": {"ids_hash": "2"}}
    return start_record(config, facts, ["PARTIAL"], {})


def test_run_dir_is_continued_only_by_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = record(path)
    first.lock.release()
    again = record(path)
    again.lock.release()
    assert [e["started"] for e in again.manifest["earlier"]] == [first.manifest["started"]]
    with pytest.raises(HarnessError, match=r"Different: checkpoint.sha256: was \"1\", is \"3\"; model.a: was 1, is 2"):
        record(path, a=2, sha256="3")
    assert json.loads((path / "manifest.json").read_text()) == again.manifest  # untouched
    mixed = record(path, a=2, allow_changed=True)
    mixed.lock.release()
    assert mixed.manifest["changes"] == ["model.a: was 1, is 2"]
    assert mixed.manifest["marks"] == ["PARTIAL", "MIXED: continued with changed settings: model.a"]
    later = record(path, a=2)  # nothing has changed since, but the counts are still mixed
    later.lock.release()
    assert later.manifest["marks"] == mixed.manifest["marks"]
    assert later.manifest["earlier"][1]["identity"]["model.a"] == 1  # what the first part was made with
    (path / "manifest.json").write_text("{")
    with pytest.raises(HarnessError, match="damaged"):
        record(path)


def test_the_configuration_stands_once_and_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = record(path)
    first.lock.release()
    assert not any(key.startswith(("model.", "runtime.")) for key in first.manifest["identity"])
    assert run_identity(path, first.manifest)["model.a"] == 1
    config = path / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("a: 1", "a: 2"))
    for a in (1, 2):  # neither the old nor the new value hides that somebody wrote into it
        with pytest.raises(HarnessError, match=r"config\.yaml: was changed since the run wrote it"):
            record(path, a=a)
    config.write_text("# a comment\n" + whole)
    record(path).lock.release()
    config.unlink()  # as after a kill between the two files at the very start
    record(path).lock.release()
    assert config.read_text() == whole


def test_a_kill_between_manifest_and_configuration_of_a_later_session(tmp_path: Path) -> None:
    path = tmp_path / "run"
    record(path).lock.release()
    old = (path / "config.yaml").read_text()
    record(path, allow_changed=True).lock.release()  # another text, the same numbers
    assert (path / "config.yaml").read_text() != old
    (path / "config.yaml").write_text(old)
    record(path).lock.release()


def test_runs_of_older_versions_are_continued(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = record(path)
    first.lock.release()
    manifest = {k: v for k, v in first.manifest.items() if k != "config_sha256"}
    manifest["identity"] = run_identity(path, first.manifest)  # as they had it: the configuration too
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HarnessError, match=r"model\.a: was 1, is 2"):
        record(path, a=2)
    again = record(path)
    again.lock.release()
    assert "config_sha256" in again.manifest


def test_a_run_of_another_version_is_refused(tmp_path: Path) -> None:
    record(tmp_path / "run").lock.release()
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"schema": 99}))
    with pytest.raises(HarnessError, match="another version of this package .schema 99, this one reads 1"):
        record(tmp_path / "run")


def test_a_run_killed_before_its_manifest_starts_again(tmp_path: Path) -> None:
    (tmp_path / ".writable-1").touch()
    (tmp_path / ".manifest.json.tmp").write_text("{")
    (tmp_path / "logs").mkdir()
    assert make_run_dir(str(tmp_path), "runs", "m") == tmp_path
    record(tmp_path)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(HarnessError, match="not empty and is not a run directory. Nothing was changed"):
        make_run_dir(str(tmp_path), "runs", "m")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(HarnessError, match="cannot be written .Not a directory"):
        make_run_dir(str(tmp_path / "file" / "run"), "runs", "m")


def test_json_takes_what_json_cannot_hold(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [float("inf"), 1.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": ["inf", 1.5, None]}


def test_json_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"x": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ade_harness.files.atomic.os.fsync", full)
    with pytest.raises(HarnessError, match=r"a\.json: cannot be written .No space left"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


# provenance


def git(folder: Path, *overrides: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *overrides]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_code_state_in_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "src" / "ade_harness"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/a.yaml").write_text("a: 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    git(tmp_path, "remote", "add", "origin", "https://me:secret@example.org/a/b.git")
    state = code_state(package)
    assert state["commit"] == git(tmp_path, "rev-parse", "HEAD")
    assert state["dirty"] is False
    assert state["origin"] == "https://example.org/a/b.git"
    tree, source = state["tree"], state["src"]
    (tmp_path / "README.md").write_text("prose\n")
    git(tmp_path, "add", "README.md")
    assert code_state(package)["dirty"] is True
    assert code_state(package)["diff_sha256"] is None  # prose decides no number
    git(tmp_path, "commit", "-qm", "second")
    assert code_state(package)["tree"] == tree
    (tmp_path / "conf/a.yaml").write_text("a: 1\npaper: another\n")
    git(tmp_path, "commit", "-qam", "third")
    assert code_state(package)["tree"] != tree
    assert code_state(package)["src"] == source  # the values that a run used stand in its configuration
    (tmp_path / "conf/a.yaml").write_text("a: 1\npaper: a third\n")
    assert code_state(package)["src"] == source
    (tmp_path / "conf/.#lock.yaml").symlink_to("nowhere")  # an editor's
    (tmp_path / "conf/größe.yaml").write_text("a: 1\n")
    (package / "latin.py").write_bytes("# gr\xf6\xdfe\n".encode("latin-1"))
    assert "größe.yaml" in code_state(package)["diff"]
    assert code_state(package)["src"] != source
    source = code_state(package)["src"]
    (package / "a.py").write_text("x = 2\n")
    assert code_state(package)["src"] != source
    (package / "new.py").write_text("y = 3\n")
    state = code_state(package)
    assert state["dirty"] is True
    assert "+x = 2" in state["diff"]
    assert "y = 3" in state["diff"]
    assert len(state["diff_sha256"]) == 64


def test_code_state_of_an_installed_package_is_not_the_users_repository(tmp_path: Path) -> None:
    package = tmp_path / ".venv/lib/site-packages/ade_harness"
    package.mkdir(parents=True)
    git(tmp_path, "init", "-q")
    assert code_state(package)["commit"] is None


def test_environment_names_what_matters() -> None:
    facts = environment()
    assert {"torch", "lightning", "numpy", "transformers"} <= facts["packages"].keys()
    assert facts["cpu_cores"] >= 1
    json.dumps(facts)


def test_six_failures_of_five_reasons_are_all_shown() -> None:
    failures = {f"i{i}": f"reason {min(i, 4)}" for i in range(6)}
    assert "more" not in "".join(incomplete(failures, 3, 11, Path("run")).splitlines()[:-1])


def test_rows_of_negative_numbers_are_damage(tmp_path: Path) -> None:
    good = make_row(0)
    for broken in (replace(good, height=-1), replace(good, width=-1), replace(good, pixels=-good.pixels)):
        for path in tmp_path.glob("*.parquet"):
            path.unlink()
        writer = LedgerWriter(tmp_path)
        writer.append(broken)
        writer.flush()
        rows, damaged = read_rows(tmp_path)
        assert rows == []
        assert len(damaged) == 1


@pytest.mark.parametrize(("number", "more"), [(10, ""), (11, ", ...")])
def test_ten_images_that_are_missing_are_listed(number: int, more: str) -> None:
    ids = [f"i{n:02}" for n in range(number)]
    listed = re.escape(f"The ledger lacks {number} images ({', '.join(ids[:10])}{more}): no score.")
    with pytest.raises(HarnessError, match=listed):
        check_exact([], np.zeros((2, 3), np.int64), ids)
