"""Finished runs are read back whole, or not at all; kept label maps are what was counted; who may be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ade_harness.errors import HarnessError
from ade_harness.leaderboard.submission.submit import run_problems
from ade_harness.metrics.calibration import sum_calibration
from ade_harness.metrics.counts import hash_rows, label_hash
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runs.label_maps import FEW, LabelMaps, read_label_map
from ade_harness.runs.matching import match_runs
from tests.cli.test_cli import FAST, Call
from tests.runs.test_runs import make_row


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of 30 demo images, with everything that can be kept."""
    from ade_harness.cli.main import main

    path = tmp_path_factory.mktemp("runs") / "demo"
    overrides = [*FAST, "dataset.images=30", f"run.dir={path}", "run.label_maps=all", "metrics.calibration=true"]
    assert main([*overrides, "metrics.resamples=1000"]) == 0
    return path


@pytest.fixture
def run(demo: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(demo, tmp_path / "demo"))


def test_a_finished_run_is_read_back(demo: Path) -> None:
    run = load_run(demo)
    assert len(run.rows) == 30
    assert run.complete
    assert run.metrics["mIoU"] > 0.5
    assert np.array_equal(run.matrix, np.load(demo / "confusion_matrix.npy"))
    assert run.ledger_hash == hash_rows(run.rows)
    interval = run.metrics["intervals"]["mIoU"]
    assert interval["low"] < run.metrics["mIoU"] < interval["high"]
    assert set(run.metrics["other_intervals"]) == {"percentile", "bca"}
    assert set(run.metrics["other_intervals"]["bca"]) == set(run.metrics["intervals"])
    calibration = sum_calibration(run.rows)
    assert calibration is not None
    assert calibration.counts[:, 0].sum() == run.matrix.sum()
    assert calibration.counts[:, 1].sum() == np.diagonal(run.matrix).sum()
    assert run.metrics["calibration_error"] == calibration.ece


def test_a_result_that_was_changed_is_marked_wherever_it_is_shown(run: Path, call: Call, tmp_path: Path) -> None:
    """What the ledger can tell is refused; the rest, such as a mark taken away, only the signature can."""
    mark = "CHANGED: manifest.json or metrics.json is not as the run has written it"
    manifest, metrics = (json.loads((run / name).read_text()) for name in ("manifest.json", "metrics.json"))
    for command in (["status", run], ["runs", run], ["report", run, "--text"]):
        assert "CHANGED" not in call(*command).out
    (run / "manifest.json").write_text(json.dumps({**manifest, "marks": []}))
    assert json.loads(call("status", run, "--json").out)["marks"] == [mark]
    assert json.loads(call("runs", run, "--json").out)["runs"][0]["marks"] == mark
    assert load_run(run).marks == (mark,)
    assert f"{mark}: evaluate again." in run_problems(load_run(run))
    (run / "manifest.json").write_text(json.dumps({**manifest, "result_signature": None}))
    assert load_run(run).marks == tuple(manifest["marks"])  # of an earlier version: nobody can tell
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "metrics.json").write_text(json.dumps({**metrics, "mIoU": 0.9}))
    assert "damaged" in json.loads(call("runs", run, "--json").out)["runs"][0]["status"]
    assert "mIoU: is 0.9, the ledger sums to" in call("status", run).err


def test_a_truncated_or_edited_ledger_is_refused(run: Path, call: Call) -> None:
    segments = sorted((run / "ledger").glob("*.parquet"))
    table = pq.read_table(segments[0])
    kept = segments[0].read_bytes()
    segments[0].write_bytes(kept[: len(kept) // 2])
    with pytest.raises(HarnessError, match=r"damaged \(1 ledger files.*resume"):
        load_run(run)
    segments[0].unlink()
    with pytest.raises(HarnessError, match=r"not what the run has written.*Files are missing"):
        load_run(run)
    pixels = table["pixels"].to_pylist()
    pixels[0][0] += 1
    edited = table.set_column(table.schema.get_field_index("pixels"), "pixels", pa.array(pixels, pa.list_(pa.int64())))
    pq.write_table(edited, segments[0])
    with pytest.raises(HarnessError, match="not what the run has written"):
        load_run(run)
    pq.write_table(table.drop_columns(["calibration"]), segments[0])
    with pytest.raises(HarnessError, match="another version"):
        load_run(run)


def test_what_is_no_finished_run_says_so(run: Path, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="holds no run"):
        load_run(tmp_path)
    (run / "metrics.json").write_text("{")
    with pytest.raises(HarnessError, match=r"metrics.json: damaged"):
        load_run(run)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "status": "incomplete"}))
    with pytest.raises(HarnessError, match=r"not finished \(incomplete\).*resume"):
        load_run(run)
    (run / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(HarnessError, match="schema 99"):
        load_run(run)


def test_kept_label_maps_are_what_was_counted(run: Path) -> None:
    finished = load_run(run)
    row = finished.rows[0]
    labels = read_label_map(run, row)
    assert labels is not None
    assert label_hash(torch.from_numpy(labels)) == row.label_hash
    path = run / "label_maps" / f"{row.image_id}.png"
    (run / "label_maps" / f"{finished.rows[1].image_id}.png").replace(path)
    with pytest.raises(HarnessError, match="not what the run has counted|damaged"):
        read_label_map(run, row)
    path.write_bytes(b"")
    with pytest.raises(HarnessError, match="damaged"):
        read_label_map(run, row)
    path.unlink()
    assert read_label_map(run, row) is None


def test_kept_label_maps_can_be_evaluated_again(demo: Path, call: Call) -> None:
    done = call(
        *FAST, "model=predictions", f"model.path={demo / 'label_maps'}", "dataset.images=30", "run.dir=again",
        "metrics.resamples=0",
    )  # fmt: skip
    assert done.code == 0, done.err
    again = load_run(Path("again"))
    assert np.array_equal(again.matrix, load_run(demo).matrix)
    assert again.metrics["intervals"] == {}


@pytest.mark.parametrize("choice", ["few", "none"])
def test_the_worst_and_best_label_maps_are_kept(tmp_path: Path, choice: str) -> None:
    rng = np.random.default_rng(0)
    values = rng.permutation(100) / 100
    maps = LabelMaps(tmp_path, choice)
    for index, value in enumerate(values):
        maps.add(f"i{index}", np.zeros((4, 4), np.uint8), lambda value=value: float(value))
    order = np.argsort(values)
    wanted = {f"i{i}" for i in (*order[:FEW], *order[-FEW:])} if choice == "few" else set()
    assert {p.stem for p in tmp_path.rglob("*.png")} == wanted


def test_runs_of_other_images_are_not_compared(demo: Path, call: Call, tmp_path: Path) -> None:
    first = load_run(demo)
    assert match_runs(first, first).remarks[0].startswith("demo: DEMO")

    def altered(**changes: object) -> FinishedRun:
        rows = tuple(make_row(0, **{**vars(r), **changes}) for r in first.rows)
        return FinishedRun(tmp_path, first.manifest, first.config, first.metrics, rows, "")

    with pytest.raises(HarnessError, match=r"not comparable: the files of ADE_val_\d+ differ"):
        match_runs(first, altered(content_hash="0" * 32))
    with pytest.raises(HarnessError, match=r"not comparable: ADE_val_\d+ is .*width x height"):
        match_runs(first, altered(height=1))
    with pytest.raises(HarnessError, match="share no images"):
        match_runs(first, altered(image_id="other"))
    with pytest.raises(HarnessError, match="ground truths differ"):
        match_runs(
            first,
            altered(ground_truth=np.array([3], np.uint8), prediction=np.array([3], np.uint8), pixels=np.array([5])),
        )
    part = FinishedRun(tmp_path, first.manifest, first.config, first.metrics, first.rows[:20], "")
    matched = match_runs(first, part)
    assert len(matched.first.ids) == 20
    assert "compared on the 20 images common to both runs" in matched.remarks[0]


def test_a_changed_protocol_has_another_name(demo: Path, tmp_path: Path) -> None:
    """Two runs by one protocol's name are not alike where a field of it was changed, of which only the run knows."""
    first = load_run(demo)
    inference = {**first.config["inference"], "tta": {**first.config["inference"]["tta"], "flip": True}}
    config, known = {**first.config, "inference": inference}, {**first.metrics, "protocol_changes": ["tta.flip"]}
    changed = FinishedRun(tmp_path, first.manifest, config, known, first.rows, "")
    assert changed.protocol == f"{first.protocol}, changed: tta.flip"
    assert f"different protocols: {first.protocol} and {changed.protocol}" in match_runs(first, changed).remarks
    older = FinishedRun(tmp_path, first.manifest, config, first.metrics, first.rows, "")  # did not write it
    remark = f"different protocols of one name, {first.protocol}: tta.flip"
    assert remark in match_runs(first, older).remarks
    assert not any("different protocols" in text for text in match_runs(first, first).remarks)


def test_confidence_is_the_softmax_at_the_labels_size(demo: Path) -> None:
    from torch.nn import functional as F

    from tests.inference.test_forward import CPU, picture, predictor

    made = predictor(
        torch.nn.Conv2d(3, 5, 3, stride=4, padding=1), "inference=original_size", "model.class_map=[0,1,2,3,4]"
    )
    made.confident = True
    from ade_harness.inference.stopwatch import Stopwatch

    image = picture(45, 64)
    prediction = made.predict([made.prepare("a", image)], CPU, Stopwatch(CPU))[0]
    pixels = torch.from_numpy(image).permute(2, 0, 1).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (made.model.mean, made.model.std))
    logits = made.model.module(((pixels - mean) / std)[None])
    scores = F.interpolate(logits, (45, 64), mode="bilinear", align_corners=False)[0].softmax(0)
    assert prediction.confidence is not None
    assert torch.allclose(prediction.confidence, scores.amax(0), atol=1e-6)
    assert torch.equal(prediction.labels, scores.argmax(0).to(torch.uint8))


def test_calibration_needs_scores(call: Call) -> None:
    done = call("model=predictions", "model.path=.", "metrics.calibration=true")
    assert done.code == 2
    assert "metrics.calibration needs a network's scores" in done.err
    assert "1,000 to 1,000,000, or 0 for no intervals" in call("metrics.resamples=10").err
    assert "metrics.level=1" in call("metrics.level=1").err
