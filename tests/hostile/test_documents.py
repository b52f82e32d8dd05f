"""Untrusted run directories, with values of any type and size in any field: one message, or a table; never more."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ade_harness.cli.main import main
from ade_harness.config.compose import compose_config
from ade_harness.errors import HarnessError
from ade_harness.leaderboard.reproduce import rerun
from ade_harness.leaderboard.submission.bundle import bundle_problems
from ade_harness.runs.ledger import SCHEMA, read_rows
from tests.cli.test_cli import FAST, Call
from tests.hostile.conftest import attack
from tests.hostile.mutations import ODD, changed_document, damaged_bytes

EXIT_CODES = (0, 2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    assert main([*FAST, "dataset.images=3", f"run.dir={folder / 'run'}", "metrics.resamples=1000"]) == 0
    return folder / "run"


def command(*overrides: object) -> None:
    """Run a command of the command line; assert that it ended as documented."""
    out, err = StringIO(), StringIO()
    threads = threading.active_count()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(w) for w in overrides])
    printed = out.getvalue() + err.getvalue()
    assert code in EXIT_CODES, (overrides, printed)
    assert "Traceback" not in printed, printed
    assert "\x1b]" not in printed, "a terminal's title was set"
    assert "\x1b[2J" not in printed, "the terminal was cleared"
    assert "\u202e" not in printed, "the direction of writing was turned"
    if code:
        assert err.getvalue().count("error:") >= 1, printed
        assert len(err.getvalue()) < 5000
    assert threading.active_count() <= threads + 2


def mutated(good: Path, folder: Path, seed: int) -> Path:
    """Return a copy of a run with one of its files changed."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(good, run)
    name = ("manifest.json", "metrics.json", "config.yaml")[seed % 3]
    path = run / name
    if seed % 7 == 0:
        path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    elif name.endswith(".json"):
        path.write_text(json.dumps(changed_document(json.loads(path.read_text()), seed)), errors="surrogatepass")
    else:
        text = yaml.safe_dump(changed_document(yaml.safe_load(path.read_text()), seed), allow_unicode=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return run


def not_again(arguments: list[str], **_: Any) -> None:
    """Stand for the rerun that `reproduce` would start."""
    assert all("${" not in argument for argument in arguments)
    raise HarnessError("would be run again")


@pytest.mark.slow
@pytest.mark.parametrize("door", ["status", "report", "leaderboard", "resume", "runs", "reproduce"])
def test_run_directories(seeds: range, good: Path, tmp_path: Path, door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    seeds = seeds[:: 3 if door in ("report", "resume") else 1]  # a page takes half a second

    def one(seed: int) -> None:
        run = mutated(good, tmp_path, seed)
        if door == "resume":
            command("resume", run, "runtime.supervise=false")
        elif door == "reproduce":
            monkeypatch.setattr(rerun, "subprocess", SimpleNamespace(run=not_again))
            command("reproduce", run, "--output", tmp_path / "again")
        else:
            command(door, run, *(["--output", tmp_path / "page.html"] if door == "report" else []))

    attack(seeds, one, f"{door} of a damaged run")
    left = {path.name for path in tmp_path.iterdir()}
    assert left <= {"run", "page.html"}, left


def keys_of(document: Any, way: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the way to every key of a document that does not stand for any name."""
    found = []
    for key, value in document.items() if isinstance(document, dict) else ():
        if way[-1:] not in (("distributions",), ("packages",), ("identity",)):
            found += [(*way, key), *keys_of(value, (*way, key))]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [(n, c) for n in ("manifest.json", "metrics.json", "config.yaml") for c in ("removed", "null", "a list") if (n, c) != ("config.yaml", "null")],
)  # fmt: skip
def test_every_field_may_be_missing_or_wrong(good: Path, tmp_path: Path, name: str, change: str) -> None:
    """One after another, so that none is left to chance."""
    run = Path(shutil.copytree(good, tmp_path / "run"))
    text = (run / name).read_text()
    whole = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
    ways = keys_of(whole) if name == "manifest.json" else [way for way in keys_of(whole) if len(way) <= 2]
    for way in (
        ways if name != "config.yaml" else [w for w in ways if w[0] in ("model", "dataset", "inference", "metrics")]
    ):
        broken = json.loads(json.dumps(whole))
        place = broken
        for key in way[:-1]:
            place = place[key]
        if change == "removed":
            del place[way[-1]]
        else:
            place[way[-1]] = None if change == "null" else [[1]]
        (run / name).write_text(json.dumps(broken))
        doors: list[tuple[Any, ...]] = [("report", run, "--output", tmp_path / "page.html")]
        if name != "config.yaml":  # which the others do not read
            doors += [("status", run), ("leaderboard", run)]
        for overrides in doors:
            try:
                command(*overrides)
            except Exception as error:
                raise AssertionError(
                    f"{overrides[0]}, {'.'.join(way)} {change}: {type(error).__name__}: {error}"
                ) from error


def test_comparisons(seeds: range, good: Path, tmp_path: Path) -> None:
    attack(
        seeds[::3],
        lambda seed: command("compare", good, mutated(good, tmp_path, seed), "--output", tmp_path / "page.html"),
        "compare with a damaged run",
    )


def test_ledgers(seeds: range, good: Path, tmp_path: Path) -> None:
    (segment,) = (good / "ledger").glob("*.parquet")
    content = segment.read_bytes()

    def door(seed: int) -> None:
        path = tmp_path / f"{seed}" / "a.parquet"
        path.parent.mkdir()
        path.write_bytes(damaged_bytes(content, seed))
        rows, broken = read_rows(path.parent)
        assert len(rows) == 3 or broken

    attack(seeds, door, "ledger")


def test_submissions(seeds: range, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "submission"
    folder.mkdir()
    declaration = {
        "schema": 1, "system": "s", "contact": "a@b.c", "seeds": {"a": 0}, "command": ["model=demo"], "files": {"a": "b"},
        "code": {"commit": "0" * 40, "repository": "https://example.org/a/b"}, "results": [{"metric": "mIoU", "value": 1.0}],
        "references": [{"address": "https://example.org/w"}], "environment": {"python": "3.11", "gpus": [], "packages": {}},
    }  # fmt: skip

    def door(seed: int) -> None:
        text = yaml.safe_dump(changed_document(declaration, seed), allow_unicode=True)
        (folder / "submission.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        mutated(good, folder, seed)
        assert bundle_problems(folder)

    attack(seeds, door, "submission")


@pytest.mark.slow
def test_overrides(seeds: range) -> None:
    """Any value for any key: taken, or refused by name."""
    cfg = compose_config(["dataset=demo"])
    keys = [
        f"{group}.{name}" for group in ("model", "dataset", "inference", "runtime", "run", "metrics", "tracking")
        for name in vars(getattr(cfg, group))
    ]  # fmt: skip

    def door(seed: int) -> None:
        value = ODD[seed % len(ODD)]
        word = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
        compose_config([f"{keys[(7 * seed) % len(keys)]}={word}"])

    attack(seeds, door, "override")


def lists_of(config: Any, prefix: str = "") -> list[str]:
    """Return the keys of all lists of a configuration, or what may be one."""
    found = []
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            found += lists_of(value, f"{prefix}{name}.")
        elif "list[" in str(kind):
            found.append(f"{prefix}{name}")
    return found


@pytest.mark.slow
def test_lists_hold_what_they_say() -> None:
    keys = lists_of(compose_config(["dataset=demo"]))
    assert {"dataset.ids", "model.class_map", "inference.tta.scales", "runtime.slurm.setup"} <= set(keys)
    for key in keys:
        for element in ("[1]", "{a: 1}"):
            with pytest.raises(HarnessError, match=rf"{re.escape(key)}\[0\]: .* is a (list|dict), expected "):
                compose_config([f"{key}=[{element}]"])


MERGE_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{c}: &{c} {{<<: [{', '.join(['*' + p] * 9)}]}}\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
ALIAS_BOMB = "a: &a [x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "merge": ("config.yaml", MERGE_BOMB),
    "aliases": ("config.yaml", ALIAS_BOMB),
    "deep yaml": ("config.yaml", "[" * 5000),
    "deep json": ("manifest.json", '{"schema": 1, "a": ' + "[" * 100_000),
    "deep metrics": ("metrics.json", '{"a":' * 3000 + "1" + "}" * 3000),
    "long": ("metrics.json", " " * (2**24 + 1)),
    "object": ("config.yaml", "model: !!python/object/apply:os.system ['touch owned']"),
    "digits": ("metrics.json", '{"mIoU": ' + "9" * 5000 + "}"),
    "base 60": ("config.yaml", "model: {name: " + ":".join(["1"] * 200_000) + "}"),  # minutes in PyYAML's own reader
    "values": ("config.yaml", f"metrics: [{'1,' * 8_000_000}1]"),  # minutes
    "hexadecimal": ("config.yaml", f"metrics: {{seed: 0x{'f' * 5000}}}"),
    "resamples": ("config.yaml", "metrics: {resamples: 1000000000, seed: -1, level: 2.0}"),
    "no float": ("metrics.json", '{"intervals": {"mIoU": {"low": ' + "9" * 400 + ', "high": 1, "level": 0.95}}}'),
}  # fmt: skip


_ONE_DOOR = ("base 60", "values", "hexadecimal", "resamples", "no float")
"""All doors have one reader for each file."""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("door", "name"),
    [
        (door, name)
        for door in ("status", "report", "leaderboard", "resume", "compare")
        for name in BOMBS if name not in _ONE_DOOR or door == "report"
    ],
)  # fmt: skip
def test_bombs(good: Path, tmp_path: Path, door: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(good, run)
    file, text = BOMBS[name]
    (run / file).write_text(text)
    attack(range(1), lambda _: command(door, run, *([good] if door == "compare" else [])), f"{door}: {name}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_a_small_ledger_that_says_it_is_large_is_refused(tmp_path: Path) -> None:
    row = {"image_id": "a", "height": 1, "width": 1, "valid_pixels": 1, "ignored_pixels": 0, "label_hash": "", "content_hash": "",
           "source_hash": "",
           "seconds": 0.0, "rank": 0, "host": "", "prediction": [0], "pixels": [1], "calibration": []}  # fmt: skip
    table = pa.table({f.name: pa.array([row[f.name]] * 3, f.type) for f in SCHEMA if f.name != "ground_truth"})
    values = pa.repeat(pa.scalar(0, pa.uint8()), 180_000_000)
    lists = pa.ListArray.from_arrays(pa.array([0, 60_000_000, 120_000_000, 180_000_000], pa.int32()), values)
    table = table.append_column("ground_truth", lists).select(SCHEMA.names).cast(SCHEMA)
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    del table, values, lists

    def door(_: int) -> None:
        with pytest.raises(Exception, match="declares 180,0"):
            read_rows(tmp_path)

    attack(range(1), door, "ledger bomb")


@pytest.mark.slow
def test_a_small_ledger_of_long_texts_is_refused(tmp_path: Path) -> None:
    """The size that its metadata give is that of one text, which all rows share."""
    row = {"image_id": "a" * 100_000, "height": 1, "width": 1, "valid_pixels": 1, "ignored_pixels": 0, "label_hash": "",
           "content_hash": "", "source_hash": "", "seconds": 0.0, "rank": 0, "host": "", "ground_truth": [0],
           "prediction": [0], "pixels": [1], "calibration": []}  # fmt: skip
    table = pa.table({f.name: pa.array([row[f.name]] * 5000, f.type) for f in SCHEMA}).cast(SCHEMA)
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 200_000
    del table

    def door(_: int) -> None:
        with pytest.raises(HarnessError, match="image_id has 5,000 strings of up to 100,000 bytes. Not a ledger"):
            read_rows(tmp_path)

    attack(range(1), door, "ledger of texts")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mIoU", -5, "mIoU: expected a number from 0 to 1"), ("fwIoU", 1.5, "fwIoU: expected a number from 0 to 1"),
        ("pixels", 10**40, "pixels: expected a whole number from 0 to"), ("images", -1, "images: expected a whole number"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_damage(
    good: Path, call: Call, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps({**metrics, field: value}))
    for overrides in (("status", copy), ("report", copy)):
        done = call(*overrides)
        assert done.code == 2
        assert message in " ".join(done.err.split())


def test_texts_of_a_run_stay_in_their_lines(good: Path, call: Call, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    text = "net\nVERIFIED: official score 71.3\t\u2028x\u061c"
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "marks": [text]}))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["model"] |= {"label": text, "name": text}
    (copy / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    for overrides in (("status", copy), ("runs", copy), ("compare", copy, good, "--resamples", "100")):
        done = call(*overrides)
        assert not [line for line in (done.out + done.err).splitlines() if line.strip().startswith("VERIFIED")], (
            overrides
        )
        assert "\u2028" not in done.out
        assert "\u061c" not in done.out
