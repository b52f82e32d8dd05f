"""What a machine has too little of is reported before the first image, or ends one image and not the run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states

from ade_harness import kernels
from ade_harness.cli import doctor
from ade_harness.config.compose import compose_config
from ade_harness.config.runtime import Accelerator, RuntimeConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.evaluation import data, job
from ade_harness.evaluation.module import EvaluationModule
from ade_harness.inference import network
from ade_harness.inference.factory import open_network
from ade_harness.inference.forward import is_out_of_memory, short_memory_named
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.runs.provenance import environment
from ade_harness.runtime import cluster
from ade_harness.runtime.coordination import Coordinator, LocalStore
from tests.cli.test_cli import FAST, Call


def test_a_small_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    data.check_shared_memory(8, 4, 1.4e6)
    data.check_shared_memory(0, 0, 1e12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        HarnessError, match=r"64 MiB free, and 8 loaders for each of 8 ranks need about 342.*--shm-size"
    ):
        data.check_shared_memory(8, 4, 1.4e6)
    monkeypatch.setattr(data, "_SHARED_MEMORY", tmp_path / "none")  # not Linux
    data.check_shared_memory(8, 4, 1e12)


def test_slurm_tasks_that_see_one_gpu_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("JOB_ID", "1"), ("STEP_ID", "0"), ("PROCID", "0"), ("STEP_NUM_TASKS", "8"), ("NTASKS", "8"),
                        ("STEP_NUM_NODES", "1")):  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(cluster, "gpu_count", lambda: 1)
    with pytest.raises(HarnessError, match=r"srun started 8 tasks.*sees 1 of its GPUs.*--ntasks-per-node=1"):
        cluster.resolve_devices(RuntimeConfig())
    monkeypatch.setattr(cluster, "gpu_count", lambda: 8)
    assert cluster.resolve_devices(RuntimeConfig()) == ("cuda", 8)


def test_few_cores_and_little_memory_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config(["model=dinov3_7b_linear", "dataset=ade20k", "dataset.root=x"])
    assert job._machine_notes(cfg, "cpu") == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 << 30))
    monkeypatch.setattr(job, "usable_cores", lambda: 1)
    notes = job._machine_notes(cfg, "cuda")
    assert "this GPU has 16" in notes[0]
    assert notes[1].startswith("1 ranks share 1 CPU cores")
    monkeypatch.setattr(job, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    assert job._machine_notes(cfg, "cuda") == []


@pytest.mark.parametrize(
    "text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
             "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "GET was unable to find an engine to execute this computation"],
)  # fmt: skip
def test_a_librarys_shortage_of_memory_is_one(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("times", [1, 2])
def test_short_memory_while_labelling_is_one_images_failure(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config([])
    made = open_network(cfg, ade20k_classes())
    image = made.prepare("ADE_val_1", torch.zeros(64, 80, 3, dtype=torch.uint8).numpy())
    original, left = network.NetworkPredictor._labels, [times]

    def short(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return original(*arguments)

    monkeypatch.setattr(network.NetworkPredictor, "_labels", short)
    device = torch.device("cpu")
    if times == 1:  # the second try has an emptied cache
        assert made.predict([image], device, Stopwatch(device))[0].labels.shape == (64, 80)
        return
    with pytest.raises(HarnessError, match=r"ADE_val_1: out of memory while labelling 80x64 \(CUDA out of memory"):
        made.predict([image], device, Stopwatch(device))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("place", ["count", "normalise"])
def test_short_memory_anywhere_costs_one_image(
    place: str, times: int, monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    """The counts and the pixels are on the device too; once is dealt with, twice fails that image alone."""
    chosen: Any = kernels.select("auto", "cpu")
    original, calls = getattr(chosen, place), [0]

    def short(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if 2 <= calls[0] < 2 + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return original(*arguments, **options)

    monkeypatch.setattr(chosen, place, short)
    # images as they come, and no halving in the forward, which has its own way
    done = call(
        "dataset.images=4", "run.on_error=skip", "run.dir=run", *FAST, "runtime.workers=0", "metrics.resamples=0"
    )
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["images"] == (4 if times == 1 else 3)
    if times == 2:
        assert any(mark.startswith("PARTIAL: 3 of 4 images, 1 failed") for mark in metrics["marks"])
        failures = json.loads((tmp_path / "run/manifest.json").read_text())["failures"]
        assert "out of memory" in str(failures)


def test_gpus_that_cuda_cannot_use_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's library counts them whatever torch was built for: a driver that is too old for it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cluster, "_has_gpu_files", lambda: True)
    assert environment()["gpus"] == []  # which every manifest holds
    assert cluster.resolve_devices(RuntimeConfig(accelerator=Accelerator.cpu)) == ("cpu", 1)
    for accelerator in (Accelerator.auto, Accelerator.cuda):
        with pytest.raises(HarnessError, match=r"2 GPUs are here that torch, built for CUDA .*driver is too old"):
            cluster.resolve_devices(RuntimeConfig(accelerator=accelerator))
    assert "driver is too old" in doctor._cuda("13.0", None)
    assert doctor._kernels().count("GPU") == 0
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(HarnessError, match="this torch is built without CUDA: install its CUDA build"):
        cluster.resolve_devices(RuntimeConfig())


def test_a_part_of_a_gpu_is_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 1, raising=False)
    assert cluster.usable_gpus() == 1
    assert cluster.unusable_gpus() is None


def test_short_memory_beside_images_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as in Lightning, which brings the network to its GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 24 * 2**30))
    with (
        pytest.raises(HarnessError, match=r"out of memory while it is moved.*GPU 1 has 1\.0 of 24\.0 GiB free"),
        short_memory_named("it is moved"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="a bug"), short_memory_named("it is moved"):
        raise RuntimeError("a bug")


def test_no_weights_are_broadcast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lightning's strategy does so before a test: of 7 B parameters 28 GB by way of the host, at each start."""
    sent: list[int] = []
    monkeypatch.setattr(dist, "_broadcast_coalesced", lambda group, tensors, *rest: sent.append(len(tensors)))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        cfg = compose_config([])
        predictor_ = open_network(cfg, ade20k_classes())
        recorder: Any = SimpleNamespace(classes=ade20k_classes())
        module = EvaluationModule(predictor_, recorder, Coordinator(LocalStore()))
        _sync_module_states(module)
        assert sent == []
        _sync_module_states(torch.nn.Sequential(predictor_.network))
        assert sum(sent) == len(list(predictor_.network.parameters())) + len(list(predictor_.network.buffers()))
    finally:
        dist.destroy_process_group()
