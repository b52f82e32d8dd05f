"""Every benchmark still runs: a smoke run of seconds of each, small enough that its figures mean nothing."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.warm import WarmPopen

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "benchmarks"
PARTS = ("images", "machine_code", "measure", "ours", "peers")
"""Modules of the benchmarks, not benchmarks themselves."""
SMOKE: dict[str, tuple[list[str], str]] = {
    "bench_host": (["--images", "4", "--files", "2", "--evaluated", "4", "--ranks", "1", "--rounds", "1", "--label-maps", "all"], "whole evaluations"),
    "bench_kernels": (["--rounds", "1", "--no-largest", "--size", "96", "128"], "counting"),
    "bench_loop": (["--images", "2", "--rounds", "1", "--peers", "torchmetrics", "detectron2"], "outside the forward"),
    "bench_mask_systems": (["--systems", "maskformer_swin_t"], "maskformer_swin_t"),
    "bench_metric": (["--rounds", "1", "--size", "96", "128"], "2^24"),
    "bench_models": (["--images", "2", "--models", "b0", "--protocols", "mmseg_slide_512"], "SegFormer-B0"),
    "bench_precision": (["dataset.images=2"], "fp16"),
    "bench_protocols": (["--rounds", "1", "--only", "slide"], "slide 512/341"),
    "bench_sharding": (["--images", "6", "--ranks", "2", "--rules", "queue", "--no-slow-rank"], "efficiency"),
    "bench_start": (["--rounds", "1", "--ranks", "1", "--cold"], "start-up"),
    "bench_statistics": (["--images", "20", "--resamples", "200"], "bootstrap"),
    "bench_systems": (["--systems", "segformer_b0"], "segformer_b0"),
    "gpu_acceptance": (["--parts", "environment", "exact", "speed", "waits", "others", "throughput", "short_memory"], "0 failed of"),
    "interruptions": (["--images", "4", "--moments", "1", "--ranks", "1", "--rules", "queue", "--victims", "sum", "--seed", "1"], "runs of"),
    "interval_coverage": (["--images", "20", "--sets", "2", "--resamples", "100"], "pixel_accuracy"),
    "simulate_sharding": (["--sizes", "1", "8"], "limit: the largest image"),
}  # fmt: skip


def test_every_benchmark_has_a_smoke_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} - set(PARTS) == set(SMOKE)


@pytest.mark.parametrize("name", SMOKE)
def test_a_benchmark_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, expected = SMOKE[name]
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    for part in (*PARTS, "bench_systems"):
        monkeypatch.delitem(sys.modules, part, raising=False)
    if name not in ("bench_start", "interruptions"):  # which start cold, and look at the environment of each rank
        monkeypatch.setattr(subprocess, "Popen", WarmPopen)
    with torch.inference_mode(torch.is_inference_mode_enabled()):
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert expected in capfd.readouterr().out
