"""What a machine has too little of is reported before the first image, or ends one image and not the run."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _get_default_process_group_backend_for_device
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy

from ade_harness import kernels
from ade_harness.cli import doctor
from ade_harness.config.compose import compose_config
from ade_harness.config.runtime import Accelerator, RuntimeConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.evaluation import data, job
from ade_harness.evaluation.data import control_groups
from ade_harness.evaluation.launching import Launched
from ade_harness.evaluation.module import EvaluationModule
from ade_harness.inference import network
from ade_harness.inference.factory import open_network
from ade_harness.inference.forward import short_memory_named
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.runs.provenance import environment
from ade_harness.runtime import cluster, ranks
from ade_harness.runtime.coordination import Coordinator, LocalStore
from ade_harness.runtime.gpu_errors import is_gpu_lost, is_out_of_memory, tried_twice
from ade_harness.runtime.lifetime import directory_kept
from tests.cli.test_cli import FAST, Call


def test_a_small_shared_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    data.check_shared_memory(8, 4, 1.4e6)
    data.check_shared_memory(0, 0, 1e12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        HarnessError, match=r"64\.0 MiB free, and 8 loaders for each of 8 ranks need about 341\.8.*--shm-size"
    ):
        data.check_shared_memory(8, 4, 1.4e6)
    monkeypatch.setattr(data, "_SHARED_MEMORY", tmp_path / "none")  # not Linux
    data.check_shared_memory(8, 4, 1e12)


def no_memory(_: int) -> torch.UntypedStorage:
    raise RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Permission denied (13)")


def test_shared_memory_that_cannot_be_made_is_one_message(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    """In a loader an error of pickling would be printed, and its rank would wait for ever."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.UntypedStorage, "_new_shared", no_memory)
        assert "no shared memory can be made" in doctor._shared()
        at_start = call(*FAST, "dataset.images=2", "runtime.workers=1")
        patch.setattr(data, "check_shared_memory", lambda *_: None)
        later = call(*FAST, "dataset.images=2", "runtime.workers=1")
        assert call(*FAST, "dataset.images=2").code == 0
    for done in (at_start, later):
        assert done.code == 2
        assert done.err.count("no shared memory can be made") == 1
        assert "mode: Permission denied (13)). Make it writable" in done.err
        assert "Traceback" not in done.err + done.out


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


def test_launchers_that_give_each_rank_one_gpu_are_refused_and_others_have_their_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun and mpirun; otherwise each process would be an evaluation of its own."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("ADE_HARNESS_NOTE", raising=False)
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster, "gpu_count", lambda: 1)
    with pytest.raises(HarnessError, match=r"the launcher started 2 tasks .* sees 1 of its GPUs"):
        cluster.resolve_devices(RuntimeConfig())
    monkeypatch.setattr(cluster, "gpu_count", lambda: 8)
    assert cluster.resolve_devices(RuntimeConfig()) == ("cuda", 2)


@pytest.mark.parametrize(
    ("cores", "on_node", "expected"),
    [(8, "64", 8), (64, "64", 8), (16, "64", 2), (4, "4", 1), (8, "", 1)],
    ids=["bound to its own", "not bound", "bound to a socket", "fewer than ranks", "unknown"],
)
def test_cores_that_slurm_has_bound_a_task_to_are_its_own(
    monkeypatch: pytest.MonkeyPatch, cores: int, on_node: str, expected: int
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "ADE_HARNESS_NOTE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("STEP_ID", "0"), ("STEP_NUM_TASKS", "8"), ("STEP_NUM_NODES", "1"), ("CPUS_ON_NODE", on_node)):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(cluster, "usable_cores", lambda: cores)
    assert cluster.cores_per_rank() == expected


def test_what_is_handed_over_of_an_image_has_all_its_scales() -> None:
    cfg = compose_config(["inference=mmseg_slide_512", "inference.tta.scales=[1.0,2.0]", "inference.tta.flip=true"])
    made = open_network(cfg, ade20k_classes())
    assert made.prepared_bytes((512, 683)) == 3 * (512 * 683 + 1024 * 1366)
    image = np.zeros((512, 683, 3), np.uint8)
    assert made.prepared_bytes((512, 683)) == sum(p.numel() for p in made.prepare("a", image).pixels)


def test_few_cores_and_little_memory_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config(["model=dinov3_7b_linear", "dataset=ade20k", "dataset.root=x"])
    sizes = {"ADE_val_1": (512, 683)}
    assert job._machine_notes(cfg, "cpu", sizes) == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=16 << 30))
    for place in (job, cluster):
        monkeypatch.setattr(place, "usable_cores", lambda: 1)
    notes = job._machine_notes(cfg, "cuda", sizes)
    assert "this GPU has 16" in notes[0]
    assert notes[1].startswith("1 ranks share 1 CPU cores")
    for place in (job, cluster):
        monkeypatch.setattr(place, "usable_cores", lambda: 16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 << 30))
    assert job._machine_notes(cfg, "cuda", sizes) == []


@pytest.mark.parametrize(
    "text", ["CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
             "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
             "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "GET was unable to find an engine to execute this computation",
             "HIP error: out of memory", "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
             "miopenStatusAllocFailed", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory",
             "The following operation failed in the TorchScript interpreter.\nTraceback of TorchScript:\n"
             "RuntimeError: CUDA out of memory. Tried to allocate 2.00 GiB"],
)  # fmt: skip
def test_a_librarys_shortage_of_memory_is_one(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_gpu_lost(RuntimeError(text))


@pytest.mark.parametrize(
    "text", ["CUDA error: an illegal memory access was encountered", "HIP error: unspecified launch failure",
             "Triton Error [CUDA]: an illegal memory access was encountered"],
)  # fmt: skip
def test_a_gpu_that_is_lost_is_no_shortage(text: str) -> None:
    assert is_gpu_lost(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text))


def test_a_kernel_that_does_not_fit_loses_no_gpu() -> None:
    assert not is_gpu_lost(RuntimeError("Triton Error [CUDA]: invalid argument"))


def test_a_file_that_was_stale_for_a_moment_is_tried_again() -> None:
    left = [OSError(116, "Stale file handle")]

    def attempt() -> str:
        if left:
            raise left.pop()
        return "compiled"

    assert tried_twice(attempt) == "compiled"
    with pytest.raises(OSError, match="Stale"):
        tried_twice(lambda: (_ for _ in ()).throw(OSError(116, "Stale file handle")))


def test_a_node_that_nobody_knows_is_named_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [socket.gaierror(-2, "Name or service not known")] * 2

    def look_up(*_: Any) -> list[Any]:
        if left:
            raise left.pop()
        return []

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    cluster._require_host("node0", 29500)  # that of a pod that has just started
    assert not left
    left.append(socket.gaierror(-2, "Name or service not known"))
    monkeypatch.setattr(cluster, "_KNOWN_WITHIN_S", 0.0)
    with pytest.raises(HarnessError, match="MASTER_ADDR=node0: .* knows no such host .Name or service not known"):
        cluster._require_host("node0", 29500)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: this environment variable"),
        ({"LOCAL_RANK": "0", "MASTER_PORT": "99999"}, "MASTER_PORT=99999: this environment variable"),
        ({"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}, None),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, None),  # Kubernetes, of a service that is called master
        ({"LOCAL_RANK": "", "RANK": "", "WORLD_SIZE": "-1"}, None),
    ],
)
def test_variables_of_launchers_are_numbers(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str | None
) -> None:
    for name in cluster._NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HarnessError, match=re.escape(message)) if message else nullcontext():
        cluster.check_variables()
    assert "" not in {os.environ.get(name) for name in variables}


def test_a_gpu_that_another_program_fills_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning chooses each rank's GPU before anything of ours is on it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    cfg = compose_config([]).runtime
    trainer = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(launch=fill), setup_environment=None))
    monkeypatch.setattr(ranks, "make_trainer", lambda *_, **__: trainer)
    with pytest.raises(HarnessError) as raised, ranks.started_ranks(cfg):
        pass
    text = str(raised.value)
    assert "GPU 0 of CUDA_VISIBLE_DEVICES=4,5 cannot be used (CUDA error: out of memory)" in text
    assert "`nvidia-smi` names" in text


def fill(*_: Any, **__: Any) -> None:
    raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


@pytest.mark.parametrize("times", [1, 2])
def test_short_memory_while_labelling_is_one_images_failure(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config([])
    made = open_network(cfg, ade20k_classes())
    image = made.prepare("ADE_val_1", torch.zeros(64, 80, 3, dtype=torch.uint8).numpy())
    original, left = network.NetworkPredictor._labels, [times]

    def short(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return original(*arguments, **options)

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


@pytest.mark.parametrize(
    ("largest", "on_error", "note"),
    [
        (2, "fail", "memory was short beside the forward: its batch was redone in smaller ones, whose float sums may differ in"
                    " the last bit; inference.images=2 avoids it"),
        (1, "fail", "inference.images=1 avoids it"),
        (4, "skip", "an image failed: its batch was redone in smaller ones, whose float sums may differ in the last bit"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_batch_that_is_too_much_is_halved(
    largest: int, on_error: str, note: str, monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    """Each image is counted once, as it is in a run of batches that fit; an image that fails fails alone."""
    original, seen, bad = EvaluationModule._launch, [], []

    def launch(self: Any, images: Any, device: Any) -> Any:
        seen.append(len(images))
        bad.extend([images[1].image_id] if len(images) > 1 and not bad else [])
        if len(images) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        if on_error == "skip" and bad and bad[0] in [image.image_id for image in images]:
            raise HarnessError(f"{bad[0]}: no scores")
        return original(self, images, device)

    overrides = ("dataset.images=8", *FAST, "runtime.workers=0", "metrics.resamples=0", f"run.on_error={on_error}")
    monkeypatch.setattr(EvaluationModule, "_launch", launch)
    done = call(*overrides, "inference.images=4", "inference=fit_512", "run.dir=halved")
    assert done.code == 0, done.err
    assert max(seen) == 4
    assert note in " ".join(done.out.split())
    halved = pd.read_parquet(tmp_path / "halved/ledger").sort_values("image_id")
    monkeypatch.setattr(EvaluationModule, "_launch", original)
    done = call(*overrides, f"inference.images={largest}", "inference=fit_512", "run.dir=fits")
    assert done.code == 0, done.err
    fits = pd.read_parquet(tmp_path / "fits/ledger").sort_values("image_id")
    if on_error == "skip":
        fits = fits[fits.image_id != bad[0]]
    assert list(halved.image_id) == list(fits.image_id)
    assert list(halved.label_hash) == list(fits.label_hash)


def test_labels_for_which_memory_is_short_are_redone_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    """Outputs of all images of a batch are held until the last is labelled."""
    original, batches = NetworkPredictor.predict, [0]

    def predict(self: Any, batch: Any, *arguments: Any) -> Any:
        batches.append(len(batch))
        return original(self, batch, *arguments)

    def labels(self: Any, *arguments: Any, **options: Any) -> Any:
        if batches[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return labelled(self, *arguments, **options)

    labelled = NetworkPredictor._labels
    monkeypatch.setattr(NetworkPredictor, "predict", predict)
    monkeypatch.setattr(NetworkPredictor, "_labels", labels)
    overrides = (*FAST, "runtime.workers=0", "metrics.resamples=0", "inference.images=4", "inference=fit_512")
    done = call("dataset.images=8", *overrides, "run.dir=halved")
    assert done.code == 0, done.err
    assert "inference.images=2 avoids it" in " ".join(done.out.split())
    assert {2, 4} <= set(batches)
    assert len(pd.read_parquet(tmp_path / "halved/ledger")) == 8


def test_what_the_machine_lacks_is_said_before_the_first_image(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr("ade_harness.evaluation.job._machine_notes", lambda *_: ["this GPU is too small"])

    def stopped(*_: Any) -> None:
        raise HarnessError("out of memory with one input")

    monkeypatch.setattr(EvaluationModule, "_launch", stopped)
    done = call(*FAST, "dataset.images=2", "runtime.workers=0", "metrics.resamples=0")
    assert done.code == 2
    assert "Note: this GPU is too small." in done.out


def test_gpus_are_counted_without_torch() -> None:
    """A supervisor's ranks wait for it meanwhile."""
    program = """
import ctypes, sys
from types import SimpleNamespace
from ade_harness.config.runtime import RuntimeConfig
from ade_harness.runtime import cluster
def count(place):
    place._obj.value = 4
    return 0
fits = SimpleNamespace(cuInit=lambda flags: 0, cuDeviceGetCount=count)
cluster._has_gpu_files = lambda: True
ctypes.CDLL = lambda name: {"libcuda.so.1": fits}[name]
assert cluster.resolve_devices(RuntimeConfig()) == ("cuda", 4)
assert "torch" not in sys.modules
ctypes.CDLL = lambda name: SimpleNamespace(cuInit=lambda flags: 100)
assert cluster._driver_gpus() == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # as of a torch without CUDA, whatever is there
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cluster.resolve_devices(RuntimeConfig()) == ("cpu", 1)
    monkeypatch.setattr(cluster, "_driver_gpus", lambda: 2)
    with pytest.raises(HarnessError, match="2 GPUs are here, and this torch is built without CUDA: install its CUDA"):
        cluster.resolve_devices(RuntimeConfig())
    assert "2 GPUs are here" in doctor._cuda(None, None)


@pytest.mark.parametrize(("cuda", "built"), [("13.0", "for CUDA 13.0"), (None, "without GPUs")])
def test_a_gpu_of_amds_needs_torchs_rocm_build(cuda: str | None, built: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cluster, "_driver_gpus", lambda: 0)
    assert cluster.gpu_of_another_kind() is None
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path, **options: str(path) == "/dev/kfd" or exists(path, **options))
    text = f"a GPU of AMD's is here (/dev/kfd), and this torch is built {built}: its ROCm build would use it"
    assert cluster.resolve_devices(RuntimeConfig()) == ("cpu", 1)  # each processor with graphics has that file
    assert job._machine_notes(compose_config([]), "cpu", {}) == [text]
    assert job._machine_notes(compose_config(["runtime.accelerator=cpu"]), "cpu", {}) == []
    assert doctor._cuda(cuda, None) == text
    with pytest.raises(
        HarnessError, match=r"runtime\.accelerator=cuda: torch sees no GPU on .* \(a GPU of AMD's is here"
    ):
        cluster.resolve_devices(RuntimeConfig(accelerator=Accelerator.cuda))


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


def module_of(recorder: Any) -> EvaluationModule:
    made = open_network(compose_config([]), ade20k_classes())
    return EvaluationModule(made, recorder, Coordinator(LocalStore()))


def test_the_network_stays_where_it_is_when_a_test_ends() -> None:
    """Lightning's teardown would move it to the CPU, as a private copy of each rank."""
    module = module_of(SimpleNamespace(classes=ade20k_classes()))
    module.predictor.network.to("meta")  # a device that each machine has, and from which nothing comes back
    assert module.cpu() is module
    assert {p.device.type for p in module.predictor.network.parameters()} == {"meta"}


def test_rows_that_were_counted_stay_after_an_error_of_the_device() -> None:
    """The last batch is lost with its GPU; what waits for the recorder, and its last segment, are not."""
    done: list[str] = []
    recorder: Any = SimpleNamespace(
        classes=ade20k_classes(), settled=lambda maximum: done.append(f"settled {maximum}") or (),
        close=lambda: done.append("closed"), writer=SimpleNamespace(flush=lambda: done.append("flushed")),
    )  # fmt: skip
    module = module_of(recorder)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    event: Any = SimpleNamespace(synchronize=lost)
    module._launched.append(Launched([], [], [], [], Stopwatch(torch.device("cpu")), event))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        module.close(0)
    assert done == ["settled 0", "closed", "flushed"]


def test_a_step_takes_batches_for_a_moment_and_none_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow network gets one batch a step; of a fast one Lightning would cost more than the images."""
    module, clock, seen = module_of(SimpleNamespace(classes=ade20k_classes())), [0.0], list[Any]()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    module.begin, module.finish = seen.append, lambda n, images: seen.append((n, images))

    def process(batch: list[Any], *_: Any) -> int:
        clock[0] += seconds
        return len(batch)

    monkeypatch.setattr(module, "process", process)
    batches = (((number, ["image"] * number), 0, 0) for number in range(1, 9))
    seconds = 1.0
    module.test_step(batches)
    assert seen == [1, (1, 1)]
    seconds = 0.02
    module.test_step(batches)
    assert seen[2:] == [2, (2, 2), 3, (3, 3), 4, (4, 4)]
    module.coordinator.stop()
    with pytest.raises(StopIteration):  # the end of the loader, which ends Lightning's loop
        module.test_step(batches)
    assert len(seen) == 8


def test_evaluations_meet_on_the_cpu_and_trainings_where_lightning_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sum of 181 kB needs no communicator on a GPU; gradients do."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cfg = RuntimeConfig(accelerator=Accelerator.cpu, devices=2)
    evaluation, training = (ranks.make_trainer(cfg, training=kind).strategy for kind in (False, True))
    assert isinstance(evaluation, ranks.GlooStrategy)
    assert evaluation._process_group_backend == "gloo"
    assert isinstance(training, DDPStrategy)
    assert not isinstance(training, ranks.GlooStrategy)
    assert training._process_group_backend is None  # Lightning's choice: NCCL for GPUs
    assert _get_default_process_group_backend_for_device(torch.device("cuda")) == "nccl"


@pytest.mark.slow
def test_amds_compiler_gets_no_option_that_it_does_not_know() -> None:
    """``maxnreg`` is NVIDIA's; the module is imported as it would be on ROCm."""
    program = (
        "import torch; torch.version.hip = '6.4'\n"
        "from ade_harness.kernels import triton_gpu\nfrom ade_harness.models.ops import deformable_triton\n"
        "assert triton_gpu.OF_VIEWS == triton_gpu.EXACT and deformable_triton.WIDE == deformable_triton.EXACT\n"
    )
    pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to test the GPU kernels")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_the_control_batches_are_those_that_notice_most() -> None:
    def row(pairs: int) -> Any:
        return SimpleNamespace(pixels=[1] * pairs)

    ids = ["a", "b", "c", "d", "e"]
    groups = [[0, 1], [2], [3, 4]]
    assert control_groups(groups, ids, {}) == []
    assert control_groups(groups, ids, {"b": row(0)}) == []  # without a labelled pixel it shows nothing
    assert control_groups(groups, ids, {"a": row(4), "c": row(3)}) == [[2], [0, 1]]  # an image, a forward
    assert control_groups(groups, ids, {"a": row(4), "b": row(3), "c": row(3), "d": row(1)}) == [[0, 1], [2]]
    assert control_groups(groups, ids, {"e": row(1)}) == [[3, 4]]  # predicted whole: so its bits are the same


def test_a_working_directory_that_goes_away_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    with directory_kept():
        (tmp_path / "gone").rmdir()
    with directory_kept():  # of which there is none any more
        os.chdir(tmp_path)
    assert Path.cwd() == tmp_path
