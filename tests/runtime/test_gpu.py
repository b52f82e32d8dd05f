"""Evaluations on real GPUs: the same labels with compiled kernels and plain torch, on one GPU and on all, from Python too.

Nothing here runs without a GPU; `benchmarks/gpu_acceptance.py` measures more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import ade_harness as ade
from ade_harness.runs.ledger import read_rows
from tests.api.networks import Colours
from tests.conftest import Done

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
KIND = "cuda"
IMAGES = 9
OVERRIDES = (
    f"dataset.images={IMAGES}", f"runtime.accelerator={KIND}", "tracking=none", "run.overlays=0", "metrics.resamples=0",
)  # fmt: skip
SMALL = {"dataset.images": IMAGES, "metrics.resamples": 0}


def hashes(run: Path) -> dict[str, str]:
    rows, damaged = read_rows(run / "ledger")
    assert damaged == []
    return {row.image_id: row.label_hash for row in rows}


def test_labels_are_those_of_plain_torch_on_any_number_of_gpus(cold_cli: Callable[..., Done], tmp_path: Path) -> None:
    cases = {"torch": ["runtime.devices=1", "runtime.kernels=torch"], "one": ["runtime.devices=1"], "all": []}
    for name, overrides in cases.items():
        done = cold_cli(*OVERRIDES, *overrides, f"run.dir={name}")
        assert done.code == 0, done.err
    expected = hashes(tmp_path / "torch")
    assert len(expected) == IMAGES
    assert hashes(tmp_path / "one") == expected
    assert hashes(tmp_path / "all") == expected


@pytest.mark.parametrize(
    "overrides",
    [
        ("inference=mmseg_slide_512",),
        ("inference=original_size", "inference.tta.flip=true", "inference.tta.average=scores"),
        ("inference=original_size", "inference.batch=4", "inference.images=3"),
    ],
)
def test_windows_views_and_batches_too(
    cold_cli: Callable[..., Done], tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    for kernels in ("torch", "auto"):
        done = cold_cli(*OVERRIDES, *overrides, "runtime.devices=1", f"runtime.kernels={kernels}", f"run.dir={kernels}")
        assert done.code == 0, done.err
    assert hashes(tmp_path / "auto") == hashes(tmp_path / "torch")


def test_python_evaluates_on_every_gpu_and_leaves_it() -> None:
    network = Colours()
    current = torch.cuda.current_device()
    found = [
        ade.evaluate(network, dataset="demo", options=SMALL, device=f"{KIND}:{number}")
        for number in range(torch.cuda.device_count())
    ]
    assert all(np.array_equal(result.matrix, found[0].matrix) for result in found)
    assert next(network.parameters()).device.type == "cpu"
    assert torch.cuda.current_device() == current
    assert torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]  # as it was before


def test_the_metric_counts_on_the_gpu_what_it_counts_on_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, target = (torch.randint(0, 150, (3, 97, 131), generator=generator) for _ in range(2))
    target[0, :5] = 255
    here, there = ade.metrics.SegmentationScores(), ade.metrics.SegmentationScores().to(KIND)
    here.update(labels, target)
    there.update(labels.to(KIND), target.to(KIND))
    assert torch.equal(there.matrix.cpu(), here.matrix)
