"""`load_model`, `load_run`, `compare` and `runs`."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import ade_harness as ade
from ade_harness.errors import HarnessError
from ade_harness.runs.lock import RunLock
from tests.conftest import Done

SMALL = {"dataset.images": 5, "metrics.resamples": 1000}


@pytest.fixture(scope="module")
def segmenter() -> ade.Segmenter:
    return ade.load_model("demo")


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (60, 90, 3)).astype(np.uint8)


def test_a_system_is_a_function_of_an_image(segmenter: ade.Segmenter, picture: np.ndarray, tmp_path: Path) -> None:
    labels = segmenter(picture)
    assert labels.dtype == np.uint8
    assert labels.shape == (60, 90)
    assert labels.max() < len(segmenter.classes) == 150
    path = tmp_path / "street.png"
    Image.fromarray(picture).save(path)
    for same in (Image.fromarray(picture), path, str(path), Image.fromarray(picture).convert("RGBA")):
        assert np.array_equal(segmenter(same), labels)
    grey = picture[..., 0]
    assert np.array_equal(segmenter(grey), segmenter(Image.fromarray(grey)))
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(found, labels) for found in pool.map(segmenter, [picture] * 8))
    shown = segmenter.show(picture)
    assert shown.size[0] > 2 * 90
    assert shown.getpixel((5, shown.size[1] - 30)) != (0, 0, 0)
    assert repr(segmenter) == "<Segmenter demo network, inference=original_size, on cpu>"


def test_labels_are_those_of_the_evaluation(segmenter: ade.Segmenter) -> None:
    result = ade.evaluate(segmenter.__call__, dataset="demo", options=SMALL)
    assert [r.label_hash for r in result.rows] == [
        r.label_hash for r in ade.evaluate("demo", dataset="demo", options=SMALL).rows
    ]


def test_a_segmenter_travels_to_other_processes(segmenter: ade.Segmenter) -> None:
    image = np.full((40, 50, 3), 99, np.uint8)
    labels = segmenter(image)  # by now it has chosen its kernels
    assert np.array_equal(pickle.loads(pickle.dumps(segmenter))(image), labels)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), r"is float32 \[4, 4, 3\], expected uint8"),
        (np.zeros((4, 4, 4), np.uint8), "expected uint8"),
        (np.zeros((0, 4, 3), np.uint8), "expected uint8"),
        ([1, 2], "the image is a list, expected a PIL image, a uint8 array, or a path"),
        ("nowhere.jpg", r"nowhere.jpg"),
    ],
    ids=["float", "four channels", "empty", "list", "path"],
)
def test_what_is_no_image(segmenter: ade.Segmenter, image: Any, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        segmenter(image)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eomt_x", {}, "no such system"),
        ("predictions", {}, "model.path"),
        (3, {}, "takes a name or a path, not a int"),
        ("demo", {"device": "gpu"}, "device='gpu'"),
        ("segformer_b0", {"checkpoint": "nowhere.pth"}, "nowhere.pth"),
    ],
)
def test_mistakes_of_loading(name: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        ade.load_model(name, **options)


@pytest.mark.slow
def test_comparing(call: Callable[..., Done], tmp_path: Path) -> None:
    first = ade.evaluate("demo", dataset="demo", options=SMALL, run_dir=tmp_path / "a")
    second = ade.evaluate(lambda image: image[..., 0] % 150, dataset="demo", options=SMALL, run_dir=tmp_path / "b")
    table = ade.compare([first, tmp_path / "b"], resamples=1000)
    assert table.mIoU.tolist() == [first.mIoU, second.mIoU]
    assert table.difference[1] == second.mIoU - first.mIoU
    assert np.isnan(table.difference[0])
    assert table.difference_low[1] <= table.difference[1] <= table.difference_high[1]
    done = call("compare", "a", "b", "--json", "--resamples", "1000")
    assert done.code == 0, done.err
    printed = json.dumps(json.loads(done.out))
    assert str(table.p[1]) in printed
    fewer = ade.evaluate("demo", dataset="demo", options=SMALL, limit=3)
    table = ade.compare([first, fewer, second], resamples=100)
    assert table.common.tolist() == [5, 3, 5]
    assert table.images.tolist() == [5, 3, 5]
    assert table.mIoU[1] == fewer.mIoU != first.mIoU
    assert table.difference[1] == 0  # on the images that both have
    others = replace(fewer, rows=tuple(replace(row, image_id=f"x{row.image_id}") for row in fewer.rows))
    with pytest.raises(HarnessError, match="share no images"):
        ade.compare([first, others])
    with pytest.raises(HarnessError, match="expected two or more"):
        ade.compare([first])


@pytest.mark.slow
def test_the_table_of_runs(tmp_path: Path) -> None:
    for name, limit in (("one", None), ("sweep/two", 3)):
        ade.evaluate("demo", dataset="demo", options=SMALL, limit=limit, run_dir=tmp_path / name)
    shutil.copytree(tmp_path / "one", tmp_path / "damaged")
    (tmp_path / "damaged/metrics.json").write_text("{")
    shutil.copytree(tmp_path / "one", tmp_path / "begun")
    manifest = json.loads((tmp_path / "begun/manifest.json").read_text())
    (tmp_path / "begun/manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    shutil.copytree(tmp_path / "begun", tmp_path / "now")
    lock = RunLock(tmp_path / "now")
    lock.acquire()
    table = ade.runs(tmp_path).set_index("run")
    lock.release()
    assert sorted(Path(run).relative_to(tmp_path).as_posix() for run in table.index) == [
        "begun", "damaged", "now", "one", "sweep/two",
    ]  # fmt: skip
    one = table.loc[str(tmp_path / "one")]
    assert (one.status, one.model, one.protocol, one.images) == ("finished", "demo", "original_size", 5)
    assert one.mIoU == ade.load_run(tmp_path / "one").mIoU
    assert "PARTIAL: 3 of" in table.loc[str(tmp_path / "sweep/two")].marks
    assert table.loc[str(tmp_path / "damaged")].status.startswith("damaged: ")
    assert table.loc[str(tmp_path / "begun")].status == "interrupted"  # nobody works on it
    assert table.loc[str(tmp_path / "now")].status == "running"
    with pytest.raises(HarnessError, match=r"not finished \(interrupted\).*resume"):
        ade.load_run(tmp_path / "begun")
    with pytest.raises(HarnessError, match=r"holds no run .*Runs are below it: `python -m ade_harness runs .*sweep`"):
        ade.load_run(tmp_path / "sweep")
    for wrong in (3, ["a"], None):
        with pytest.raises(HarnessError, match=r"given, expected folders: runs\('a', 'b'\)"):
            ade.runs(wrong)  # type: ignore[arg-type]
    with pytest.raises(HarnessError, match="no such folder"):
        ade.runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarnessError, match="contains no run"):
        ade.runs(tmp_path / "empty")


def test_what_is_no_evaluation_is_one_message() -> None:
    result = ade.evaluate("demo", dataset="demo", options=SMALL)
    for arguments, message in (
        ((result,), "one evaluation was given, expected a list"),
        (("runs/a",), "one evaluation was given, expected a list"),
        (([result, 3],), "int given, expected the folder of a run"),
        (([result, result], 0), "resamples=0"),
        (([result, result], 10, -1), "seed=-1"),
        (([result, result], 10, 0, 1.5), "level=1.5"),
    ):
        with pytest.raises(HarnessError, match=message):
            ade.compare(*arguments)
    with pytest.raises(HarnessError, match="load_run: int given"):
        ade.load_run(5)  # type: ignore[arg-type]
    assert ade.compare([result, result], 200).difference[1] == 0
