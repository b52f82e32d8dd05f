"""Continue, refuse, skip, and the end checks: in one process, on small data."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from ade_harness.cli.main import main
from ade_harness.evaluation.recorder import Recorder
from ade_harness.runs.ledger import LedgerWriter
from tests.conftest import Done

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

Call = Callable[..., Done]
FAST = ("tracking=none", "run.overlays=0", "runtime.workers=0")


@pytest.fixture
def overrides(tiny_ade: Path, tmp_path: Path) -> list[str]:
    """Predictions that are the truth, on seven images."""
    labels = tmp_path / "labels"
    shutil.copytree(tiny_ade / "annotations/validation", labels)
    return ["model=predictions", f"model.path={labels}", "dataset=ade20k", f"dataset.root={tiny_ade}", *FAST]


def lose_some(run: Path) -> None:
    """Forget what a run has counted, as if it had been killed early."""
    for path in (run / "ledger").iterdir():
        path.unlink()
    (run / "metrics.json").unlink()


def hashes(run: Path) -> list[str]:
    return pd.read_parquet(run / "ledger").sort_values("image_id").label_hash.tolist()


def test_resume_does_what_is_missing_and_needs_no_other_words(call: Call, overrides: list[str], tmp_path: Path) -> None:
    assert call(*overrides, "run.dir=run").code == 0
    expected = hashes(tmp_path / "run")
    metrics = (tmp_path / "run/metrics.json").read_bytes()
    lose_some(tmp_path / "run")
    done = call("resume", "run")
    assert done.code == 0, done.err
    assert hashes(tmp_path / "run") == expected
    assert (tmp_path / "run/metrics.json").read_bytes() == metrics
    timings = json.loads((tmp_path / "run/manifest.json").read_text())["timings"]
    begin = time.monotonic()
    again = call("resume", "run", "runtime.sharding=plan")  # its older name; finished: the same result, at once
    assert "all images were already evaluated" in again.out
    assert json.loads((tmp_path / "run/manifest.json").read_text())["timings"] == timings  # it did nothing
    assert again.code == 0
    assert "continuing: 7 images are done" in again.out
    assert (tmp_path / "run/metrics.json").read_bytes() == metrics
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("there", ["kept", "gone"])
def test_relative_paths_belong_to_where_the_run_was_started(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], there: str
) -> None:
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    start.mkdir()
    elsewhere.mkdir()
    for name in ("labels", "ADEChallengeData2016"):
        shutil.move(tmp_path / name, start / name)
    relative = [word.replace(f"{tmp_path}/", "") for word in overrides]
    monkeypatch.chdir(start)
    assert main([*relative, "run.dir=run"]) == 0
    expected = hashes(start / "run")
    lose_some(start / "run")
    monkeypatch.chdir(elsewhere)
    shutil.move(start / "run", elsewhere / "moved")
    if there == "gone":
        start.rename(tmp_path / "start of another machine")
        shutil.move(tmp_path / "start of another machine/labels", elsewhere)
    capfd.readouterr()
    code = main(["resume", "moved"])
    err = capfd.readouterr().err
    assert Path.cwd() == elsewhere
    if there == "kept":
        assert code == 0, err
        assert f"relative paths of this run belong to {start}" in err
        assert hashes(elsewhere / "moved") == expected
    else:
        assert code == 2
        assert f"was started in {start}, which is not here: its relative paths are taken from {elsewhere}." in err
        assert "ADEChallengeData2016" in err.splitlines()[-1]


def test_resume_takes_options_of_this_session_and_refuses_unknown_ones(call: Call, overrides: list[str]) -> None:
    assert call(*overrides, "run.dir=run").code == 0
    done = call("resume", "run", "runtime.devcies=2")
    assert done.code == 2
    assert "'runtime.devices'" in done.err
    assert call("resume", "run", "tracking=none", "runtime.timeout_min=1").code == 0


def test_a_data_set_that_was_moved_refuses_no_resume(
    call: Call, overrides: list[str], tiny_ade: Path, tmp_path: Path
) -> None:
    """Where files lie decides no number: ids and the files of counted images are compared by their hashes."""
    assert call(*overrides, "run.dir=run").code == 0
    expected = hashes(tmp_path / "run")
    lose_some(tmp_path / "run")
    moved = tiny_ade.rename(tmp_path / "elsewhere")
    done = call("resume", "run", f"dataset.root={moved}")
    assert done.code == 0, done.err
    assert hashes(tmp_path / "run") == expected
    assert "MIXED" not in done.out
    assert "changes" not in json.loads((tmp_path / "run/manifest.json").read_text())


def test_a_changed_label_paper_or_note_refuses_no_resume(call: Call, overrides: list[str], tmp_path: Path) -> None:
    assert call(*overrides, "run.dir=run").code == 0
    before = json.loads((tmp_path / "run/metrics.json").read_text())["mIoU"]
    lose_some(tmp_path / "run")
    prose = ("model.label='Another, name'", "model.about.paper=https://example.org/2 (v2)", "model.published.source=a note",
             "inference.source=elsewhere", "tracking.tags=[other]")  # fmt: skip
    done = call("resume", "run", *prose)
    assert done.code == 0, done.err
    assert "MIXED" not in done.out
    assert json.loads((tmp_path / "run/metrics.json").read_text())["mIoU"] == before
    assert "changes" not in json.loads((tmp_path / "run/manifest.json").read_text())


def test_resume_refuses_what_changed_and_shows_it(call: Call, overrides: list[str], tmp_path: Path) -> None:
    assert call(*overrides, "run.dir=run").code == 0
    lose_some(tmp_path / "run")
    done = call("resume", "run", "inference.exif=false")
    assert done.code == 2
    assert "inference.exif: was true, is false" in done.err
    assert "allow_changed" not in done.err  # no advice that makes a score meaningless
    mixed = call("resume", "run", "inference.exif=false", "run.allow_changed=true")
    assert mixed.code == 0, mixed.err
    assert "MIXED: continued with changed settings: inference.exif" in mixed.out
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["changes"] == ["inference.exif: was true, is false"]
    for name in ("metrics.json", "per_class.csv", "config.yaml"):
        assert "MIXED" in (tmp_path / "run" / name).read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["resume"], "resume: the following arguments are required: RUN. "),
        (["resume", "--nope"], "resume: unrecognized arguments: --nope. "),
        (["status", "--jsn"], "status: unrecognized arguments: --jsn. Did you mean '--json'?"),
        (["resume", "nowhere"], "nowhere: no such folder"),
        (["resume", "a", "b"], "'b': expected key=value"),
        (["status"], "status: the following arguments are required: RUN"),
        (["status", "nowhere"], "nowhere: no such folder"),
        (["runtime.sharding=random"], "runtime.sharding=random: unknown value, expected one of queue, static"),
        (["runtime.max_restarts=-1"], "runtime.max_restarts=-1: expected 0 to 1,000"),
        (["runtime.dead_after_s=1"], "runtime.dead_after_s=1: expected 5 to 86,400 seconds"),
        (["runtime.num_nodes=0"], "runtime.num_nodes=0: expected 1 to 10,000 nodes, or auto"),
        (["runtime.supervise=false", "runtime.max_restarts=1"], "runtime.max_restarts needs runtime.supervise=true"),
        (["dataset.ids=ONE"], "dataset.ids=ONE: expected a list: dataset.ids=[ONE]."),
        (["tracking.tags=mine"], "tracking.tags=mine: expected a list: tracking.tags=[mine]."),
        (["run.on_error=maybe"], "run.on_error=maybe: unknown value, expected one of fail, skip"),
        (
            ["-m", "hydra/launcher=joblib"],
            "hydra/launcher=joblib: unknown value. Known: basic, list, one_job, process, slurm",
        ),
        (["-m", "--job", "5", "dataset.limit=1,2"], "--job 5: expected 0 to 1, as this sweep has 2 combinations"),
        (["--job", "1"], "add -m"),
    ],
)
def test_mistakes(call: Call, given: list[str], message: str) -> None:
    done = call(*given)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err + done.out


def test_nodes_must_say_which_one_they_are(cli: Call) -> None:
    done = cli("runtime.num_nodes=2", *FAST)
    assert done.code == 2
    assert "NODE_RANK, MASTER_ADDR, MASTER_PORT not set" in done.err
    done = cli("runtime.num_nodes=2", *FAST, NODE_RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    assert "NODE_RANK=2, MASTER_PORT=29500: expected a rank below 2" in done.err


def test_the_slurm_launcher_without_slurm(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = call("-m", "hydra/launcher=slurm", "dataset.limit=1,2")
    assert done.code == 2
    assert "sbatch is not on this machine" in done.err


def test_combinations_are_listed(call: Call) -> None:
    done = call("-m", "--list", "inference=fit_input,original_size", "dataset.limit=1,2")
    assert done.out.splitlines()[2] == "2: inference=original_size dataset.limit=1"


def test_a_config_yaml_that_was_edited_is_one_message(call: Call, overrides: list[str], tmp_path: Path) -> None:
    assert call(*overrides, "run.dir=run").code == 0
    config = tmp_path / "run/config.yaml"
    text = config.read_text()
    for broken in ("model: [", text.replace("exif:", "exifs:"), text.replace("seed: 0", "seed: many")):
        config.write_text(broken)
        done = call("resume", "run")
        assert done.code == 2
        assert re.search(r"error: (run/)?config\.yaml(: damaged: | is damaged, or of another version)", done.err), (
            done.err
        )


# images that fail


def damage(tiny_ade: Path, number: int) -> bytes:
    victim = tiny_ade / f"images/validation/ADE_val_0000100{number}.jpg"
    content = victim.read_bytes()
    victim.write_bytes(content[:-300])
    return content


def test_a_failing_image_is_reported_with_all_others_counted(
    call: Call, overrides: list[str], tiny_ade: Path, tmp_path: Path
) -> None:
    for number in (1, 4):
        damage(tiny_ade, number)
    done = call(*overrides, "run.dir=run")
    assert done.code == 2
    assert re.findall(r"ADE_val_\d+(?=\.jpg: this image cannot)", done.err) == ["ADE_val_00001001", "ADE_val_00001004"]
    assert "No score: 5 of 7 images are counted." in done.err
    assert not (tmp_path / "run/metrics.json").exists()
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["status"] == "incomplete"
    assert sorted(manifest["failures"]) == ["ADE_val_00001001", "ADE_val_00001004"]
    shown = call("status", "run").out
    reported = json.loads(call("status", "run", "--json").out)
    assert (reported["mIoU"], list(reported["failures"])) == (None, list(manifest["failures"]))
    assert "incomplete" in shown
    assert "ADE_val_00001004" in shown


@pytest.mark.parametrize("images", [1, 3])
def test_skip_leaves_failing_images_out_and_says_so(
    call: Call, overrides: list[str], tiny_ade: Path, tmp_path: Path, images: int
) -> None:
    content = damage(tiny_ade, 2)
    done = call(*overrides, "run.dir=run", "run.on_error=skip", f"inference.images={images}")
    assert done.code == 0, done.err
    mark = "PARTIAL: 6 of 2,000 images, 1 failed and were skipped"
    assert mark in done.out
    for name in ("metrics.json", "per_class.csv", "manifest.json"):
        assert mark in (tmp_path / "run" / name).read_text()
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert (metrics["images"], metrics["complete"], metrics["mIoU"]) == (6, False, 1.0)
    assert list(json.loads((tmp_path / "run/manifest.json").read_text())["failures"]) == ["ADE_val_00001002"]
    (tiny_ade / "images/validation/ADE_val_00001002.jpg").write_bytes(content)  # fixed: only that one is done
    done = call("resume", "run")
    assert "continuing: 6 images are done" in done.out
    assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == 7
    assert "skipped" not in done.out


def test_skip_also_where_the_header_is_damaged(
    call: Call, overrides: list[str], tiny_ade: Path, tmp_path: Path
) -> None:
    (tiny_ade / "images/validation/ADE_val_00001002.jpg").write_bytes(b"no image")
    assert call(*overrides, "run.dir=run").code == 2
    done = call(*overrides, "run.dir=skipped", "run.on_error=skip")
    assert done.code == 0, done.err
    assert "PARTIAL: 6 of 2,000 images, 1 failed and were skipped" in done.out


def test_nothing_but_failures_is_no_score(call: Call, overrides: list[str], tiny_ade: Path) -> None:
    for number in range(7):
        damage(tiny_ade, number)
    done = call(*overrides, "run.on_error=skip")
    assert done.code == 2
    assert "No score: 0 of 7 images are counted" in done.err


# end checks of invariant 1: each is broken on purpose


def broken(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    record = Recorder.record

    def wrong(self: Recorder, *arguments: Any) -> None:
        change(self, lambda: record(self, *arguments))

    monkeypatch.setattr(Recorder, "record", wrong)


def test_an_image_that_is_not_counted_is_noticed(
    call: Call, overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def forget_one(_: Recorder, record: Callable[[], None]) -> None:
        seen.append(1)
        if len(seen) != 3:
            record()

    broken(monkeypatch, forget_one)
    done = call(*overrides, "run.dir=run")
    assert done.code == 2
    assert re.search(r"The ledger lacks 1 images \(ADE_val_0000100\d\): no score", done.err), done.err
    assert not (tmp_path / "run/metrics.json").exists()


def test_an_image_that_is_counted_twice_is_noticed(
    call: Call, overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def twice(_: Recorder, record: Callable[[], None]) -> None:
        record()
        seen.append(1)
        if len(seen) == 2:
            record()

    broken(monkeypatch, twice)
    done = call(*overrides, "run.dir=run")
    assert done.code == 2
    assert re.search(r"The ranks' sum and the ledger differ by \d+ pixels: no score", done.err), done.err
    assert not (tmp_path / "run/metrics.json").exists()


def test_a_matrix_that_lost_a_pixel_is_noticed(
    call: Call, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(self: Recorder, record: Callable[[], None]) -> None:
        record()
        self.matrix[tuple(np.argwhere(self.matrix)[0])] -= 1

    broken(monkeypatch, lose)
    done = call(*overrides)
    assert "The ranks' sum and the ledger differ by 7 pixels: no score" in done.err


def test_a_row_that_lost_pixels_is_noticed(call: Call, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    append = LedgerWriter.append

    def short(self: LedgerWriter, row: Any) -> None:
        append(self, type(row)(**{**vars(row), "ignored_pixels": row.ignored_pixels + 1}))

    monkeypatch.setattr(LedgerWriter, "append", short)
    done = call(*overrides)
    assert done.code == 2
    assert re.search(
        r"ADE_val_00001000: \d+ pixels are counted, \d+ are valid and \d+ ignored, of 960: no score", done.err
    )


# where runs are written


def test_a_file_system_that_cannot_be_written(call: Call, overrides: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    elif subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=False, capture_output=True
    ).returncode:
        (folder / "run").write_text("in the way")  # no right to mount: another reason why it cannot be written
    try:
        done = call(*overrides, f"run.dir={folder}/run")
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", folder], check=False, capture_output=True)
    assert done.code == 2
    assert "the run directory cannot be written" in done.err


def test_no_space_left_keeps_what_was_counted(
    call: Call, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        if "ledger" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            calls.append(1)
            if len(calls) > 3:
                raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("ade_harness.runs.ledger._FLUSH_EVERY_S", 0.0)
    monkeypatch.setattr(os, "fsync", full)
    done = call(*overrides, "run.dir=run")
    monkeypatch.undo()
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    kept = len(hashes(tmp_path / "run"))
    assert 0 < kept < 7
    monkeypatch.chdir(tmp_path)
    done = call("resume", "run")
    assert done.code == 0, done.err
    assert f"continuing: {kept} images are done" in done.out


def test_a_file_system_that_becomes_read_only_is_one_message(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As kernels do with a disk that fails; what was counted before is kept."""
    place = tmp_path / "place"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "none", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs a user who may mount a file system (root)")
    (tmp_path / "remounting.py").write_text(
        "import os, subprocess, time, torch\n\nseen = 0\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        global seen\n        seen += 1\n        if seen == 3 and 'TO_REMOUNT' in os.environ:\n"
        "            while subprocess.run(['mount', '-o', 'remount,ro', os.environ['TO_REMOUNT']]).returncode:\n"
        "                time.sleep(0.02)  # a file may be open for writing just now\n"
        "        return torch.zeros(len(x), 150, 4, 4)\n"
    )
    overrides = ("model=custom", "model._target_=remounting.Net", "dataset.images=6", *FAST, f"run.dir={place / 'run'}")
    try:
        monkeypatch.setenv("TO_REMOUNT", str(place))
        done = call(*overrides)
        assert done.code == 2
        assert "cannot be written (Read-only file system)" in done.err
        assert "Traceback" not in done.err
        assert not (place / "run/metrics.json").exists()
        monkeypatch.delenv("TO_REMOUNT")
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        done = call("resume", place / "run")
        assert done.code == 0, done.err
        assert json.loads((place / "run/metrics.json").read_text())["images"] == 6
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("name", ["commit", "tree"])
def test_a_run_of_a_version_that_looked_at_the_commit_goes_on(call: Call, tmp_path: Path, name: str) -> None:
    """Or at the tree of src/ and conf/. Now src/ is looked at: a commit of prose alone refuses nothing."""
    overrides = (*FAST, "dataset.images=2", "runtime.workers=0", "metrics.resamples=0", "run.dir=run")
    assert call(*overrides).code == 0
    path = tmp_path / "run/manifest.json"
    manifest = json.loads(path.read_text())
    if "code.src" not in manifest["identity"]:
        pytest.skip("needs a git checkout: git clone this repository")
    del manifest["identity"]["code.src"]
    manifest["identity"]["code.diff_sha256"] = manifest["code"]["diff_sha256"]
    for found, code in ((manifest["code"][name], 0), ("f" * 40, 2)):
        manifest["identity"][f"code.{name}"] = found
        path.write_text(json.dumps(manifest))
        done = call(*overrides)
        assert done.code == code
        assert (f'code.{name}: was "ffff' in done.err) == (code == 2)


def test_a_manifest_and_a_configuration_of_two_kinds_are_damaged(call: Callable[..., Done], tmp_path: Path) -> None:
    assert call(*FAST, "metrics.resamples=0", "dataset.images=1", "run.dir=run").code == 0
    path = tmp_path / "run/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "kind": "probe"}))
    done = call("resume", "run")
    assert done.code == 2
    assert "run: is damaged: its manifest.json says a probe, its config.yaml the other." in done.err
