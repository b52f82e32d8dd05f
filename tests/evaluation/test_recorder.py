"""The recorder's thread: order, errors, and how much may wait for it."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.evaluation.data import LoadedImage
from ade_harness.evaluation.recorder import CountedImage, Recorder
from ade_harness.inference.predictor import Prepared
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerWriter, read_rows


def counted(number: int) -> CountedImage:
    target = torch.full((4, 5), number, dtype=torch.uint8)
    counts = np.zeros((150, 151), np.int64)
    counts[number, number] = 20
    image = LoadedImage(f"i{number}", Prepared(f"i{number}", (), (4, 5)), target, f"{number:032x}", "", None, 0.0)
    return CountedImage(image, target, counts, np.zeros(0, np.int64), 0.0, 0)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    writer, maps = LedgerWriter(tmp_path / "ledger", flush_every=1), LabelMaps(tmp_path, "all")
    return Recorder(tmp_path, ade20k_classes(), writer, maps)


def test_images_are_written_in_order_by_another_thread(recorder: Recorder, tmp_path: Path) -> None:
    threads, append = [], recorder.writer.append
    recorder.writer.append = lambda row: (threads.append(threading.current_thread()), append(row))[1]  # type: ignore[method-assign]
    for number in range(12):
        recorder.put(counted(number))
    assert [image_id for image_id, _ in recorder.settled(0)] == [f"i{n}" for n in range(12)]
    recorder.close()
    assert [row.image_id for row in read_rows(tmp_path / "ledger")[0]] == sorted(f"i{n}" for n in range(12))
    assert np.array_equal(np.diag(recorder.matrix), [20] * 12 + [0] * 138)
    assert len(set(threads)) == 1
    assert threading.main_thread() not in threads
    assert not any(thread.name.startswith("recorder") for thread in threading.enumerate())


def test_no_more_than_asked_may_wait(recorder: Recorder) -> None:
    gate, record = threading.Event(), recorder.record
    recorder.record = lambda image: (gate.wait(10), record(image))[1]  # type: ignore[method-assign]
    for number in range(5):
        recorder.put(counted(number))
    assert list(recorder.settled(5)) == []  # returns at once: five may wait
    threading.Timer(0.1, gate.set).start()
    settled = recorder.settled(3)
    assert [next(settled)[0], next(settled)[0]] == ["i0", "i1"]
    assert len([*settled, *recorder.settled(0)]) == 3
    recorder.close()


@pytest.mark.parametrize("error", [OSError("a bug"), KeyboardInterrupt()])
def test_an_error_comes_back_with_its_image_and_the_others_are_kept(recorder: Recorder, error: BaseException) -> None:
    append = recorder.writer.append

    def broken(row: object) -> None:
        if row.image_id == "i1":  # type: ignore[attr-defined]
            raise error
        append(row)  # type: ignore[arg-type]

    recorder.writer.append = broken  # type: ignore[method-assign]
    for number in range(3):
        recorder.put(counted(number))
    errors = {image_id: future.exception() for image_id, future in recorder.settled(0)}
    recorder.close()
    assert errors == {"i0": None, "i1": error, "i2": None}
    assert list(np.diag(recorder.matrix)[:4]) == [20, 0, 20, 0]
