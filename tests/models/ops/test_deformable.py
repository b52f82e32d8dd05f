"""Sums of samples at computed places: against loops written from the definitions, on every implementation."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.inference.factory import open_network
from ade_harness.models.backbones.internimage import Dcnv3
from ade_harness.models.ops import deformable
from ade_harness.models.ops.attention import attend, reference_operations
from ade_harness.models.ops.deformable import (
    DeformableAttention,
    aggregate,
    aggregate_torch,
    centres,
    deformable_convolution_v3,
    modulated_deformable_convolution,
)
from ade_harness.models.ops.deformable_numba import aggregate_numba
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

IMPLEMENTATIONS = ["torch", "numba", "triton"]


def implementation(name: str) -> Callable[..., Tensor]:
    if name == "triton":
        pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to test the GPU kernels")
        from ade_harness.models.ops.deformable_triton import aggregate_triton

        return aggregate_triton
    return {"torch": aggregate_torch, "numba": aggregate_numba}[name]


def bilinear(plane: np.ndarray, y: float, x: float) -> np.ndarray:
    """Value [D] of a map [H, W, D] at pixel coordinates, zeros outside."""
    total = np.zeros(plane.shape[2])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += plane[row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


def naive(values: Tensor, shapes: list[tuple[int, int]], points: Tensor, weights: Tensor) -> Tensor:
    """The definition, sample by sample, in float64."""
    batch, _, groups, channels = values.shape
    queries, taps = points.shape[1], points.shape[3]
    out = np.zeros((batch, queries, groups, channels))
    for n in range(batch):
        for g in range(groups):
            start = 0
            for level, (height, width) in enumerate(shapes):
                plane = values[n, start : start + height * width, g].double().numpy().reshape(height, width, channels)
                start += height * width
                for q in range(queries):
                    for k in range(level * taps // len(shapes), (level + 1) * taps // len(shapes)):
                        x, y = points[n, q, g, k].double().tolist()
                        sample = bilinear(plane, y * height - 0.5, x * width - 0.5)
                        out[n, q, g] += float(weights[n, q, g, k]) * sample
    return torch.from_numpy(out.reshape(batch, queries, groups * channels))


def problem(shapes: list[tuple[int, int]], taps: int, groups: int = 3, channels: int = 5) -> tuple[Tensor, ...]:
    """Points inside, on edges, and outside of the maps."""
    generator = torch.Generator().manual_seed(len(shapes) + taps)
    pixels = sum(height * width for height, width in shapes)
    values = torch.randn(2, pixels, groups, channels, generator=generator)
    points = torch.rand(2, 7, groups, taps, 2, generator=generator) * 1.6 - 0.3
    points[0, 0, 0, 0] = torch.tensor([0.5, 0.5])
    points[0, 1, 0, 0] = torch.tensor([0.0, 1.0])
    points[0, 2, 0, 0] = torch.tensor([1e9, -1e9])
    return values, points, torch.rand(2, 7, groups, taps, generator=generator)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shapes", "taps"), [([(3, 4), (6, 5), (1, 1)], 6), ([(4, 7)], 9)])
def test_sums_are_those_of_the_definition(name: str, shapes: list[tuple[int, int]], taps: int) -> None:
    values, points, weights = problem(shapes, taps)
    found = implementation(name)(values, shapes, points, weights)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), naive(values, shapes, points, weights), atol=2e-6)


@pytest.mark.parametrize(("channels", "tile"), [(32, 16), (44, 16), (128, 8)])
def test_wide_heads_take_fewer_queries_at_a_time(channels: int, tile: int) -> None:
    """Of a program on a GPU: as many sums as its registers hold; each query's sum is the same."""
    aggregate_triton = implementation("triton")
    from ade_harness.models.ops.deformable_triton import constants_of

    assert constants_of(12, 3, channels)["TILE"] == tile
    shapes = [(3, 4), (6, 5), (1, 1)]
    values, points, weights = problem(shapes, 12, groups=2, channels=channels)
    assert torch.allclose(
        aggregate_triton(values, shapes, points, weights), aggregate_torch(values, shapes, points, weights), atol=5e-6
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_half_precision_and_nan(name: str) -> None:
    shapes = [(4, 7)]
    values, points, weights = problem(shapes, 9)
    expected = naive(values.bfloat16(), shapes, points, weights.bfloat16())
    found = implementation(name)(values.bfloat16(), shapes, points, weights.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), expected, rtol=1e-2, atol=1e-2)  # the sum is rounded to 8 bits once
    points[0, 3, 1, 0, 0] = float("nan")
    spoilt = implementation(name)(values, shapes, points, weights)
    assert spoilt[0, 3, 5:10].isnan().all()  # its own query and group, no other
    assert spoilt.isnan().sum() == 5


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(3, 4), (6, 5), (1, 1)]
    values, points, weights = problem(shapes, 6)
    whole = aggregate_torch(values, shapes, points, weights)
    monkeypatch.setattr(deformable, "_CHUNK", 1)
    assert torch.equal(aggregate_torch(values, shapes, points, weights), whole)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bits(two_threads: None) -> None:
    shapes = [(3, 4), (6, 5), (1, 1)]
    values, points, weights = problem(shapes, 6)
    several = aggregate_numba(values, shapes, points, weights)
    torch.set_num_threads(1)
    assert torch.equal(aggregate_numba(values, shapes, points, weights), several)


def test_gradients_and_references_use_torch() -> None:
    shapes = [(4, 7)]
    values, points, weights = problem(shapes, 9)
    exact = aggregate_torch(values, shapes, points, weights)
    with reference_operations():
        assert torch.equal(aggregate(values, shapes, points, weights), exact)
    values.requires_grad_(True)
    aggregate(values, shapes, points, weights).sum().backward()
    assert values.grad is not None
    assert values.grad.abs().sum() > 0


def test_deformable_attention_looks_where_its_offsets_say() -> None:
    """Offsets are pixels of each level, from where the query is."""
    torch.manual_seed(0)
    layer = DeformableAttention(width=12, heads=2, levels=2, points=2, value_width=6).eval()
    shapes = [(4, 6), (2, 3)]
    queries, values = torch.randn(1, 30, 12), torch.randn(1, 30, 12)
    references = centres(shapes, torch.device("cpu"))
    with torch.inference_mode():
        found = layer(queries, references, values, shapes)
        offsets = layer.sampling_offsets(queries).view(30, 2, 2, 2, 2)
        weights = layer.attention_weights(queries).view(30, 2, 4).softmax(-1).view(30, 2, 2, 2)
        projected = layer.value_proj(values).view(30, 2, 3).double().numpy()
        out = np.zeros((30, 2, 3))
        for q in range(30):
            for head in range(2):
                for level, (start, (height, width)) in enumerate(zip((0, 24), shapes, strict=True)):
                    plane = projected[start : start + height * width, head].reshape(height, width, 3)
                    for p in range(2):
                        x = float(references[q, 0]) * width - 0.5 + float(offsets[q, head, level, p, 0])
                        y = float(references[q, 1]) * height - 0.5 + float(offsets[q, head, level, p, 1])
                        out[q, head] += float(weights[q, head, level, p]) * bilinear(plane, y, x)
        expected = layer.output_proj(torch.from_numpy(out.reshape(1, 30, 6)).float())
    assert torch.allclose(found, expected, atol=1e-5)


def test_dcnv3_reads_a_kernel_of_three_by_three_by_columns() -> None:
    """With offsets of 0 it is a convolution; the second weight is that of the pixel above the left one's below."""
    values = torch.arange(30.0).view(1, 5, 6, 1, 1)
    offsets = torch.zeros(1, 5, 6, 1, 9, 2)
    for tap, (dx, dy) in enumerate((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
        weights = torch.zeros(1, 5, 6, 1, 9)
        weights[..., tap] = 1
        found = deformable_convolution_v3(values, offsets, weights)[0, :, :, 0]
        plane = values[0, :, :, 0, 0].numpy()
        expected = [[bilinear(plane[:, :, None], y + dy, x + dx)[0] for x in range(6)] for y in range(5)]
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-4), tap


def test_dcnv3_offsets_are_x_then_y_in_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 5, 6, 2, 3, generator=generator)
    offsets = torch.randn(1, 5, 6, 2, 9, 2, generator=generator)
    weights = torch.randn(1, 5, 6, 2, 9, generator=generator)
    found = deformable_convolution_v3(values, offsets, weights, scale=1.5)
    for y, x, g in ((0, 0, 0), (2, 3, 1), (4, 5, 0)):
        total = np.zeros(3)
        for tap, (dx, dy) in enumerate((dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
            px = x + 1.5 * (dx + float(offsets[0, y, x, g, tap, 0]))
            py = y + 1.5 * (dy + float(offsets[0, y, x, g, tap, 1]))
            total += float(weights[0, y, x, g, tap]) * bilinear(values[0, :, :, g].double().numpy(), py, px)
        assert np.allclose(found[0, y, x].view(2, 3)[g], total, atol=1e-5)


def test_dcnv2_without_offsets_is_a_convolution() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 8, 5, 6, generator=generator)
    weight, bias = torch.randn(4, 8, 3, 3, generator=generator), torch.randn(4, generator=generator)
    found = modulated_deformable_convolution(maps, torch.zeros(2, 36, 5, 6), torch.ones(2, 18, 5, 6), weight, bias)
    assert torch.allclose(found, torch.nn.functional.conv2d(maps, weight, bias, padding=1), atol=1e-5)


def test_dcnv2_offsets_are_y_then_x_of_each_point() -> None:
    """Two groups of channels, each with its own points and modulation."""
    generator = torch.Generator().manual_seed(2)
    maps, weight = torch.randn(1, 4, 5, 6, generator=generator), torch.randn(3, 4, 3, 3, generator=generator)
    offsets = torch.randn(1, 36, 5, 6, generator=generator)
    modulation = torch.rand(1, 18, 5, 6, generator=generator)
    found = modulated_deformable_convolution(maps, offsets, modulation, weight, torch.zeros(3))
    for y, x in ((0, 0), (2, 3), (4, 5)):
        total = np.zeros(3)
        for group in range(2):
            plane = maps[0, 2 * group : 2 * group + 2].permute(1, 2, 0).double().numpy()
            for tap in range(9):
                place = group * 18 + tap * 2
                py = y + tap // 3 - 1 + float(offsets[0, place, y, x])
                px = x + tap % 3 - 1 + float(offsets[0, place + 1, y, x])
                sample = bilinear(plane, py, px) * float(modulation[0, group * 9 + tap, y, x])
                total += weight[:, 2 * group : 2 * group + 2, tap // 3, tap % 3].double().numpy() @ sample
        assert np.allclose(found[0, :, y, x], total, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_both_forms_of_attention_agree(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 4, n, 8, generator=generator) for n in (5, 7, 7))
    bias = (
        torch.rand(2, 1, 5, 7, generator=generator) > 0.4
        if kind == torch.bool
        else torch.randn(2, 4, 5, 7, generator=generator)
    )
    if kind == torch.bool:
        bias[..., 0] = True
    fast = attend(q, k, v, bias)
    with reference_operations():
        exact = attend(q, k, v, bias)
    assert torch.allclose(fast, exact, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_cuda_kernel_gives_the_sums_of_torch() -> None:
    from ade_harness.models.ops.deformable_triton import aggregate_triton

    levels, one = [(16, 22), (32, 43), (64, 86)], [(56, 76)]
    for shapes, taps, channels in ((levels, 12, 32), (levels, 12, 44), (levels, 12, 128), (one, 4, 128), (one, 9, 32)):
        values, points, weights = (t.cuda() for t in problem(shapes, taps, groups=8, channels=channels))
        found = aggregate_triton(values, shapes, points, weights)
        assert torch.allclose(found, aggregate_torch(values, shapes, points, weights), atol=1e-5)


def test_a_compiled_operation_that_does_not_work_here_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable, "FALLBACKS", {})
    assert deformable.compiled("cpu")[1] is None
    assert deformable.FALLBACKS == {}
    assert deformable.compiled("mps") == (deformable.aggregate_torch, "there is none for mps")
    for broken, expected in (
        (lambda *_: (_ for _ in ()).throw(RuntimeError("no C compiler\nx")), "RuntimeError: no C compiler"),
        (lambda *a: deformable.aggregate_torch(*a) * 1.001, "it gave other values than torch"),
    ):
        monkeypatch.setattr("ade_harness.models.ops.deformable_numba.aggregate_numba", broken)
        deformable.compiled.cache_clear()
        assert deformable.compiled("cpu") == (deformable.aggregate_torch, expected)
        assert deformable.FALLBACKS["cpu"] == expected
    monkeypatch.setattr(
        "ade_harness.models.ops.deformable_numba.aggregate_numba",
        lambda *a: deformable.aggregate_torch(*a) * (1 + (a[0].dtype == torch.bfloat16) / 16),
    )
    deformable.compiled.cache_clear()
    one = deformable.Variant(12, 3, 32)  # each variant is compiled for itself, and tried for itself
    assert deformable.compiled("cpu", None, one)[1] is None
    half = dataclasses.replace(one, dtype=torch.bfloat16)
    assert deformable.compiled("cpu", None, half)[1] == "it gave other values than torch"
    monkeypatch.undo()
    deformable.compiled.cache_clear()


def test_a_run_says_that_it_fell_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_network(compose_config([]), ade20k_classes())
    assert not any("deformable" in note for note in made.notes())
    monkeypatch.setitem(deformable.FALLBACKS, "cuda", "RuntimeError: Failed to find C compiler")
    assert made.notes()[-1].endswith("plain torch is used, which is slower: RuntimeError: Failed to find C compiler")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_a_network_goes_through_the_operation(backend: str) -> None:
    """One graph: an operation that is no operator would break it."""
    shapes = [(5, 7), (3, 4)]
    values, weights = torch.randn(1, 47, 2, 8), torch.rand(1, 6, 2, 4)
    points = torch.rand(1, 6, 2, 4, 2)

    def network(values: Tensor) -> Tensor:
        return aggregate(values * 2, shapes, points, weights) + 1

    with torch.no_grad():
        compiled = torch.compile(network, backend=backend, fullgraph=True)
        assert torch.equal(compiled(values), network(values))


class Calls(nn.Linear):
    aggregates = True
    variant = deformable.Variant(12, 3, 32)

    def __init__(self) -> None:
        super().__init__(2, 2)


def test_every_module_that_calls_the_operation_says_so() -> None:
    """Ranks compare what it runs on, if their network has one."""
    found = set()
    for file in (REPOSITORY / "src/ade_harness/models").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                called = {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
                if called & {"aggregate", "deformable_convolution_v3"}:
                    marked = [
                        n for n in node.body if isinstance(n, ast.Assign) and ast.unparse(n) == "aggregates = True"
                    ]
                    assert marked, f"{file.name}: {node.name}"
                    found.add(node.name)
    assert found == {"DeformableAttention", "Dcnv3"}


def test_the_implementation_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert deformable.implementation_of(nn.Linear(2, 2), "cpu") is None
    assert deformable.implementation_of(nn.Sequential(Calls()), "cpu") == "numba"
    tried: list[deformable.Variant] = []
    monkeypatch.setattr(deformable, "compiled", lambda *a: (tried.append(a[2]), (deformable.aggregate_torch, ""))[1])
    network = nn.Sequential(DeformableAttention(64, 4, 3, 4, value_width=32), Dcnv3(48, 3, 5), Calls())
    assert deformable.implementation_of(network, "cpu", torch.bfloat16) == "torch"
    assert set(tried) == {  # all that its operations are called with, before the first image: in heads that switch
        deformable.Variant(taps, levels, channels, dtype)  # autocast off too, as Mask2Former's pixel decoder does
        for taps, levels, channels in ((12, 3, 8), (9, 1, 16), (12, 3, 32))
        for dtype in (torch.bfloat16, torch.float32)
    }
    monkeypatch.setattr(deformable, "compiled", lambda *_: (deformable.aggregate_torch, "no compiler"))
    assert deformable.implementation_of(nn.Sequential(Calls()), "cpu") == "torch"
