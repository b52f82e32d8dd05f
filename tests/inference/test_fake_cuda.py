"""Every system by its own protocol, from pixels to counts, on CUDA tensors without values: see fake_cuda.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ade_harness.config.compose import compose_config
from ade_harness.inference.memory import memory_warning, peaks
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
OF_MASKS = {"upsample_bilinear2d", "_softmax", "sigmoid", "bmm"}
"""Operators that make scores of queries, which in the official code is the network's own last step."""


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
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_no_operator_needs_the_global_switch_for_determinism(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    called = {op for found in passes.values() for op in (*found["forward"], *found["beside"])}
    assert {"convolution", "upsample_bilinear2d", "label_views"} <= called
    assert not called & NONDETERMINISTIC


@pytest.mark.slow
@pytest.mark.timeout(900)  # the fixture belongs to whichever comes first
def test_labels_and_counts_take_few_launches(passes: dict[tuple[str, bool], dict[str, Any]]) -> None:
    """NaN among the scores are looked for too: four of the eight."""
    for (name, _), found in passes.items():
        operators, views, windows = found["beside"], found["views"], found["windows"]
        after = sum(number for op, number in operators.items() if op not in OF_PIXELS)
        if OF_MASKS & operators.keys():
            of_masks = sum(operators[op] for op in OF_MASKS if op in operators)
            assert of_masks <= 5 * max(views, windows), (name, operators)  # masks may be resized twice
            parts = max(views, windows)
            assert after - of_masks <= (8 if parts == 1 else min(2 * parts + 9, 3 * parts + 6)), (name, operators)
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
    assert memory_warning(compose_config([]), 1) is None  # the demo's network is no published system
