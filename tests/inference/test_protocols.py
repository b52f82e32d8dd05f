"""Each published protocol against what the official code made of one image and a toy network (tests/golden/README.md)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.config.inference import MaskConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.inference import masks
from ade_harness.inference import network as inference_network
from ade_harness.inference.masks import mask_view
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.plan import ViewPlan, plan_views
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import View, reference
from ade_harness.models.class_map import resolve_class_map
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.outputs import MaskLogits

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
RGB = np.load(GOLDEN / "preprocessing.npz")["rgb"]
SIX = "[0.5,0.75,1.0,1.25,1.5,1.75]"


def r(key: str, *shape: int) -> torch.Tensor:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(f"0:{key}".encode())))
    return torch.from_numpy(generator.standard_normal(shape, np.float32))


class Toy(nn.Module):
    """The dense toy network of the golden file: 7x7 convolution to stride 4."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        weight, bias = 0.1 * r("toy.weight", 150, 3, 7, 7), 0.1 * r("toy.bias", 150)
        return F.conv2d(images, weight, bias, stride=4, padding=3)


class ToyMask(nn.Module):
    """The mask classification toy: 20 queries."""

    def forward(self, images: torch.Tensor) -> MaskLogits:
        masks = F.conv2d(images, 0.1 * r("toymask.weight", 20, 3, 7, 7), None, stride=4, padding=3)
        return MaskLogits((2 * r("toymask.cls", 20, 151)).expand(len(images), -1, -1), masks)


def predictor(module: nn.Module, *overrides: str, kernels: str = "auto") -> NetworkPredictor:
    cfg = compose_config(["model=custom", "model._target_=x.y", "dataset=ade20k", "dataset.root=.", *overrides])
    model = LoadedModel(module, "random", tuple(cfg.model.input.mean), tuple(cfg.model.input.std))
    return NetworkPredictor(model, cfg.inference, cfg.model, kernels)


def labels_of(made: NetworkPredictor, image: np.ndarray) -> np.ndarray:
    [prediction] = made.predict([made.prepare("x", image)], CPU, Stopwatch(CPU))
    return prediction.labels.numpy()


def inference(*arguments: str) -> list[str]:
    """Write overrides short: a name, then key=value without "inference."."""
    return [f"inference={arguments[0]}", *[f"inference.{w}" for w in arguments[1:]]]


MMSEG = inference("mmseg_whole_512", "resize.side=128", "resize.max_side=512")
MMSEG_SLIDE = inference(
    "mmseg_slide_512", "resize.side=128", "resize.max_side=512", "window.crop=64", "window.stride=43"
)
MMSEG_MS = inference("mmseg_whole_512_ms", "resize.side=128", "resize.max_side=512")
MMSEG_SLIDE_MS = inference(
    "mmseg_slide_512_ms", "resize.side=128", "resize.max_side=512", "window.crop=64", "window.stride=43"
)
DINOV3 = inference("dinov3_slide_512", "resize.side=128", "window.crop=64", "window.stride=43")
DINOV3_TTA = ["inference.tta.flip=true", "inference.tta.order=flips_last", "inference.tta.round_up=32"]
D2 = inference("detectron2_512", "resize.side=128", "resize.max_side=512")
D2_MS = inference(
    "detectron2_512_ms", "resize.side=128", "resize.max_side=512", "tta.sides=[64,96,128,160]", "tta.max_side=896"
)
EOMT = [
    *inference("eomt_512", "resize.height=64", "resize.width=64", "window.crop=64"),
    "model.input.max_value=1",
    "model.input.mean=[0.485,0.456,0.406]",
    "model.input.std=[0.229,0.224,0.225]",
]

CASES: dict[str, tuple[type[nn.Module], list[str], int]] = {
    # name: network, protocol, pixels of 12,707 that fall otherwise because the two best classes tie in float32
    "mmseg0_whole": (Toy, MMSEG, 0),
    "mmseg0_slide": (Toy, MMSEG_SLIDE, 0),
    "mmseg0_tta": (Toy, MMSEG_MS, 0),
    "mmseg0_tta_slide": (Toy, MMSEG_SLIDE_MS, 0),
    "mmseg1_whole": (Toy, MMSEG, 0),
    "mmseg1_slide": (Toy, MMSEG_SLIDE, 0),
    "mmseg1_slide_small": (Toy, [*MMSEG_SLIDE, "inference.resize.side=48"], 0),
    "mmseg1_tta": (Toy, [*MMSEG_MS, "inference.tta.source=image"], 0),
    "mmseg1_tta_slide": (Toy, [*MMSEG_SLIDE_MS, "inference.tta.source=image"], 0),
    "dinov3_slide": (Toy, DINOV3, 0),
    "dinov3_slide_small": (Toy, [*DINOV3, "inference.resize.side=48"], 0),
    "dinov3_slide_small2": (Toy, [*DINOV3, "inference.resize.side=44"], 0),
    "dinov3_tta": (Toy, [*DINOV3, *DINOV3_TTA, "inference.tta.scales=[0.9,1.0,1.1]"], 0),
    "dinov3_tta_small": (Toy, [*inference("dinov3_slide_512", "resize.side=96", "window.crop=96", "window.stride=63"), *DINOV3_TTA, "inference.tta.scales=[0.6,0.9,1.0,1.1]"], 0),
    "dinov3_mask": (ToyMask, inference("dinov3_slide_896", "resize.side=128", "window.crop=64", "window.stride=43"), 0),
    "dinov3_mask_tta": (ToyMask, inference("dinov3_slide_896_ms", "resize.side=96", "window.crop=96", "window.stride=63", "tta.scales=[0.9,1.0,1.1]"), 0),
    "d2_mask_ss": (ToyMask, D2, 0),
    "d2_mask_ss_cap150": (ToyMask, [*D2, "inference.resize.max_side=150"], 0),
    "d2_mask_tta": (ToyMask, D2_MS, 0),
    "oneformer_mask_ss": (ToyMask, [*D2, "inference.masks.resolution=original"], 0),
    "oneformer_mask_tta": (ToyMask, [*D2_MS, "inference.masks.resolution=original"], 0),
    "eomt_mask": (ToyMask, EOMT, 0),
    "eomt_mask_tall": (ToyMask, EOMT, 0),
    "eomt_mask_3win": (ToyMask, EOMT, 0),
}  # fmt: skip


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("case", CASES)
def test_labels_equal_the_official_code(case: str, kernels: str) -> None:
    network, overrides, ties = CASES[case]
    image = {"eomt_mask_tall": RGB.transpose(1, 0, 2), "eomt_mask_3win": RGB[:60]}.get(case, RGB)
    expected = np.load(GOLDEN / "protocols.npz")[case]
    labels = labels_of(predictor(network(), *overrides, kernels=kernels), np.ascontiguousarray(image))
    assert labels.shape == expected.shape
    assert int((labels != expected).sum()) <= ties
    assert len(np.unique(expected)) >= 5  # the comparison means something


@pytest.mark.parametrize("case", [case for case, (network, _, _) in CASES.items() if network is ToyMask])
def test_scores_of_masks_are_held_together_or_added_up_one_by_one(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with memory for them, and on one without: the official labels, the same bits."""
    network, overrides, ties = CASES[case]
    image = {"eomt_mask_tall": RGB.transpose(1, 0, 2), "eomt_mask_3win": RGB[:60]}.get(case, RGB)
    made = predictor(network(), *overrides, kernels="torch")
    one_by_one = labels_of(made, np.ascontiguousarray(image))
    asked = []
    for module in (masks, inference_network):
        monkeypatch.setattr(module, "held_together", lambda *_: asked.append("") or True)
    together = labels_of(made, np.ascontiguousarray(image))
    several = len(made.prepare("x", image).pixels) > 1 or made.cfg.mode != "whole"
    assert bool(asked) == several
    assert np.array_equal(together, one_by_one)
    assert int((together != np.load(GOLDEN / "protocols.npz")[case]).sum()) <= ties


def test_scores_are_held_together_where_a_gpu_has_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, size = torch.device("cuda:0"), (512, 683)
    monkeypatch.setattr(masks, "_memory_of", lambda _: 4 * 150 * 512 * 683 * 3)
    for resolution in ("input", "original"):
        [plan] = plan_views(size, compose_config(["inference=original_size"]).inference)
        plan = replace(plan, window=size)
        cfg = MaskConfig(resolution=resolution)
        assert masks.held_together([plan] * 3, 150, cfg, size, gpu)
        assert not masks.held_together([plan] * 4, 150, cfg, size, gpu)
        assert not masks.held_together([plan], 150, cfg, size, CPU)
    two = replace(plan, origins=((0, 0), (0, 100)))
    assert not masks.held_together([two, two], 150, MaskConfig(), size, gpu)  # of windows, each counts


def test_a_label_step_that_is_short_of_memory_holds_one_view_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    network, overrides, _ = CASES["d2_mask_tta"]
    made = predictor(network(), *overrides, kernels="torch")
    expected = labels_of(made, RGB)
    tries, views = [], []

    def together(self: NetworkPredictor, *given: object, frugal: bool = False) -> torch.Tensor:
        tries.append(frugal)
        return labels(self, *given, frugal=frugal)  # type: ignore[arg-type]

    def short(several: Sequence[View], *given: object) -> torch.Tensor:
        views.append(len(several))
        if len(several) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return merge(several, *given)  # type: ignore[arg-type]

    labels, merge = NetworkPredictor._labels, reference.merge
    monkeypatch.setattr(inference_network, "held_together", lambda *_: True)  # as on a GPU
    monkeypatch.setattr(NetworkPredictor, "_labels", together)
    monkeypatch.setattr(reference, "merge", short)
    assert np.array_equal(labels_of(made, RGB), expected)
    assert tries == [False, True]
    several = len(made.prepare("x", RGB).pixels)
    assert views[0] >= several > 1
    assert set(views[1:]) <= {1}
    assert np.array_equal(labels_of(made, RGB), expected)  # the next image is not tried together again
    assert tries == [False, True, True]

    def out_of_memory(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(NetworkPredictor, "_labels", out_of_memory)
    with pytest.raises(HarnessError, match=r"Use a device with more memory, or runtime\.accelerator=cpu \(a mask"):
        labels_of(made, RGB)


PIXELS = {
    "mmseg_internimage": inference("internimage_896_ms", "resize.side=128", "resize.max_side=512", "tta.sides=null", f"tta.scales=[{768 / 896},1.0,{1024 / 896}]"),
    "mmseg_vitadapter_pad160": inference("vit_adapter_896_ms", "resize.side=128", "resize.max_side=512", "resize.pad_at_least=160", "window.crop=160", "window.stride=91", "tta.sides=null", f"tta.scales=[{800 / 896},1.0]"),
    "dinov3_simple": inference("dinov3_slide_512", "resize.side=128"),
    "dinov3_tta": inference("dinov3_slide_896_ms", "resize.side=128", "tta.scales=[0.9,1.0,1.1]"),
    "d2_tta": inference("detectron2_512_ms", "resize.side=128", "resize.max_side=512", "resize.pad_multiple=1", "tta.sides=[64,96,128,160]", "tta.max_side=896"),
    "eomt_crops": inference("eomt_512", "resize.height=64", "resize.width=64", "window.crop=64"),
}  # fmt: skip


@pytest.mark.parametrize("family", PIXELS)
@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_pixels_equal_the_official_loaders(family: str, kernels: str) -> None:
    """Bit for bit, every view in the official order."""
    stored = np.load(GOLDEN / "preprocessing.npz")
    seen: list[torch.Tensor] = []

    class Watch(Toy):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.extend(images)
            return super().forward(images)

    raw = family in ("d2_tta", "eomt_crops")  # these loaders hand over uint8
    statistics = ["model.input.mean=[0,0,0]", "model.input.std=[1,1,1]"] if raw else []
    whole = ["inference.mode=whole", "inference.images=1", "inference.window.crop=null", "inference.window.stride=null"]
    made = predictor(Watch(), *PIXELS[family], *statistics, *([] if family == "eomt_crops" else whole), kernels=kernels)
    prepared = made.prepare("x", RGB)
    made.predict([prepared], CPU, Stopwatch(CPU))
    if family == "eomt_crops":
        expected = list(stored["eomt_crops"])
        shapes = [e.shape for e in expected]
        views = seen
    else:
        names = sorted(k for k in stored.files if k.startswith(f"{family}.") and not k.endswith("shape"))
        expected, shapes = [stored[n] for n in names], [tuple(stored[f"{n}.shape"]) for n in names]
        plans = plan_views((97, 131), made.cfg)
        order = sorted(range(len(plans)), key=lambda i: [p.window for p in plans].index(plans[i].window))
        views = [seen[order.index(i)] for i in range(len(plans))]
        views = [view[:, ::3, ::3] for view in views]
        assert [(3, *p.canvas) for p in plans] == shapes
    assert len(views) == len(expected)
    for view, official in zip(views, expected, strict=True):
        assert np.array_equal(view.numpy(), official.astype(np.float32))


@pytest.mark.parametrize(("system", "size"), [("internimage", (96, 128)), ("vit_adapter", (64, 64))])
def test_queries_merged_at_their_own_resolution(system: str, size: tuple[int, int]) -> None:
    """The semantic scores that the official heads of InternImage and ViT-Adapter make of these class and mask logits."""
    stored = np.load(GOLDEN / "mask_scores.npz")
    output = MaskLogits(*(torch.from_numpy(stored[f"{system}.{name}"]) for name in ("cls", "mask")))
    plan = ViewPlan((size,), size, (0, 0), size, ((0, 0),), False)
    view = mask_view(
        reference,
        plan,
        [output],
        MaskConfig(resolution="scores"),
        resolve_class_map(150, None, None, ade20k_classes()),
        size,
    )
    scores = F.interpolate(view.scores, size, mode="bilinear", align_corners=False)[:, ::10, ::4, ::4]
    expected = torch.from_numpy(stored[f"{system}.sem_every4"])
    assert scores.shape == expected.shape
    assert (scores - expected).abs().max() < 1e-6 * expected.abs().max()


def test_sizes_of_mmseg_1_tta_are_rescaled_twice() -> None:
    """853x703 at .75: the scaled size 640x527 becomes the target of a second rescale with the ratio kept: 639x527."""
    made = predictor(
        Toy(), *MMSEG_MS, "inference.tta.source=image", "inference.tta.scales=[0.75]", "inference.tta.flip=false"
    )
    assert [plan.size for plan in plan_views((853, 703), made.cfg)] == [(639, 527)]
