"""Runs a system by its protocol on fake CUDA tensors: no GPU, no memory, every operator and every launch seen.

A fake tensor has a shape, a dtype and a device, but no values. A value that the host reads raises an error (on a GPU
the host would wait for all work before), and so does a CPU tensor that meets a CUDA one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ade_harness import kernels
from ade_harness.config.compose import compose_config
from ade_harness.config.inference import Precision
from ade_harness.config.schema import Config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.evaluation import launching
from ade_harness.evaluation.data import LoadedImage
from ade_harness.evaluation.launching import launch
from ade_harness.inference import masks
from ade_harness.inference.memory import pixels_at_once
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.plan import plan_views
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.loaded import LoadedModel, statistics
from ade_harness.models.registry import family_of
from tests.faster_hydra import faster
from tests.kernels.variants import variant

CUDA = torch.device("cuda:0")
_META = 14
"""c10::DeviceType::Meta."""


def allow_fake_cuda() -> None:
    """Give torch a device guard for CUDA that does nothing, where there is no GPU.

    Views of fake CUDA tensors are made in C++, which sets the device before. Torch has a call for this, but it does
    nothing in a build without CUDA, whose table of guards has no entry: it gets that of the meta device.
    """
    torch._C._ensureCUDADeviceGuardSet()
    if torch.version.cuda is None:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so"))
        guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
        assert guards[_META] is not None
        guards[CUDA_TYPE] = guards[_META]


_MODE = FakeTensorMode()  # one for the process, since networks keep tensors that depend on the input's size alone
CUDA_TYPE = 1
"""c10::DeviceType::CUDA."""
# kernels of ours that are several launches: the table of views and the kernel (and before it, of averaged softmax, the
# kernel of the norms); zeros and the kernel; the table, zeros and the kernel
OWN = {
    "label_views": 2, "count_pixels": 2, "count_invalid": 3, "normalise_pixels": 1, "aggregate": 1, "enlarge_masks": 1,
}  # fmt: skip
_ONE_KERNEL = ("upsample_", "scaled_dot_product_attention")
"""Composite operators that are one kernel on a GPU (of attention, that which holds no matrix of all pairs)."""
_COMPOSITE = "CompositeImplicitAutograd"
_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh"}
"""Operators that make no view and launch nothing either."""


def launches(func: Any, arguments: Sequence[Any]) -> int:
    """Return how many kernels and copies an operator starts on a GPU, at least."""
    name = func.__name__.split(".")[0]
    norms = name == "label_views" and arguments[4]
    converted = name == "aggregate" and arguments[3].dtype != torch.float32  # its weights
    return 0 if func.is_view or name in _NOTHING else OWN.get(name, 1) + bool(norms or converted)


@dataclasses.dataclass
class Seen:
    """What a pass did."""

    operators: Counter[str] = dataclasses.field(default_factory=Counter)
    """Calls of each operator, by its name without a namespace, that launch something; ours by their launches."""
    variants: set[str] = dataclasses.field(default_factory=set)
    """Which variants of our kernels were launched: name and constants, as `variant` writes them."""
    now: int = 0
    peak: int = 0
    """Bytes of CUDA tensors at a time, the network's included."""
    weights: int = 0
    """Bytes of the network's parameters and buffers."""

    @property
    def launches(self) -> int:
        """How many there were."""
        return self.operators.total()


def variants_of(operator: str, arguments: Any) -> set[str]:
    """Return what an operator of ours launches, as its launcher chooses it from the arguments."""
    if operator == "aggregate":
        values, shapes, points = arguments[:3]
        taps, levels = points.shape[3], len(shapes) // 2  # heights and widths in turn
        return {variant("_aggregate", TAPS=taps, PER_LEVEL=taps // levels, CHANNELS=values.shape[3])}
    if operator == "label_views":
        _, _, _, two_steps, soft, whole = arguments
        labels = variant("label_tile", TWO_STEPS=two_steps, PROBABILITIES=soft, WHOLE=whole)
        return {labels, variant("view_norms", TWO_STEPS=two_steps)} if soft else {labels}
    if operator == "enlarge_masks":
        _, _, area, size, _ = arguments
        return {variant("mask_tile", TWO_STEPS=list(area[2:]) != list(size))}
    return set()


@cache
def is_made_of_others(func: Any) -> bool:
    """Whether an operator is composite, and several kernels on a GPU."""
    whole = func.namespace != "aten" or func.__name__.startswith(_ONE_KERNEL)
    return not whole and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


def check_copy(name: str, args: Any, kwargs: Any) -> None:
    """Refuse a copy between the host and the GPU for which the host waits, as it does unless it is said not to."""
    if name not in ("_to_copy", "copy_"):
        return
    source, target = (args[1], args[0].device) if name == "copy_" else (args[0], kwargs.get("device") or args[0].device)
    waits = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    if waits and {source.device.type, torch.device(target).type} == {"cpu", "cuda"}:
        raise AssertionError(f"a copy from {source.device} to {target} waits for the GPU")


class UnknownError(Exception):
    """What an operator gives cannot be told from its arguments' layouts."""


def described(value: Any) -> Any:
    """Return what the result of an operator depends on in an argument; raises UnknownError."""
    if isinstance(value, Tensor):
        if not isinstance(value, FakeTensor) or value.device != CUDA:
            raise UnknownError
        return layout_of(value)
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    if isinstance(value, torch.SymInt | torch.SymFloat):
        raise UnknownError
    return type(value), value


def call_of(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what the result of an operator on fake CUDA tensors depends on; None where it may be something else."""
    if func.is_view or func._schema.is_mutable or func.namespace != "aten":
        return None
    try:
        return func, described(args), tuple((name, described(value)) for name, value in (kwargs or {}).items())
    except UnknownError:
        return None


def is_new(out: Any, given: Any) -> bool:
    """Whether results are CUDA tensors that share no memory with what was given."""
    results = tree_leaves(out)
    before = {t.untyped_storage()._cdata for t in tree_leaves(given) if isinstance(t, Tensor)}
    return all(
        isinstance(t, FakeTensor) and t.device == CUDA and t.untyped_storage()._cdata not in before for t in results
    )


def layout_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the shape, strides and dtype of a tensor."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def empty_like(layout: tuple[Any, ...]) -> Tensor:
    """Return a new fake CUDA tensor of a layout."""
    with no_dispatch():
        meta = torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
    return FakeTensor(_MODE, meta, CUDA)


class Watch(TorchDispatchMode):
    """Counts operators, and bytes of all together."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = self.counts = seen
        self._known: set[int] = set()
        self._results: dict[Any, Any] = {}
        """Of calls, by what they depend on: operators, bytes and layouts. Networks repeat themselves, and torch's own
        cache knows no composite operators."""

    @contextmanager
    def counting(self, counts: Seen) -> Iterator[None]:
        """Count operators elsewhere."""
        before, self.counts = self.counts, counts
        try:
            yield
        finally:
            self.counts = before

    def hold(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed; the allocator rounds up to 512 bytes."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "cuda" and key not in self._known:
            size = -(-storage.nbytes() // 512) * 512
            self._known.add(key)
            self.seen.now += size
            self.seen.peak = max(self.seen.peak, self.seen.now)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.seen.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = call_of(func, args, kwargs)
        if key is not None and key in self._results:
            operators, grown, layouts = self._results[key]
            self.counts.operators.update(operators)
            self.seen.peak = max(self.seen.peak, self.seen.now + grown)
            out = tree_map(empty_like, layouts, is_leaf=_is_layout)
            for tensor in tree_leaves(out):
                self.hold(tensor)
            return out
        counts, peak, begun = Seen(), self.seen.peak, self.seen.now
        self.seen.peak = begun
        with self.counting(counts):
            out = self._call(func, args, kwargs or {})
        if key is not None and is_new(out, (args, kwargs)):
            self._results[key] = counts.operators, self.seen.peak - begun, tree_map(layout_of, out)
        self.counts.operators.update(counts.operators)
        self.seen.peak = max(peak, self.seen.peak)
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if is_made_of_others(func):
            with self:  # it is made of others, which inference mode would hide
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        name = func.__name__.split(".")[0]
        check_copy(name, args, kwargs)
        out = func(*args, **kwargs)
        if func.namespace == "ade_harness":
            self.seen.variants |= variants_of(name, args)
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if any(t.device.type == "cuda" for t in tensors) and launches(func, args):
            self.counts.operators[name] += launches(func, args)
        for tensor in tensors:
            self.hold(tensor)
        return out


class Repeated:
    """A network's forward that does anew what depends on shapes, and repeats what it did for a shape.

    A shape that comes for the second time is computed once more, since a network may keep what the first pass made for
    it; the passes of one shape after that are what the second was: as many operators, as much memory, the same outputs.
    """

    def __init__(self, forward: Callable[[Tensor], Any], beside: Seen, inside: Seen) -> None:
        self.forward, self.seen = forward, (beside, inside)
        self.passes: Counter[tuple[int, ...]] = Counter()
        self.done: dict[tuple[int, ...], tuple[list[Counter[str]], int, Any]] = {}
        self.repeats = False
        """Whether a shape came again, and was computed again."""

    def __call__(self, images: Tensor) -> Any:
        shape = tuple(images.shape)
        self.passes[shape] += 1
        beside, _ = self.seen
        if self.passes[shape] > 1 and (self.passes[shape] > 2 or self.repeats):
            operators, grown, outputs = self.done[shape]
            beside.peak = max(beside.peak, beside.now + grown)
            for seen, counted in zip(self.seen, operators, strict=True):
                seen.operators += counted
            return tree_map(empty_like, outputs, is_leaf=_is_layout)
        self.repeats |= self.passes[shape] == 2
        before, peak, begun = [Counter(seen.operators) for seen in self.seen], beside.peak, beside.now
        beside.peak = beside.now
        out = self.forward(images)
        operators = [seen.operators - old for seen, old in zip(self.seen, before, strict=True)]
        self.done[shape] = operators, beside.peak - begun, tree_map(layout_of, out)
        beside.peak = max(beside.peak, peak)
        return out


def _is_layout(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], torch.dtype)


def fake_network(cfg: Config, mode: FakeTensorMode, dtype: torch.dtype) -> nn.Module:
    """Return a system's network at true size whose parameters are fake CUDA tensors."""
    architecture: Any = OmegaConf.to_container(OmegaConf.structured(cfg.model)).get("architecture")
    with torch.device("meta"):
        network = family_of(cfg.model.kind).load(architecture or {}, None, Strictness("")).eval()
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = parameter.detach().to("meta", dtype if parameter.is_floating_point() else None)
                module._parameters[name] = nn.Parameter(FakeTensor(mode, value, CUDA), requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                value = buffer.detach().to("meta", dtype if buffer.is_floating_point() else None)
                module._buffers[name] = FakeTensor(mode, value, CUDA)
    return network


@contextmanager
def autocast_of_cuda() -> Iterator[None]:
    """Switch CUDA's autocast to bfloat16 on; ``torch.autocast`` would not do so where there is no GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before)


def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
    """Stand in for ``torch.autocast``, which networks may call in their forward."""
    if device_type != "cuda" or not enabled:
        return _AUTOCAST(device_type, dtype=dtype, enabled=enabled, **options)
    assert dtype == torch.bfloat16
    return autocast_of_cuda()


_AUTOCAST = torch.autocast


def run(cfg: Config, size: tuple[int, int], half: bool = False) -> tuple[Seen, Seen]:
    """Predict and count one image; return what happened in the network, and what beside it.

    Args:
        cfg: names the system and its protocol; set to float32.
        size: (height, width) of the image.
        half: weights in bfloat16 under autocast: ``model.dtype=bf16 inference.precision=bf16``.
    """
    allow_fake_cuda()
    mode = _MODE
    made = gpu_kernels()
    network = fake_network(cfg, mode, torch.bfloat16 if half else torch.float32)
    model = LoadedModel(network, "random", fixed_size=getattr(network, "fixed_size", None), **statistics(cfg.model))
    cfg.inference.precision = Precision.fp32
    predictor = NetworkPredictor(model, cfg.inference, cfg.model, "triton", cfg.metrics.calibration, ade20k_classes())
    predictor._kernels = made
    image = predictor.prepare("x", torch.zeros((*size, 3), dtype=torch.uint8).numpy())
    inside, beside = Seen(), Seen()
    with mode, torch.inference_mode():
        outer = Watch(beside)
        for tensor in (*network.parameters(), *network.buffers()):
            outer.hold(tensor)
        beside.weights = beside.now
        pixels = tuple(mode.from_tensor(p) for p in image.pixels)
        forward = network.forward

        def watched(images: Tensor) -> Any:
            with outer.counting(inside), autocast_of_cuda() if half else nullcontext():
                return forward(images)

        target = mode.from_tensor(torch.zeros(size, dtype=torch.uint8))
        loaded = LoadedImage("x", dataclasses.replace(image, pixels=pixels), target, "", "", None, 0.0)
        with outer, without_events(), patch.object(torch, "autocast", autocast):
            network.forward = Repeated(watched, beside, inside)  # type: ignore[method-assign]
            launched = launch([loaded], predictor, CUDA, made, 150)  # what an evaluation does with a batch
        [prediction] = launched.predictions
        operators = inside.operators.copy(), beside.operators.copy()
        assert launched.done is not None
        assert {prediction.labels.device.type, launched.counts[0].device.type} == {"cpu"}  # or soon will be
        assert tuple(prediction.labels.shape) == size
        assert tuple(launched.counts[0].shape) == (150, 151)
        assert (launched.calibrations[0].numel() > 0) == cfg.metrics.calibration
        assert launched.calibrations[0].device.type == "cpu"
        windows = sum(len(plan.origins) for plan in plan_views(size, cfg.inference))
        if windows > 1 and "enlarge_masks" in operators[1]:
            # memory is told of a GPU that has no more than it takes
            del prediction, launched
            beside.peak = beside.now
            with outer, without_events(), patch.object(masks, "_memory_of", lambda _: 0):
                launch([loaded], predictor, CUDA, made, 150)
            inside.operators, beside.operators = operators
    return inside, beside


@contextmanager
def without_events() -> Iterator[None]:
    """Let a batch be launched where there is no CUDA: no events, and memory for copies to the host is not pinned."""
    pinned = torch.empty_like

    def empty_like_(tensor: Tensor, pin_memory: bool = False, **options: Any) -> Tensor:
        assert pin_memory or options.get("device") != "cpu", "a copy to memory that is not pinned waits for the GPU"
        return pinned(tensor, **options)

    with (
        patch.object(launching, "Stopwatch", lambda _: Stopwatch(torch.device("cpu"))),
        patch.object(torch.cuda, "Event", MagicMock()),
        patch.object(torch, "empty_like", empty_like_),
    ):
        yield


def gpu_kernels() -> kernels.Kernels:
    """Return the kernels of a GPU, whatever this machine is."""
    from ade_harness.kernels import triton_gpu

    triton_gpu.softmax_agrees_with_torch = triton_gpu.sigmoid_agrees_with_torch = lambda: True
    return triton_gpu  # type: ignore[return-value]


_CALIBRATED = "metrics.calibration=true"
_ALL_BUT_TWO = f"model.class_map=[{','.join(['null', 'null', *map(str, range(148))])}]"
OPTIONS = {
    "calibration": ("segformer_b0", [_CALIBRATED]),
    "calibration of masks": ("maskformer_swin_t", [_CALIBRATED]),
    "calibration of averaged probabilities": (
        "segformer_b0",
        ["inference=mmseg_whole_512_ms", "inference.tta.scales=[0.5,1.0]", _CALIBRATED],
    ),
    "calibration of averaged masks": (
        "maskformer_swin_t",
        ["inference=detectron2_512_ms", "inference.tta.sides=[256,512]", _CALIBRATED],
    ),
    "other classes": ("segformer_b0", [_ALL_BUT_TWO, _CALIBRATED]),
    "other classes of masks": ("maskformer_swin_t", [_ALL_BUT_TWO]),
    "labels of the input's size": ("segformer_b0", ["inference.output.labels=input", _CALIBRATED]),
    "labels of the input's size, of masks": ("maskformer_swin_t", ["inference.output.labels=input", _CALIBRATED]),
    "TensorFlow's upsampling": ("segformer_b0", ["inference=mlperf_deeplab", _ALL_BUT_TWO]),
    "windows and their averages": ("maskformer_swin_t", ["inference=mmseg_slide_512", _CALIBRATED]),
    "BGR, other padding": ("segformer_b0", ["model.input.channel_order=bgr", "inference=detectron2_512"]),
}
"""What no system's own protocol has, each on a small network: its name, the system, the overrides."""


def options() -> None:
    """Run each of OPTIONS, and print its name."""
    for name, (model, overrides) in OPTIONS.items():
        print(name, flush=True)
        run(compose_config([f"model={model}", *overrides]), (375, 500))


def main(overrides: list[str]) -> None:
    """Print one line of JSON for each model named, and for those after ``--half`` in bfloat16."""
    names, _, halves = " ".join(overrides).partition("--half")
    torch.cuda.is_available = lambda: False  # asked at each operator, and without a GPU looked up anew each time
    gc.freeze()  # a fake tensor is many Python objects: collections would take a tenth of the time
    gc.set_threshold(100_000, 50, 100)
    faster()
    if overrides == ["--options"]:
        return options()
    size = (512, 683)
    for name, half in [*((n, False) for n in names.split()), *((n, True) for n in halves.split())]:
        start = time.perf_counter()
        cfg = compose_config([f"model={name}"])
        inside, beside = run(cfg, size, half)
        plans = plan_views(size, cfg.inference)
        found = {
            "model": name, "half": half, "views": len(plans), "windows": sum(len(p.origins) for p in plans),
            "forward": inside.operators, "beside": beside.operators, "peak_mib": round(beside.peak / 2**20),
            "weights_mib": round(beside.weights / 2**20),
            "pixels": pixels_at_once(cfg.inference, size),
            "copies": len({plan.sizes for plan in plans}) + 1,  # of pixels to the GPU, and of the ground truth
            "variants": sorted(beside.variants),
            "seconds": round(time.perf_counter() - start, 1),
        }  # fmt: skip
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
