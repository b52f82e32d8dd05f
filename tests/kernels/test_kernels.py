"""One suite for the three implementations: labels equal interpolate + argmax in every bit; counts equal a loop."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ade_harness import kernels
from ade_harness.errors import HarnessError
from ade_harness.kernels import Kernels, PixelStatistics, Placement, View, reference, whole
from ade_harness.kernels.bilinear import axis
from ade_harness.models.ops import deformable
from tests.kernels.conftest import fused

GPU = torch.cuda.is_available()
TRITON = pytest.param("triton_gpu", marks=pytest.mark.slow)  # its interpreter takes seconds
KINDS = ("random", "tied", "confident", "infinite", "huge", "flat")


def implementation(name: str) -> Kernels:
    if name == "triton_gpu":
        pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to test the GPU kernels")
    return cast(Kernels, importlib.import_module(f"ade_harness.kernels.{name}"))


def on(name: str, tensor: Tensor) -> Tensor:
    return tensor.cuda() if name == "triton_gpu" and GPU else tensor


def scores_of(kind: str, shape: tuple[int, int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(shape, generator=generator)
    if kind == "tied":
        return scores.round()
    if kind == "flat":
        return torch.zeros(shape)
    if kind == "huge":
        return scores * 1e38
    if kind == "confident":
        owner = torch.randint(0, shape[0], (1, -(-shape[1] // 5), -(-shape[2] // 5)), generator=generator)
        owner = owner.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, : shape[1], : shape[2]]
        return (scores * 0.3).scatter_add_(0, owner, torch.full(owner.shape, 8.0))
    if kind == "infinite":
        scores[0] = float("-inf")
        scores[-1, 0, 0] = float("inf")
    return scores


def naive(scores: Tensor, *sizes: tuple[int, int]) -> Tensor:
    """Interpolate and argmax; a later step that changes no size is left out: torch would make infinities NaN in it."""
    for step, size in enumerate(sizes):
        if step and tuple(scores.shape[1:]) == size:
            continue
        scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
    return scores.argmax(0)


@pytest.mark.parametrize("name", ["reference", "numba_cpu"])
@given(
    st.sampled_from(KINDS), st.sampled_from([1, 2, 3, 4, 5, 7, 9, 11, 32, 150]),
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 170), st.integers(1, 170), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
@pytest.mark.slow
def test_label_map_equals_interpolate_and_argmax(
    name: str, kind: str, channels: int, h: int, w: int, height: int, width: int, seed: int
) -> None:
    scores = scores_of(kind, (channels, h, w), seed)
    found = implementation(name).label_map(scores, (height, width))
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), naive(scores, (height, width)))


@pytest.mark.parametrize("name", ["reference", "numba_cpu"])
@given(
    st.sampled_from(KINDS), st.sampled_from([2, 3, 7, 11, 150]), st.integers(2, 30), st.integers(2, 30),
    st.integers(20, 130), st.integers(20, 130), st.integers(20, 200), st.integers(20, 200), st.integers(0, 99),
    st.booleans(), st.booleans(),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
@pytest.mark.slow
def test_two_steps_with_cropped_padding(
    name: str, kind: str, channels: int, h: int, w: int, mid_height: int, mid_width: int,
    height: int, width: int, seed: int, centred: bool, padded: bool,
) -> None:  # fmt: skip
    scores = scores_of(kind, (channels, h, w), seed)
    valid = (3 * centred, 5 * centred, mid_height - 9, mid_width - 11) if padded else (0, 0, mid_height, mid_width)
    middle = F.interpolate(scores[None], (mid_height, mid_width), mode="bilinear", align_corners=False)[0]
    top, left, rows, columns = valid
    cropped = middle[:, top : top + rows, left : left + columns]
    expected = cropped.argmax(0) if (rows, columns) == (height, width) else naive(cropped, (height, width))
    view = whole(scores, (mid_height, mid_width), valid)
    found = implementation(name).merge([view], (height, width), False)
    assert torch.equal(found.long(), expected)


def slow_merge(views: list[View], size: tuple[int, int], probabilities: bool) -> Tensor:
    """As mmseg does it: every window padded to the whole canvas, a plane of counts, every view kept."""
    results = []
    for view in views:
        canvas = torch.zeros((1, view.scores.shape[1], *view.canvas))
        count = torch.zeros((1, 1, *view.canvas))
        for (top, left), window in zip(view.origins, view.scores, strict=True):
            up = F.interpolate(window[None], view.window, mode="bilinear", align_corners=False)
            margins = (left, view.canvas[1] - left - view.window[1], top, view.canvas[0] - top - view.window[0])
            canvas = canvas + F.pad(up, margins)
            count = count + F.pad(torch.ones((1, 1, *view.window)), margins)
        scores = canvas / count
        top, left, height, width = view.area
        scores = scores[:, :, top : top + height, left : left + width]
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        scores = scores.softmax(1) if probabilities and len(views) > 1 else scores
        results.append(scores.flip(-1) if view.flipped else scores)
    return sum(results[1:], results[0])[0] / len(results)


def random_views(seed: int) -> tuple[list[View], tuple[int, int]]:
    rng = np.random.default_rng(seed)
    kind = KINDS[seed % 3]
    views = []
    channels = int(rng.choice([3, 11, 150]))
    for number in range(int(rng.integers(1, 4))):
        window = (int(rng.integers(66, 90)), int(rng.integers(66, 90)))
        tops = [0, *([int(rng.integers(1, window[0] + 1))] if rng.random() < 0.6 else [])]
        lefts = [0, *([int(rng.integers(1, window[1] + 1))] if rng.random() < 0.6 else [])]
        origins = tuple((top, left) for top in tops for left in lefts)
        canvas = (tops[-1] + window[0], lefts[-1] + window[1])
        size = (-(-window[0] // 4), -(-window[1] // 4))
        scores = torch.stack([scores_of(kind, (channels, *size), 7 * seed + number + i) for i in range(len(origins))])
        valid = (1, 2, canvas[0] - 3, canvas[1] - 5) if rng.random() < 0.3 else None
        views.append(View(scores, origins, window, canvas, valid, bool(rng.random() < 0.5)))
    return views, (int(rng.integers(70, 160)), int(rng.integers(70, 160)))


@pytest.mark.parametrize("name", ["reference", "numba_cpu"])
@pytest.mark.parametrize("seed", range(30))
def test_merged_scores_equal_the_slow_way_in_every_bit(name: str, seed: int) -> None:
    views, size = random_views(seed)
    found = implementation(name).merge(views, size, False)
    assert torch.equal(found.long(), slow_merge(views, size, False).argmax(0))


@pytest.mark.parametrize("name", ["reference", "numba_cpu"])
@pytest.mark.parametrize("seed", range(15))
def test_merged_probabilities_equal_the_slow_way_but_for_ties(name: str, seed: int) -> None:
    """exp may differ in its last bits: labels differ only where the best two averages are within 1e-6."""
    views, size = random_views(seed)
    found = implementation(name).merge(views, size, True).long()
    average = slow_merge(views, size, True)
    gap = average.max(0).values - average.gather(0, found[None])[0]
    assert gap.max() < 1e-6
    if KINDS[seed % 3] == "random":
        assert (found != average.argmax(0)).float().mean() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["numba_cpu", TRITON])
def test_legacy_upsampling_equals_the_reference(name: str, kind: str) -> None:
    scores = on(name, scores_of(kind, (7, 7, 9), 3))
    size = (104, 136) if name == "numba_cpu" else (28, 36)  # the interpreter is slow
    for valid in (None, (0, 0, size[0] - 9, size[1] - 11)):
        view = View(scores[None], ((0, 0),), size, size, valid, legacy=True)
        with np.errstate(invalid="ignore", over="ignore"):
            found = implementation(name).merge([view], size, False)
        expected = reference.merge([view], size, False)
        assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["one_step", "two_steps", "padded"])
@pytest.mark.parametrize("kind", KINDS[:5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_equals_torch(mode: str, kind: str, dtype: torch.dtype) -> None:
    """In Triton's interpreter where there is no GPU."""
    made = implementation("triton_gpu")
    canvas = (72, 104) if mode == "one_step" else (56, 80)
    valid = (2, 3, 50, 70) if mode == "padded" else None
    # small, since the interpreter is slow, but not as small as where torch rounds otherwise
    scores = scores_of(kind, (7, 9, 13), 5)
    scores = on("triton_gpu", scores if kind != "huge" or dtype != torch.float16 else scores / 1e35).to(dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities make NaN on purpose
        found = made.merge([whole(scores, canvas, valid)], (72, 104), False)
    expected = reference.merge([whole(scores, canvas, valid)], (72, 104), False)
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


def test_infinite_scores_lose_where_the_size_stays() -> None:
    """As on CUDA, where torch copies a plane whose size stays; its CPU kernel makes NaN of infinities there."""
    scores = torch.randn(5, 16, 20, generator=torch.Generator().manual_seed(0))
    scores[2] = -torch.inf
    scores[1, 3:6] = torch.inf
    made: Any = implementation("triton_gpu")
    assert torch.equal(made.label_map(on("triton_gpu", scores), (16, 20)).cpu(), scores.argmax(0).to(torch.uint8))
    windows = View(on("triton_gpu", scores[None].repeat(2, 1, 1, 1)), ((0, 0), (0, 20)), (16, 20), (16, 40))
    found = made.merge([windows], (16, 40), False)
    assert torch.equal(found.cpu(), scores.argmax(0).to(torch.uint8).repeat(1, 2))


@pytest.mark.slow
def test_triton_is_checked_at_its_first_use() -> None:
    assert implementation("triton_gpu").agrees_with_torch()  # type: ignore[attr-defined]


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test know of no GPU that was tried; what other tests know takes half a minute in the interpreter."""
    made: Any = implementation("triton_gpu")
    for module, name in (
        (made, "_agrees"),
        (made, "_softmax_fault"),
        (made, "_sigmoid_fault"),
        (deformable, "compiled"),
    ):
        monkeypatch.setattr(module, name, cache(getattr(module, name).__wrapped__))


def test_every_gpu_is_tried(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    made: Any = implementation("triton_gpu")
    tried: list[tuple[str, int]] = []
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])

    def samples() -> Any:
        tried.append(("labels", current[0]))
        raise RuntimeError("no such GPU")

    monkeypatch.setattr(made, "_sample_views", samples)
    for gpu in (0, 1, 1):
        current[0] = gpu
        with pytest.raises(RuntimeError, match="no such GPU"):
            made.agrees_with_torch()
    assert sorted(set(tried)) == [("labels", 0), ("labels", 1)]
    tried.clear()
    monkeypatch.setattr(made, "_sample_views", lambda: tried.append(("others", current[0])) or [None] * 3)
    for gpu in (0, 1, 1):  # of this kernel alone a failure costs no other: torch does its work, and the run says so
        current[0] = gpu
        assert not made.softmax_agrees_with_torch()
        assert not made.sigmoid_agrees_with_torch()
        of_softmax, of_masks = made.left_to_torch().values()
        assert of_softmax.startswith("the kernel for the softmax of views fails (AttributeError: ")
        assert of_masks.startswith("the kernel for masks fails (")
    assert tried == [("others", 0), ("others", 0), ("others", 1), ("others", 1)]
    agrees: list[str] = []
    monkeypatch.setattr(deformable, "_agrees", lambda _, place, variant: bool(agrees.append(place)) or True)
    monkeypatch.setitem(sys.modules, "ade_harness.models.ops.deformable_triton", SimpleNamespace(aggregate_triton=None))
    for gpu in (3, 4, 4):
        assert deformable.compiled("cuda", gpu) == (None, None)
    assert agrees == ["cuda:3", "cuda:4"]


def of_triton(views: list[View]) -> list[View]:
    return [
        View(on("triton_gpu", v.scores), v.origins, v.window, v.canvas, v.valid, v.flipped, v.legacy) for v in views
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_triton_merges_windows_mirrors_and_scales_as_torch_does_in_every_bit(seed: int) -> None:
    views, size = random_views(seed)
    views = of_triton([View(v.scores[:, :11], *(getattr(v, n) for n in ("origins", "window", "canvas", "valid", "flipped")))
                       for v in views])  # fmt: skip
    assert torch.equal(implementation("triton_gpu").merge(views, size, False), reference.merge(views, size, False))


@pytest.mark.slow
def test_triton_averages_probabilities_but_for_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        implementation("triton_gpu"), "_softmax_fault", lambda _: None
    )  # what follows from one is tested below
    views = of_triton([whole(scores_of("random", (3, 9, 13), 1), (35, 40)),
                       whole(scores_of("random", (3, 12, 13), 2), (45, 50), flipped=True)])  # fmt: skip
    found = implementation("triton_gpu").merge(views, (40, 45), True)
    average = slow_merge(views, (40, 45), True)
    assert (average.max(0).values - average.gather(0, found[None].long())[0]).max() < 1e-6
    assert (found != average.argmax(0)).float().mean() < 1e-3


@pytest.mark.slow
def test_triton_leaves_probabilities_to_torch_where_the_softmax_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = implementation("triton_gpu")
    monkeypatch.setattr(made, "_softmax_fault", lambda _: "the softmax of views rounds differently from torch's here")
    monkeypatch.setattr(made, "agrees_with_torch", lambda: True)
    for choice in ("auto", "triton"):  # what was asked for by name is not done in silence either
        chosen, reason = kernels.selection(choice, "cuda")
        assert chosen is made
        assert "softmax of views" in str(reason)
    views = of_triton([whole(scores_of("random", (5, 9, 13), seed), (70, 80)) for seed in (1, 2)])
    monkeypatch.setattr(made, "_merge", None)
    assert torch.equal(made.merge(views, (70, 80), True), reference.merge(views, (70, 80), True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("canvas", "area", "size"),
    [((92, 124), (0, 0, 92, 124), (92, 124)), ((92, 124), (2, 3, 80, 101), (70, 113)), ((96, 120), (4, 6, 70, 90), (70, 90)),
     ((23, 31), (1, 2, 20, 25), (80, 91)), ((23, 31), (3, 0, 20, 31), (20, 31)), ((92, 124), (0, 0, 23, 31), (23, 31)),
     ((92, 124), (3, 5, 23, 31), (23, 31))],
)  # fmt: skip
def test_triton_enlarges_masks_as_torch_does_in_every_bit(
    dtype: torch.dtype, canvas: tuple[int, int], area: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    """The interpreter takes the sigmoid's exp from NumPy, and torch its own: there NumPy's is compared with."""
    made: Any = implementation("triton_gpu")
    masks = on("triton_gpu", 4 * scores_of("random", (19, 23, 31), 3)[None]).to(dtype)
    found = made._mask_probabilities(masks, canvas, area, size, torch.float32)
    if GPU:
        assert torch.equal(found, reference.mask_probabilities(masks, canvas, area, size, torch.float32))
        return
    top, left, height, width = area
    steps = [F.interpolate(masks, canvas, mode="bilinear") if canvas != (23, 31) else masks]
    steps.append(steps[0][:, :, top : top + height, left : left + width])
    steps.append(F.interpolate(steps[1], size, mode="bilinear") if size != (height, width) else steps[1])
    with np.errstate(over="ignore"):
        shares = 1 / (1 + np.exp(-steps[2][0].float().contiguous().numpy()))
    expected = torch.from_numpy(shares).to(dtype).float()
    assert found.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(found, expected)
    else:  # torch's CPU code rounds within a step; the interpreter cuts bits off where GPUs round (compile_ahead.py)
        assert (found - expected).abs().max() <= 4 * torch.finfo(dtype).eps
    rounded = made._mask_probabilities(masks, canvas, area, size, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - found).abs().max() <= torch.finfo(torch.bfloat16).eps


def test_the_masks_that_a_forward_gives_are_compared_before_the_first_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, which scores of every network are; bfloat16 are the sums of DINOv3's protocol."""
    made: Any = implementation("triton_gpu")
    tried = set()

    def equal(masks: torch.Tensor, canvas: Any, area: Any, size: Any, dtype: torch.dtype) -> torch.Tensor:
        tried.add((masks.dtype, dtype, area[2:] != size))
        return reference.mask_probabilities(masks, canvas, area, size, dtype)

    monkeypatch.setattr(made, "_mask_probabilities", equal)
    assert made._sigmoid_fault.__wrapped__(made._gpu()) is None
    results = (torch.float32, torch.bfloat16)
    assert tried == {(torch.float32, dtype, steps) for dtype in results for steps in (False, True)}


def test_triton_leaves_masks_to_torch_where_the_sigmoid_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = implementation("triton_gpu")
    monkeypatch.setattr(made, "_softmax_fault", lambda _: None)
    monkeypatch.setattr(made, "_sigmoid_fault", lambda _: "the sigmoid of masks rounds differently from torch's here")
    monkeypatch.setattr(made, "agrees_with_torch", lambda: True)
    chosen, reason = kernels.selection("auto", "cuda")
    assert chosen is made
    assert reason == "the sigmoid of masks rounds differently from torch's here, so plain torch enlarges masks"
    assert list(chosen.left_to_torch()) == ["enlarges masks"]
    assert implementation("reference").left_to_torch() == {}
    masks = on("triton_gpu", scores_of("random", (5, 9, 13), 1)[None])
    monkeypatch.setattr(made, "_mask_probabilities", None)
    given = (masks, (70, 80), (0, 0, 60, 70), (33, 44), torch.bfloat16)
    assert torch.equal(made.mask_probabilities(*given), reference.mask_probabilities(*given))


@pytest.mark.parametrize("name", ["reference", "numba_cpu", TRITON])
def test_the_share_of_invalid_scores_is_of_all_values(name: str) -> None:
    first, second = torch.zeros(2, 50, 40), torch.full((3, 1000), -torch.inf)
    made = implementation(name)
    assert made.invalid_share([on(name, first), on(name, second)]) == 0
    first[0, 3, :7] = torch.nan
    second[1, 5] = torch.nan
    assert float(made.invalid_share([on(name, first), on(name, second)])) == pytest.approx(8 / 7000, rel=1e-6)
    second[2, 7] = torch.inf
    assert float(made.invalid_share([on(name, first), on(name, second)])) == pytest.approx(9 / 7000, rel=1e-6)


@pytest.mark.parametrize("name", ["numba_cpu", TRITON])
@pytest.mark.parametrize("placement", [
    None, Placement((20, 30), flipped=True), Placement((24, 30)), Placement((20, 33), (0, 2), True, 0.0),
    Placement((27, 31), (3, 1), False, 114.0),
])  # fmt: skip
def test_pixels_are_placed_alike(name: str, placement: Placement | None) -> None:
    pixels = on(name, torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8))
    for reverse, largest in ((False, 255.0), (True, 1.0)):
        statistics = PixelStatistics((0.485, 4.56, 0.406), (0.229, 0.224, 57.0), reverse, largest)
        found = implementation(name).normalise(pixels, statistics, placement)
        assert torch.equal(found, reference.normalise(pixels, statistics, placement))


@pytest.mark.parametrize("name", ["reference", "numba_cpu", TRITON])
def test_half_precision_scores_are_compared_in_float32(name: str) -> None:
    scores = torch.randn(5, 9, 11, generator=torch.Generator().manual_seed(1))
    made = implementation(name)
    for dtype in (torch.bfloat16, torch.float16):
        half = on(name, scores.to(dtype))
        assert torch.equal(made.label_map(half, (72, 88)), made.label_map(half.float(), (72, 88)))


@pytest.mark.parametrize("name", ["reference", "numba_cpu", TRITON])
def test_more_than_256_channels(name: str) -> None:
    scores = on(name, torch.randn(300, 6, 7))
    found = implementation(name).label_map(scores, (6, 7))
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), scores.argmax(0))


@pytest.mark.parametrize("name", ["reference", "numba_cpu", TRITON])
@pytest.mark.parametrize(("classes", "seed"), [*((150, seed) for seed in range(5)), (1, 0), (2, 1), (19, 2), (255, 3)])
def test_count_equals_a_loop(name: str, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    last = classes - 1
    target = rng.choice(np.array([0, last // 2, last, 255], np.uint8), (9, 11))
    labels = rng.choice(np.array([0, last // 2, last, min(classes, 255), (classes + 255) // 2, 255], np.uint8), (9, 11))
    expected = np.zeros((classes, classes + 1), np.int64)
    for t, p in zip(target.flat, labels.flat, strict=True):
        if t != 255:
            expected[t, min(p, classes)] += 1
    found = implementation(name).count(on(name, torch.from_numpy(labels)), on(name, torch.from_numpy(target)), classes)
    assert found.dtype == torch.int64
    assert np.array_equal(found.cpu().numpy(), expected)


@pytest.mark.parametrize("statistics", [
    PixelStatistics((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    PixelStatistics((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), reverse_channels=True),
    PixelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), max_value=1.0),
    PixelStatistics((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), max_value=2.0),
])  # fmt: skip
def test_pixels_are_normalised_alike(statistics: PixelStatistics) -> None:
    pixels = torch.randint(0, 256, (31, 17, 3), dtype=torch.uint8)
    order = [2, 1, 0] if statistics.reverse_channels else [0, 1, 2]
    values = pixels[..., order].permute(2, 0, 1).float()
    values = values / (255 / statistics.max_value)
    expected = (values - torch.tensor(statistics.mean)[:, None, None]) / torch.tensor(statistics.std)[:, None, None]
    for name in ("reference", "numba_cpu"):
        found = implementation(name).normalise(pixels, statistics)
        assert torch.equal(found, expected)
        assert found.is_contiguous()  # or a network may choose other convolutions


def test_a_division_by_a_number_is_rounded_as_on_cuda() -> None:
    """Torch multiplies there by the inverse of float32."""
    made = implementation("triton_gpu")
    scales = [255 / most for most in (1.0, 2.0, 7.0, 9.0, 14.0, 127.5)]
    found = [made.reciprocal(scale) for scale in scales]
    assert found == [(torch.tensor(1.0) / torch.tensor(scale)).item() for scale in scales]
    assert found != [float(np.float32(1 / scale)) for scale in scales]


def test_axis_tables_rebuild_torch_interpolation() -> None:
    """One axis at a time: the tables give torch's values."""
    for old, new in ((7, 30), (30, 7), (128, 683), (171, 512), (5, 200)):
        low, high, w_low, w_high = axis(old, new)
        line = torch.randn(old, generator=torch.Generator().manual_seed(old)).double()
        expected = F.interpolate(line[None, None].float(), new, mode="linear", align_corners=False)[0, 0]
        found = line[low.astype(np.int64)] * torch.from_numpy(w_low) + line[high.astype(np.int64)] * torch.from_numpy(
            w_high
        )
        assert torch.allclose(found.float(), expected, atol=1e-6, rtol=0)


def test_choices() -> None:
    assert kernels.select("torch", "cpu") is reference
    assert kernels.select("auto", "cpu") is implementation("numba_cpu")
    with pytest.raises(HarnessError, match="runtime.kernels=triton: works on cuda only"):
        kernels.select("triton", "cpu")


def test_a_machine_that_rounds_otherwise_gets_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ade_harness.kernels.numba_cpu.agrees_with_torch", lambda: False)
    assert kernels.select("auto", "cpu") is reference
    with pytest.raises(HarnessError, match="rounds differently"):
        kernels.select("numba", "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["order", "legacy"])
def test_the_gpus_comparison_notices_another_order_of_operations(
    other: str, monkeypatch: pytest.MonkeyPatch, untried: None
) -> None:
    made: Any = implementation("triton_gpu")
    merge = made._merge

    def mixed(views: Any, size: Any, probabilities: bool) -> Any:
        if other == "legacy" and not any(view.legacy for view in views):
            return merge(views, size, probabilities)
        shifted = [
            View(v.scores.flip(3), v.origins, v.window, v.canvas, v.valid, not v.flipped, v.legacy) for v in views
        ]
        found = merge(views, size, probabilities)
        return found if len(views[0].origins) > 1 else merge(shifted, size, probabilities)  # columns from the right

    monkeypatch.setattr(made, "_merge", mixed)
    assert not made.agrees_with_torch()


def test_the_comparison_notices_another_order_of_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = implementation("numba_cpu")
    original: Callable[..., Any] = made.axis

    def shifted(*arguments: Any) -> Any:
        low, high, w_low, w_high = original(*arguments)
        return type(original(*arguments))(low, high, np.nextafter(w_low, np.float32(2)), w_high)

    monkeypatch.setattr(made, "axis", shifted)
    assert not made.agrees_with_torch.__wrapped__()


def test_a_fallback_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.selection("auto", "cpu")[1] is None
    assert kernels.selection("torch", "cpu") == (reference, None)  # asked for: no fallback
    real = importlib.import_module

    def without_compiler(name: str) -> Any:
        if name.endswith("triton_gpu"):
            raise RuntimeError("Failed to find C compiler\nmore lines")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_compiler)
    assert kernels.selection("auto", "cuda") == (
        reference,
        "plain torch is used, which is slower: RuntimeError: Failed to find C compiler",
    )
    with pytest.raises(HarnessError, match=r"runtime\.kernels=triton: cannot be used \(RuntimeError: Failed to find C"):
        kernels.select("triton", "cuda")
    monkeypatch.undo()
    kernels.unavailable_reason.cache_clear()
    monkeypatch.setattr(implementation("numba_cpu"), "agrees_with_torch", lambda: False)
    chosen, reason = kernels.selection("auto", "cpu")
    assert chosen is reference
    assert str(reason).endswith("it rounds differently from torch on this machine")
    assert kernels.name_of(reference) == "reference"


def test_what_cannot_be_used_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt would start a compiler, for each image; and a later success would change the kernels midway."""
    tried = []

    def broken() -> bool:
        tried.append(1)
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(implementation("numba_cpu"), "agrees_with_torch", broken)
    for _ in range(3):
        chosen, reason = kernels.selection("auto", "cpu")
        assert chosen is reference
        assert "Failed to find C compiler" in str(reason)
    assert len(tried) == 1


def test_a_gpu_without_memory_is_no_reason_for_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB\nmore")

    monkeypatch.setattr(implementation("numba_cpu"), "agrees_with_torch", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 2**35))
    for _ in range(2):
        with pytest.raises(HarnessError, match=r"too little to begin with \(OutOfMemoryError: CUDA out of memory"):
            kernels.selection("auto", "cpu")
    broken = implementation("numba_cpu")
    monkeypatch.setattr(importlib, "import_module", lambda _: broken)
    with pytest.raises(HarnessError, match=r"GPU 3 has 0\.5 of 32\.0 GiB free, too little"):
        kernels.unavailable_reason("triton_gpu", 3)


def test_a_gpu_takes_all_channels_of_an_ordinary_image_at_once() -> None:
    assert reference.channels_at_once("cpu", 512 * 683) == 4
    assert reference.channels_at_once("cuda", 512 * 683) >= 150
    assert 4 <= reference.channels_at_once("cuda", 4000 * 6000) < 150  # a budget of memory, not a number of channels


def test_the_interpreters_fma_rounds_once() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(20_000).astype(np.float32) for _ in range(2))
    z = (-x * y * (1 + rng.integers(-3, 4, 20_000) * np.float32(2**-23))).astype(np.float32)  # near cancellation
    z[::3] = rng.standard_normal(len(z[::3])).astype(np.float32) * np.float32(2.0) ** rng.integers(-40, 40, len(z[::3]))
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
    found = fused(x, y, z)
    for value, result in zip(exact, found, strict=True):
        below, above = (np.nextafter(result, np.float32(side)) for side in (-np.inf, np.inf))
        distance = abs(Fraction(float(result)) - value)
        assert distance <= min(abs(Fraction(float(below)) - value), abs(Fraction(float(above)) - value))
    assert not np.array_equal(found, (x * y + z))  # two roundings would differ
    infinite = np.array([np.inf, -np.inf, np.nan], np.float32)
    assert np.array_equal(fused(infinite, np.ones(3), np.zeros(3)), infinite, equal_nan=True)


@pytest.mark.parametrize("views", [1, 2])
def test_triton_finds_scores_beyond_the_numbers_of_32_bits(views: int) -> None:
    """Of 150 planes of 15 million pixels; memory is taken where something was written, so the file of zeros is small.

    Offsets of 32 bits would be below the first plane: an illegal address.
    """
    pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to test the GPU kernels")
    from ade_harness.kernels import triton_gpu

    scores = torch.from_numpy(np.zeros((150, 4000, 3800), np.float16))
    assert 149 * 4000 * 3800 > 2**31
    scores[149, -600:, -600:] = 1
    scores[148, :600, :600] = 1
    found = triton_gpu.merge([whole(scores, (8, 8))] * views, (8, 8), False)
    assert found[0, 0] == 148
    assert found[7, 7] == 149
    assert int((found > 0).sum()) == 2


_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
          torch.int64: "*i64", int: "i32", float: "fp32"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_launchers_pass_what_is_compiled_ahead(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of all arguments, and options: what compile_ahead.py compiles is written down beside the launchers."""
    made: Any = implementation("triton_gpu")
    from ade_harness.models.ops import deformable_triton
    from tests.kernels.compile_ahead import KERNELS

    launched: dict[str, list[tuple[dict[str, str], dict[str, Any]]]] = {}

    class Recorded:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any, **options: Any) -> Any:
                names = self.kernel.arg_names
                types = {n: _TYPES[getattr(a, "dtype", type(a))] for n, a in zip(names, arguments, strict=False)}
                launched.setdefault(self.name, []).append((types, {k: v for k, v in options.items() if k not in names}))
                return self.kernel[grid](*arguments, **options)

            return launch

    functions = {kernel.function.__name__: kernel.function for kernel in KERNELS.values()}
    for name, function in functions.items():
        module: Any = deformable_triton if name == "_aggregate" else made.triton_jit
        monkeypatch.setattr(module, name, Recorded(function, name))
    scores = on("triton_gpu", torch.randn(1, 5, 6, 8)).to(dtype)
    labels = made.merge([whole(scores[0], (12, 16))], (12, 16), False)
    made._merge([whole(scores[0], (12, 16)), whole(scores[0], (12, 16), flipped=True)], (12, 16), True)
    usual = dtype == torch.float32  # as the forward gives scores and masks; sums over queries may be in bfloat16
    if usual:
        made.merge([whole(on("triton_gpu", torch.randn(300, 3, 4)), (6, 8))], (6, 8), False)
    made.count(labels, labels, 5)
    made.invalid_share([scores])
    for out in (torch.float32, torch.bfloat16) if usual else (torch.float32,):
        made._mask_probabilities(scores, (12, 16), (0, 0, 12, 16), (12, 16), out)
    made.normalise(on("triton_gpu", torch.zeros(4, 4, 3, dtype=torch.uint8)), PixelStatistics((1.0,) * 3, (1.0,) * 3))
    for width in (32, 128):
        values = on("triton_gpu", torch.randn(1, 12, 2, width)).to(dtype)
        places, weights = (on("triton_gpu", torch.rand(1, 5, 2, 4, *last)) for last in ((2,), ()))
        deformable_triton.aggregate_triton(values, [(3, 4)], places, weights)
    assert launched.keys() == functions.keys()
    for name, calls in launched.items():
        listed = [kernel for kernel in KERNELS.values() if kernel.function is functions[name]]
        options = [kernel.options for kernel in listed]
        given = _TYPES[dtype].removeprefix("*")
        types = [{n: t.format(dtype=given) for n, t in k.types.items()} for k in listed if given in k.dtypes]
        for passed, chosen in calls:
            assert chosen in options, name
            if "norms" in passed and passed["norms"] == passed["first"]:  # of no softmax: the scores are passed
                passed["norms"] = "*fp32"
            assert any(passed.items() <= known.items() for known in types), (name, passed)


class Labels(torch.nn.Module):
    """What a user may export or compile: a head, its label map and the counts."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Any = implementation("triton_gpu")

    def forward(self, scores: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = self.made
        labels = made.merge([whole(scores, (24, 32)), whole(scores.flip(2), (24, 32), flipped=True)], (24, 32), False)
        return labels, made.count(labels, target, 5), made.invalid_share([scores])


@pytest.mark.parametrize("way", ["export", "eager", "aot_eager"])
def test_the_gpus_operators_can_be_exported_and_compiled(way: str) -> None:
    """Each is one closed node of the graph, with the shapes of its results; values are those of a plain call."""
    scores = on("triton_gpu", torch.randn(5, 12, 16, generator=torch.Generator().manual_seed(0)))
    target = on("triton_gpu", torch.randint(0, 5, (24, 32), generator=torch.Generator().manual_seed(1)).to(torch.uint8))
    expected = Labels()(scores, target)
    if way == "export":
        program = torch.export.export(Labels(), (scores, target))
        called = [str(node.target) for node in program.graph.nodes if "ade_harness" in str(node.target)]
        assert called == [f"ade_harness.{name}.default" for name in ("label_views", "count_pixels", "count_invalid")]
        found = program.module()(scores, target)
    else:
        found = torch.compile(Labels(), backend=way, fullgraph=True)(scores, target)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype


def test_the_operators_are_what_they_say_to_torch() -> None:
    """Schemas, shapes without values, nothing written to, no alias: torch's own check of operators."""
    made: Any = implementation("triton_gpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.randn(1, 5, 6, 8, device=device)
    geometry = made._geometry((((1, 5, 6, 8), ((0, 0),), (6, 8), (0, 0, 6, 8), False, False),))
    labels = torch.zeros(6, 8, dtype=torch.uint8, device=device)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    operators = torch.ops.ade_harness
    for operator, arguments in (
        (operators.label_views, ([scores], geometry, [6, 8], False, False, True)),
        (operators.count_pixels, (labels, labels, 5)),
        (operators.count_invalid, ([scores],)),
        (operators.enlarge_masks, (scores, [12, 16], [1, 2, 10, 12], [9, 9], torch.bfloat16)),
        (operators.normalise_pixels, (torch.zeros(4, 4, 3, dtype=torch.uint8, device=device),
                                      torch.ones(6, device=device), [4, 4, 0, 0, 0, 0, 0], 1.0, 0.0)),
    ):  # fmt: skip
        assert set(torch.library.opcheck(operator, arguments, test_utils=checks).values()) == {"SUCCESS"}
