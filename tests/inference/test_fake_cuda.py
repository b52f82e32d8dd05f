"""Every system by its own protocol, from pixels to counts, on CUDA tensors without values: see fake_cuda.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ade_harness.config.compose import compose_config
from ade_harness.inference.memory import memory_warning, peaks
from ade_harness.kernels.constants import to_device
from ade_harness.models.registry import systems
from tests.conftest import REPOSITORY
from tests.kernels.variants import CHOSEN, variant

_PROGRAM = Path(__file__).with_name("fake_cuda.py")

# What torch.use_deterministic_algorithms documents as nondeterministic on CUDA in a forward, or makes slower to avoid it.
# (Interpolation, pooling, padding, grid_sample, embedding and the losses are so in the backward only.)
NONDETERMINISTIC = {
    "bincount", "cumsum", "cumsum_", "cumprod", "histc", "index_add", "index_add_", "index_copy", "index_copy_",
    "index_put", "index_put_", "_index_put_impl_", "index_reduce", "index_reduce_", "kthvalue", "median", "nanmedian",
    "max_unpool2d", "max_unpool3d", "put", "put_", "resize_", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "scatter_reduce", "scatter_reduce_", "_scatter_add", "ctc_loss", "_ctc_loss", "nll_loss2d", "nll_loss2d_forward",
    "_embedding_bag",
}  # fmt: skip
HALF = ("segformer_b0", "maskformer_swin_t", "eomt_l", "dinov3_7b_linear")
"""Systems that are run with weights in bfloat16 too; all would take another minute."""
OF_PIXELS = {"_to_copy", "normalise_pixels", "stack"}
"""Operators that bring pixels to the network."""
OF_INVALID = {"count_invalid", "div"}
"""Operators that look for NaN among the scores."""


@pytest.fixture(scope="module")
def passes() -> dict[tuple[str, bool], dict[str, Any]]:
    """Run all systems, in a process of its own: fake tensors must not stay in this one's caches."""
    pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to test the GPU kernels' operators")
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), *systems(), "--half", *HALF], capture_output=True, text=True, timeout=900, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]  # a value that the host reads, or a CPU tensor among CUDA ones
    return {(found["model"], found["half"]): found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_no_system_waits_for_the_gpu_and_none_mixes_devices(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    assert passes.keys() == {(name, False) for name in systems()} | {(name, True) for name in HALF}
    assert all(sum(found["forward"].values()) > 100 for found in passes.values())


@pytest.mark.slow
def test_no_option_waits_for_the_gpu_and_none_mixes_devices() -> None:
    """What no system's own protocol has: calibration, other classes, labels of the input's size, and their likes."""
    pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to test the GPU kernels' operators")
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), "--options"], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}: {done.stderr[-3000:]}"
    assert len(done.stdout.splitlines()) >= 11


@pytest.mark.slow
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_no_operator_needs_the_global_switch_for_determinism(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    called = {op for found in passes.values() for op in (*found["forward"], *found["beside"])}
    assert {"convolution", "upsample_bilinear2d", "label_views"} <= called
    assert not called & NONDETERMINISTIC


@pytest.mark.slow
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_labels_and_counts_take_few_launches(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    """From the network's output to the counts: 8 for an image, or 3 for each window or view and 6.

    Of dense scores the look for NaN among them is in that, and of masks beside it.
    """
    for (name, half), found in passes.items():
        operators, views, windows = found["beside"], found["views"], found["windows"]
        after = sum(number for op, number in operators.items() if op not in OF_PIXELS)
        parts = max(views, windows)
        if "bmm" in operators:
            of_invalid = sum(operators[op] for op in OF_INVALID)
            of_dtypes = windows if name == "dinov3_7b_mask2former" or half else 0  # classes' shares, as they are summed
            assert of_invalid == 4
            others = 1 + half  # means of pixels, at the first image of the process; the input, to the weights' dtype
            assert 0 <= operators["_to_copy"] - found["copies"] - of_dtypes <= others, (name, operators)
            assert after - of_invalid + of_dtypes <= (8 if parts == 1 else 3 * parts + 6), (name, operators)
        else:
            # of a convolution that gives channels last (torch 2.14's fake tensors say so): each view is laid out anew
            copies = operators.get("clone", 0)
            assert copies <= views, (name, operators)
            assert after - copies == 8 + any('PROBABILITIES": true' in one for one in found["variants"]), (
                name,
                operators,
            )
            assert after + operators.get("stack", 0) <= 3 * max(views, windows) + 6, (name, operators)
        assert operators["normalise_pixels"] == views


@pytest.mark.slow
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_every_variant_that_a_system_launches_is_compiled_ahead(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    """By tests/kernels/compile_ahead.py, for real GPUs: a variant is what Triton compiles anew."""
    from tests.kernels.compile_ahead import (
        KERNELS,  # with Triton, which other workers that collect this file do not need
    )

    launched = {one for found in passes.values() for one in found["variants"]}
    listed = {
        variant(kernel.function.__name__, **{k: v for k, v in constants.items() if k in CHOSEN})
        for kernel in KERNELS.values() for constants in kernel.constants
    }  # fmt: skip
    assert launched - listed == set()
    deformable = {one for one in listed if one.startswith("_aggregate")}
    assert deformable <= launched  # none is compiled that no system launches


@pytest.mark.slow
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_the_memory_table_is_what_was_computed(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    assert list(peaks()) == list(systems())
    for (name, half), found in passes.items():  # to a percent: libraries may hold a small tensor longer
        expected = peaks()[name]["bf16" if half else "fp32"]
        assert found["peak_mib"] == pytest.approx(expected, rel=0.01), (
            f"scripts/memory_table.py writes it again: {name}"
        )
        if not half:
            assert found["weights_mib"] == pytest.approx(peaks()[name]["weights"], rel=0.01)
        assert found["pixels"] == peaks()[name]["pixels"]
    page = (REPOSITORY / "docs/gpu.md").read_text()
    for name, peak in peaks().items():
        assert f"| `{name}` | {peak['fp32'] / 1024:.1f} | {peak['bf16'] / 1024:.1f} |" in page
    for (name, half), found in passes.items():
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |") and line.count("|") == 13]
        cells = [cell.strip() for cell in row.split("|")[1:-1]]
        assert cells[3] == f"{found['views']}, {found['windows']}"
        assert int(cells[5 if half else 4]) == sum(found["forward"].values()), (name, half)
        assert half or abs(int(cells[6]) - sum(found["beside"].values())) <= 1, name  # means of pixels, once a process


def test_copies_that_wait_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pass above, which sees no values: a number that is written to one element, a tensor made of numbers."""
    program = (
        "import torch; from tests.inference import fake_cuda as f; f.allow_fake_cuda()\n"
        "with f._MODE, f.Watch(f.Seen()):\n"
        "    a = torch.zeros(3, 4, device='cuda:0')\n"
        "    a[:1, 0] = 2.0\n"
        "    a.to('cpu', non_blocking=True), torch.zeros(3).to('cuda:0', non_blocking=True)\n"
        "    for wrong in (lambda: a.__setitem__((0, 0), 2.0), a.cpu, lambda: torch.tensor([1.0, 2.0]).to('cuda:0')):\n"
        "        try:\n"
        "            wrong()\n"
        "        except AssertionError as error:\n"
        "            print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("waits for the GPU") == 3, done.stdout


def test_constants_come_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[tuple[Any, bool]] = []

    class Copied:
        def pin_memory(self) -> Copied:
            copied.append(("pinned", True))
            return self

        def to(self, device: Any, non_blocking: bool) -> Copied:
            copied.append((device, non_blocking))
            return self

    given: Any = Copied()
    to_device(given, "cpu")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    to_device(given, "cuda:1")
    assert copied == [("cpu", True), ("pinned", True), ("cuda:1", True)]


def test_a_system_that_will_not_fit_is_warned_of() -> None:
    overrides = ["model=dinov3_7b_mask2former", "dataset=ade20k", "dataset.root=x"]
    warning = memory_warning(compose_config(overrides), 24 << 30)
    assert warning is not None
    assert "this GPU has 24" in warning
    assert "model.dtype=bf16" in warning
    assert memory_warning(compose_config(overrides), 80 << 30) is None
    half = memory_warning(compose_config([*overrides, "model.dtype=bf16", "inference.precision=bf16"]), 16 << 30)
    assert half is not None
    assert "With model.dtype" not in half
    assert memory_warning(compose_config(["model=segformer_b0"]), 4 << 30) is None
    several = ["model=segformer_b5", "dataset=ade20k", "dataset.root=x", "inference.images=64", "inference.batch=64"]
    warning = memory_warning(compose_config(several), 24 << 30)  # of one image it would fit many times
    assert warning is not None
    assert "inference.images=64, inference.batch=64" in warning
    assert memory_warning(compose_config(several[:3]), 24 << 30) is None
    large = memory_warning(compose_config(several[:3]), 3 << 30, [(512, 683), (512, 2048), (300, 300)])
    assert large is not None  # one image of the data set is three times as long
    assert "for an image of 2048x512" in large
    assert memory_warning(compose_config(several[:3]), 3 << 30) is None
    calibrated = memory_warning(compose_config([*several[:3], "metrics.calibration=true"]), 3 << 30)
    assert calibrated is not None  # which needs all scores at the original size
    one = ["model=oneformer_swin_l", "dataset=ade20k", "dataset.root=x"]  # whose masks are made at the original size
    assert memory_warning(compose_config(one), 24 << 30, [(512, 683), (640, 853)]) is None
    label_step = memory_warning(compose_config(one), 24 << 30, [(512, 683), (4000, 6000)])
    assert label_step is not None  # 4 x (250 queries + 150 classes) x 24 million pixels are 36 GiB
    assert "needs about 38 GiB of GPU memory for an image of 6000x4000 (whose masks are upsampled" in label_step
    assert "inference.batch" not in label_step  # which would change nothing
    square = memory_warning(compose_config(one), 6 << 30, [(600, 1600), (2000, 2000)])  # the first has a larger input
    assert square is not None
    assert "an image of 2000x2000" in square
    assert memory_warning(compose_config([]), 1) is None  # the demo's network is no published system
