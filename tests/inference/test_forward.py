"""Batches: what shares a forward, what happens when memory is short, precision and compilation."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ade_harness as ade
from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.evaluation.data import group_images
from ade_harness.inference.forward import BatchedForward, arithmetic_of
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.plan import uncovered, window_grid
from ade_harness.inference.predictor import Prediction
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import reference
from ade_harness.models.formats.demo import load_demo_network
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.ops.deformable import DeformableAttention
from ade_harness.models.outputs import LabelMap

CPU = torch.device("cpu")
SLIDE = ["inference=mmseg_slide_512", "inference.resize.side=96", "inference.resize.max_side=400", "inference.window.crop=64", "inference.window.stride=43"]  # fmt: skip


class Recorder(nn.Module):
    """The demo network, with a memory limit and a memory of its batches."""

    def __init__(self, maximum: int = 1000, error: type[Exception] = torch.OutOfMemoryError, text: str = "CUDA out of memory. Tried") -> None:  # fmt: skip
        super().__init__()
        self.network = load_demo_network()
        self.batches: list[tuple[int, ...]] = []
        self.maximum, self.error, self.text = maximum, error, text

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(tuple(images.shape))
        if images.shape[0] > self.maximum:
            raise self.error(self.text)
        scores: torch.Tensor = self.network(images)
        return scores


def predictor(module: nn.Module, *overrides: str, **facts: Any) -> NetworkPredictor:
    cfg = compose_config(["model=custom", "model._target_=x.y", "dataset=ade20k", "dataset.root=.", *overrides])
    model = LoadedModel(module.eval(), "random", tuple(cfg.model.input.mean), tuple(cfg.model.input.std), **facts)
    return NetworkPredictor(model, cfg.inference, cfg.model)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(small.repeat(8, 0).repeat(8, 1)[:height, :width])


def predict(made: NetworkPredictor, *images: np.ndarray) -> list[Prediction]:
    batch = [made.prepare(f"image{i}", image) for i, image in enumerate(images)]
    return made.predict(batch, CPU, Stopwatch(CPU))


def test_windows_and_mirrors_of_one_size_share_a_forward() -> None:
    module = Recorder()
    predict(predictor(module, *SLIDE, "inference.tta.flip=true", "inference.batch=100"), picture(96, 128))
    assert module.batches == [(12, 3, 64, 64)]  # 2 x 3 windows, plain and mirrored
    module = Recorder()
    predict(predictor(module, *SLIDE, "inference.tta.flip=true", "inference.batch=5"), picture(96, 128))
    assert [b[0] for b in module.batches] == [5, 5, 2]


def test_the_batch_does_not_change_the_labels() -> None:
    """On this network and machine; float sums of other networks may depend on it in the last bit."""
    found = [
        predict(predictor(Recorder(), *SLIDE, f"inference.batch={batch}"), picture(96, 128))[0].labels
        for batch in (1, 4, 100)
    ]
    assert (found[0] != found[1]).float().mean() < 1e-3
    assert (found[0] != found[2]).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 1 GiB"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_short_memory_halves_the_batch_and_the_run_says_so(error: type[Exception], text: str) -> None:
    module = Recorder(2, error, text)
    made = predictor(module, *SLIDE, "inference.batch=6")
    found = predict(made, picture(96, 128))[0].labels
    assert [b[0] for b in module.batches] == [6, 3, 1, 1, 1, 1, 1, 1]  # the image is redone from its first window
    one_by_one = predict(predictor(Recorder(), *SLIDE, "inference.batch=1"), picture(96, 128))[0].labels
    assert torch.equal(found, one_by_one)
    assert "memory was short 2 times" in made.notes()[0]
    predict(made, picture(96, 128))
    assert module.batches[8][0] == 6  # the next image does not depend on what happened to this one


def test_memory_that_torch_holds_is_given_back_before_anything_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN and cuBLAS find none where torch's own cache holds it: the same batch again gives the same bits."""

    class OnceShort(Recorder):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.short_once = not getattr(self, "short_once", False)
            if self.short_once:
                raise RuntimeError("CUDNN_STATUS_ALLOC_FAILED")
            return super().forward(images)

    emptied: list[str] = []

    def empty_cache(device: torch.device) -> bool:
        emptied.append(device.type)
        return True

    monkeypatch.setattr("ade_harness.inference.forward._empty_cache", empty_cache)
    module = OnceShort()
    made = predictor(module, *SLIDE, "inference.batch=6")
    predict(made, picture(96, 128))
    assert [b[0] for b in module.batches] == [6]
    assert emptied == ["cpu"]
    assert made.notes() == []
    halves = predictor(Recorder(2, torch.OutOfMemoryError, "CUDA out of memory"), *SLIDE, "inference.batch=6")
    predict(halves, picture(96, 128))
    assert halves.forward.fits == 1  # once only


class Held(Recorder):
    """Remembers, without holding it, what each forward computes with."""

    def __init__(self, maximum: int) -> None:
        super().__init__(maximum)
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        activations = images + 1
        self.alive.append(weakref.ref(activations))
        return super().forward(activations)


@pytest.mark.parametrize("maximum", [2, 0])
def test_nothing_of_a_forward_that_failed_is_held(maximum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while memory is given back, nor once an image has failed: Python's collector comes at any time."""
    module, held = Held(maximum), []

    def empty_cache(device: torch.device) -> bool:
        held.append(sum(ref() is not None for ref in module.alive))
        return True

    monkeypatch.setattr("ade_harness.inference.forward._empty_cache", empty_cache)
    made = predictor(module, *SLIDE, "inference.batch=6")
    gc.disable()
    try:
        with pytest.raises(HarnessError, match="out of memory with one input") if maximum == 0 else nullcontext():
            predict(made, picture(96, 128))
        assert len(held) >= 2
        assert not any(held)
        assert not any(ref() is not None for ref in module.alive)
    finally:
        gc.enable()


def test_a_compiled_network_computes_no_more_copies_than_a_group_has_inputs() -> None:
    gpu = torch.device("cuda")  # where up to 8 share a forward
    made = predictor(load_demo_network(), *SLIDE, "inference.compile=eager")
    made.check({"a": (96, 64), "b": (96, 64)})
    assert made.forward.needed == made.forward.batch(gpu) == 6  # 144x96 after resizing: two more would be copies
    assert predictor(load_demo_network(), *SLIDE).forward.batch(gpu) == 8
    flipped = predictor(
        load_demo_network(), *SLIDE, "inference.compile=eager", "inference.tta.flip=true", "inference.images=2"
    )
    flipped.check({"a": (96, 64)})
    assert flipped.forward.batch(gpu) == 8


def test_no_memory_for_one_input() -> None:
    made = predictor(Recorder(0), *SLIDE)
    with pytest.raises(HarnessError, match=r"image0: out of memory with one input of 64x64 .*inference.precision=bf16"):
        predict(made, picture(96, 128))


def test_images_of_equal_size_may_share_a_forward() -> None:
    module = Recorder()
    made = predictor(module, "inference=original_size", "inference.images=2")
    images = [picture(64, 80, seed) for seed in range(2)]
    both = predict(made, *images)
    assert module.batches == [(2, 3, 64, 80)]
    for image, together in zip(images, both, strict=True):
        alone = predict(predictor(Recorder(), "inference=original_size"), image)[0].labels
        assert (alone != together.labels).float().mean() < 1e-3


def test_groups_depend_on_sizes_and_order_alone() -> None:
    sizes = [(64, 80), (80, 64), (64, 80), (64, 80), (80, 64), (64, 80)]
    one = predictor(Recorder(), "inference=original_size")
    two = predictor(Recorder(), "inference=original_size", "inference.images=2")
    assert group_images(sizes, one, 1) == [[0], [1], [2], [3], [4], [5]]
    assert group_images(sizes, two, 2) == [[0, 2], [1, 4], [3, 5]]
    # two originals that the protocol makes equal, and that may then be labelled at their own sizes
    same = predictor(Recorder(), "inference=mmseg_whole_512", "inference.resize.side=64", "inference.images=2")
    assert group_images([(128, 160), (64, 80)], same, 2) == [[0, 1]]
    assert [p.labels.shape for p in predict(same, picture(128, 160), picture(64, 80))] == [(128, 160), (64, 80)]


def test_a_file_with_a_fixed_batch_is_filled_up() -> None:
    module = Recorder()
    made = predictor(module, *SLIDE, fixed_batch=4)
    found = predict(made, picture(96, 128))[0].labels
    assert [b[0] for b in module.batches] == [4, 4]  # 6 windows and 2 copies
    assert torch.equal(found, predict(predictor(Recorder(), *SLIDE, "inference.batch=4"), picture(96, 128))[0].labels)


@pytest.mark.parametrize(("precision", "maximum"), [("tf32", 0.0), ("bf16", 0.2), ("fp16", 0.05)])
def test_lower_precision_changes_few_labels(precision: str, maximum: float) -> None:
    full = predict(predictor(Recorder(), "inference=original_size"), picture(128, 160))[0].labels
    low = predict(
        predictor(Recorder(), "inference=original_size", f"inference.precision={precision}"), picture(128, 160)
    )
    share = (low[0].labels != full).float().mean().item()
    assert share <= maximum
    assert precision == "tf32" or share > 0  # it was not ignored; TF32 is a GPU's


@pytest.mark.slow
def test_channels_last_and_compiled_networks_give_the_labels() -> None:
    full = predict(predictor(Recorder(), "inference=original_size"), picture(64, 80))[0].labels
    module = Recorder()
    last = predict(predictor(module, "inference=original_size", "inference.channels_last=true"), picture(64, 80))
    assert (last[0].labels != full).float().mean() < 1e-3
    weight = module.network.body[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    # aot_eager traces as inductor does but needs no compiler
    compiled = predictor(load_demo_network(), "inference=original_size", "inference.compile=aot_eager")
    assert (predict(compiled, picture(64, 80))[0].labels != full).float().mean() < 1e-3


def test_windows_of_images_of_different_sizes_share_a_forward() -> None:
    arguments = (*SLIDE, "inference.window.crop=64", "inference.window.stride=43", "inference.batch=100")
    together = predictor(module := Recorder(), *arguments, "inference.images=3")
    sizes = [(96, 128), (64, 300), (70, 64)]
    assert len({together.group_key(size) for size in sizes}) == 1
    images = [picture(*size) for size in sizes]
    prepared = [together.prepare(str(number), image) for number, image in enumerate(images)]
    found = together.predict(prepared, CPU, Stopwatch(CPU))
    assert len(module.batches) == 1
    for image, prediction in zip(images, found, strict=True):
        alone = predict(predictor(Recorder(), *arguments), image)[0].labels
        assert (alone != prediction.labels).float().mean() < 1e-3  # other batches may round otherwise


@pytest.mark.slow
def test_inductor_chooses_no_sums_by_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    compiling = torch.compile

    def compile_(module: Any, **options: Any) -> Any:
        asked.append(options)
        compiling(module, **options)  # refuses an option that it does not know; nothing is compiled before a call
        return module

    monkeypatch.setattr(torch, "compile", compile_)
    for backend in ("inductor", "aot_eager"):
        made = predictor(load_demo_network(), "inference=original_size", f"inference.compile={backend}")
        predict(made, picture(64, 80))
    assert [options["options"] for options in asked] == [{"deterministic": True}, None]


def test_a_compiled_network_is_not_compiled_for_a_second_size() -> None:
    segmenter = ade.load_model("demo", options={"inference.compile": "eager"})
    first = segmenter(picture(64, 64))
    assert np.array_equal(segmenter(picture(64, 64)), first)
    with pytest.raises(HarnessError, match=r"has compiled the network for a batch of \[1, 3, 64, 64\], this one is"):
        segmenter(picture(96, 64))


def test_a_shortage_that_a_library_reports_by_an_error_of_its_own_is_one() -> None:
    class FailError(Exception):
        """As onnxruntime's, which are no RuntimeErrors."""

    made = predictor(Recorder(2, FailError, "Failed to allocate memory for requested buffer of size 9"), *SLIDE)
    made.forward.cfg.batch = 6
    predict(made, picture(96, 128))
    assert made.forward.fits is not None


def test_no_value_of_a_label_map_is_read_beside_the_cpu() -> None:
    labels = torch.zeros(2, 5, 7, dtype=torch.int64)
    assert LabelMap(labels.to("meta")).as_scores(19, "image0").shape == (2, 19, 5, 7)
    scores = LabelMap(labels + 3).as_scores(19, "image0")
    assert torch.equal(scores.argmax(1), labels + 3)
    assert scores.sum() == labels.numel()


def test_scores_are_enlarged_by_the_native_kernel_whatever_the_caller_has_set() -> None:
    """torch's global switch of determinism puts a decomposition in its place on CUDA, with other bits."""
    called: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True)
    try:
        with Watch():
            reference._resize(torch.empty(1, 3, 4, 5, device="meta"), (8, 9))
    finally:
        torch.use_deterministic_algorithms(False)
    assert called[-1] == "upsample_bilinear2d.default"
    assert len(called) == 2  # the other is the input


@pytest.mark.parametrize("batch", [1, 4])
def test_a_compiled_network_has_one_graph_whatever_comes_first(batch: int) -> None:
    """Another shape would be compiled by what was seen before, and give an image other last bits."""
    shapes: list[tuple[int, ...]] = []

    def backend(graph: Any, inputs: Any) -> Any:
        shapes.append(tuple(inputs[-1].shape))
        return graph.forward

    arguments = ("inference=original_size", "inference.compile=eager")
    made = predictor(load_demo_network(), *arguments)
    with pytest.raises(
        HarnessError, match=r"inference.compile=eager: needs inputs of one size, .* a has 80x64, b 96x64"
    ):
        made.check({"a": (64, 80), "b": (64, 96)})
    made.check({"a": (64, 80), "b": (64, 80)})
    slides = predictor(load_demo_network(), *SLIDE, "inference.window.crop=64", "inference.window.stride=43",
                       "inference.compile=eager", f"inference.batch={batch}")  # fmt: skip
    slides.check({"a": (96, 128), "b": (64, 300)})
    slides.forward._module = torch.compile(slides.network, backend=backend, dynamic=False)
    for size in ((96, 128), (64, 300), (64, 64)):
        predict(slides, picture(*size))
    assert len(shapes) == 1


# grids, against the rules written out


@pytest.mark.parametrize(("height", "width", "crop", "stride"), [(512, 683, 512, 341), (96, 128, 64, 43), (50, 200, 64, 43), (64, 64, 64, 43), (65, 300, 64, 64), (640, 1000, 640, 426)])  # fmt: skip
def test_slide_grid(height: int, width: int, crop: int, stride: int) -> None:
    made = predictor(Recorder(), *SLIDE, f"inference.window.crop={crop}", f"inference.window.stride={stride}")
    window, origins = window_grid((height, width), "slide", made.cfg.window)
    expected = []
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            expected.append((max(bottom - crop, 0), max(right - crop, 0)))
    assert list(origins) == expected
    assert window == (min(crop, height), min(crop, width))


@pytest.mark.parametrize("long", [512, 513, 700, 1024, 1025, 1500, 8000])
def test_windows_along_the_long_side_cover_it(long: int) -> None:
    made = predictor(Recorder(), "inference=eomt_512")
    for size in ((512, long), (long, 512)):
        window, origins = window_grid(size, "long_side", made.cfg.window)
        assert window == (512, 512)
        starts = sorted(max(o) for o in origins)
        assert starts[0] == 0
        assert starts[-1] + 512 >= long - 1
        assert all(b - a <= 512 for a, b in itertools.pairwise(starts))


# what cannot work is reported before the first image


def test_pixels_that_no_window_covers() -> None:
    """DINOv3's window shrinks with small images, its stride does not."""
    made = predictor(Recorder(), "inference=dinov3_slide_512", "inference.resize.side=20", "inference.window.crop=64", "inference.window.stride=43")  # fmt: skip
    with pytest.raises(HarnessError, match=r"a: with inference=dinov3_slide_512, \d+ rows or columns .* smaller inference.window.stride"):  # fmt: skip
        made.check({"a": (20, 62)})
    made.check({"a": (20, 30)})


def test_windows_below_the_stride_of_the_model() -> None:
    made = predictor(
        Recorder(), *SLIDE, "model.input.stride=32", "inference.window.crop=16", "inference.window.stride=8"
    )
    with pytest.raises(HarnessError, match="network input of 16x16 .* smaller than the model's stride of 32"):
        made.check({"a": (96, 128)})


def test_windows_of_another_size_than_a_fixed_input() -> None:
    with pytest.raises(HarnessError, match="takes 512x512 .* makes 64x64"):
        predictor(Recorder(), *SLIDE, fixed_size=(512, 512)).check({"a": (96, 128)})


@pytest.mark.slow
def test_every_canvas_of_the_published_protocols_is_covered() -> None:
    from ade_harness.data.ade20k import validation_sizes
    from ade_harness.inference.plan import plan_views

    sizes = sorted(set(validation_sizes().values()))[::7]
    for name in ("mmseg_slide_512_ms", "beit_slide_640_ms", "dinov2_slide_640_ms", "dinov3_slide_896_ms", "vit_adapter_896_ms", "eomt_512", "detectron2_640_ms", "oneformer_640_ms", "internimage_896_ms"):  # fmt: skip
        made = predictor(Recorder(), f"inference={name}")
        for size in sizes:
            assert all(uncovered(plan) == 0 for plan in plan_views(size, made.cfg)), (name, size)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inference.mode=slide"], "inference.window.crop=None: mode=slide needs"),
        (["inference.mode=slide", "inference.window.crop=64"], "inference.window.stride=None"),
        (["inference.mode=slide", "inference.window.crop=64", "inference.window.stride=65"], "is over inference.window.crop=64, so pixels"),
        (["inference.tta.scales=[1,1e9]"], r"inference.tta.scales\[1\]=1e\+09: expected more than 0 and at most 16"),
        (["inference.mode=tiles"], "inference.mode=tiles: unknown value, expected one of whole, slide, long_side"),
        (["inference.tta.scales=[]"], "expected one number or more, each more than 0"),
        (["inference.tta.scales=[1.0,0.0]"], r"inference.tta.scales\[1\]=0: expected more than 0"),
        (["inference.tta.scales=[-1.0]"], r"inference.tta.scales\[0\]=-1: expected more than 0"),
        (["inference=fit_input", "inference.resize.height=384"], "inference.resize.width=None: rule=fit needs height and width"),
        (["inference=fit_input", "inference.resize.width=384"], "inference.resize.height=None: rule=fit needs height and width"),
        (["inference.tta.sides=[512]"], "the protocol's rule is fit. Use tta.scales"),
        (["inference=mmseg_whole_512", "inference.tta.sides=[0]"], r"inference.tta.sides\[0\]=0: expected 1 to 16,384"),
        (["inference=mlperf_deeplab", "inference.tta.flip=true"], "labels cannot be averaged"),
        (["inference=oneformer_640", "inference.mode=slide", "inference.window.crop=64", "inference.window.stride=64"], "masks.resolution: needs inference.mode=whole"),
        (["inference=mmseg_slide_512", "inference.output.upsample=one_step"], "windows are put together"),
        (["inference.precision=int8"], "expected one of fp32, tf32, bf16, fp16"),
        (["inference.batch=0"], "inference.batch=0: expected 1 to 4,096"),
        (["inference.resize.antialias=true"], "antialias=true: is for backend=torch; pillow always has it"),
        (["inference=dinov3_slide_512", "inference.resize.max_side=900"], "has no cap"),
        (["inference.tta.flip=true"], "has one size only"),
    ],
)  # fmt: skip
def test_protocols_that_make_no_sense(overrides: list[str], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        predictor(Recorder(), *overrides)


def test_exported_files_keep_their_precision() -> None:
    with pytest.raises(HarnessError, match="a model of kind onnx runs as it was exported"):
        compose_config(
            ["model=onnx", "model.path=x.onnx", "dataset=ade20k", "dataset.root=.", "inference.precision=bf16"]
        )


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_precision_holds_after_a_model_used_the_newer_switches(precision: str) -> None:
    """torch then refuses to read the old ones; what the forward computes with is the protocol's either way."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch 2.9 or later has the newer switches: pip install -U torch")
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # as a model's module may do when it is imported
        with pytest.raises(RuntimeError):
            _ = torch.backends.cuda.matmul.allow_tf32
        with arithmetic_of(precision, "cpu"):
            assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def test_outputs_of_cuda_graphs_are_kept_apart() -> None:
    """A graph writes each output into the same memory; here a network that does so plays it."""

    class Static(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = torch.zeros(1, 3, 4, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.memory.copy_(images[:, :1].mean((2, 3), keepdim=True))

    cfg = compose_config(["inference.batch=1"]).inference
    forward = BatchedForward(LoadedModel(Static(), "random", (0.0,) * 3, (1.0,) * 3), cfg, 3)
    images = [torch.full((3, 8, 8), float(value)) for value in range(3)]
    forward._module = forward.model.module  # as if compiled
    cfg.compile = "cudagraphs"
    assert [float(output.mean()) for output in forward(images, "x")] == [0.0, 1.0, 2.0]


def test_torchscript_is_not_fused_on_a_gpu() -> None:
    """There it would be for the sizes seen so far, and bits would depend on a rank's earlier images."""
    scripted = torch.jit.script(nn.Conv2d(3, 3, 1))
    forward = BatchedForward(LoadedModel(scripted, "random", (0.0,) * 3, (1.0,) * 3), compose_config([]).inference, 3)
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"))
    assert torch._C._get_graph_executor_optimize()
    with forward._as_scripted(on_gpu):
        assert not torch._C._get_graph_executor_optimize()
    with forward._as_scripted(torch.zeros(1)):
        assert torch._C._get_graph_executor_optimize()


def test_graphs_that_torch_would_leave_out_are_refused() -> None:
    """It says so in its own log alone, and runs without them."""
    cfg = compose_config(["model=mask2former_swin_t", "inference.compile=cudagraphs", "inference=original_size"])
    network = nn.Sequential(DeformableAttention(64, 4, 3, 4))
    predictor = NetworkPredictor(
        LoadedModel(network, "random", (0.0,) * 3, (1.0,) * 3),
        cfg.inference,
        cfg.model,
        "torch",
        False,
        ade20k_classes(),
    )
    with pytest.raises(HarnessError, match="inference.compile=cudagraphs: has no effect on networks with deformable"):
        predictor.check({"x": (64, 64)})
    predictor.cfg.compile = "inductor"
    predictor.check({"x": (64, 64)})


class Named(torch.Tensor):
    """A subclass as libraries of images have them: values in its own memory, and a Python class of its own."""


class Answers(nn.Module):
    def __init__(self, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network, self.change = load_demo_network(), change

    def forward(self, images: torch.Tensor) -> Any:
        return self.change(self.network(images))


def labels_from(change: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    made = predictor(Answers(change), "inference=original_size")
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    return made.predict([made.prepare("a", image)], CPU, Stopwatch(CPU))[0].labels


@pytest.mark.parametrize(
    "change",
    [
        lambda scores: torch.complex(torch.zeros_like(scores), -scores).conj().imag,  # negated when it is read
        lambda scores: scores.as_subclass(Named),
        lambda scores: scores[:, None].expand(-1, 2, -1, -1, -1)[:, 1],
        nn.Parameter,
        lambda scores: scores.flip(-1).flip(-1).mT.contiguous().mT,
    ],
)
def test_scores_in_any_memory_are_the_same_scores(change: Callable[[torch.Tensor], Any]) -> None:
    assert torch.equal(labels_from(change), labels_from(lambda scores: scores))


def test_scores_that_are_kept_elsewhere_are_refused_by_name() -> None:
    def masked(scores: torch.Tensor) -> Any:
        return torch.masked.masked_tensor(scores, scores > 0)

    with pytest.raises(HarnessError, match="a: the model returned a MaskedTensor, whose values are not in one plain"):
        labels_from(masked)


class SpeechlessError(RuntimeError):
    def __str__(self) -> str:
        raise ValueError("no words")


def test_an_error_that_cannot_be_said_is_named() -> None:
    def fails(_: torch.Tensor) -> Any:
        raise SpeechlessError

    with pytest.raises(HarnessError, match=r"a: the model failed on an input of \[1, 3, 64, 96\] \(SpeechlessError\)"):
        labels_from(fails)


@pytest.mark.parametrize(("backend", "near"), [("inductr", " Did you mean 'inductor'?"), ("foo", "")])
def test_a_backend_that_torch_does_not_have_is_refused_at_once(backend: str, near: str) -> None:
    message = rf"inference.compile={backend}: torch has no such backend\.{re.escape(near)} Backends: .*inductor"
    with pytest.raises(HarnessError, match=message):
        predictor(load_demo_network(), *SLIDE, f"inference.compile={backend}")


@pytest.mark.parametrize(("kind", "advice"), [("dpt", "inference.window.crop=384"), ("mobilevit", "pad_multiple=32")])
def test_a_size_that_does_not_fit_leads_to_what_the_kind_takes(kind: str, advice: str) -> None:
    """DPT takes `image_size` alone; to others it is the size of their training."""

    def fails(_: torch.Tensor) -> Any:
        raise RuntimeError("shape '[1, 36, 36, 32]' is invalid for input of size 1")

    network: Any = Answers(fails)
    network.config = SimpleNamespace(model_type=kind, image_size=384)
    made = predictor(network, "inference=original_size")
    image = np.zeros((60, 90, 3), np.uint8)
    with pytest.raises(HarnessError, match=advice):
        made.predict([made.prepare("a", image)], CPU, Stopwatch(CPU))
