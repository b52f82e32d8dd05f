"""The protocol: sizes and pixels as the official loaders make them, labels as a slow reference does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.config.inference import InferenceConfig, ResizeConfig
from ade_harness.config.schema import Config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.inference.folder import FolderPredictor
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.plan import plan_views
from ade_harness.inference.predictor import Prepared
from ade_harness.inference.resize import padded_size, padding_offset, resize_image, resize_labels, target_sizes
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels.reference import legacy_bilinear
from ade_harness.metrics.counts import label_hash
from ade_harness.models.loaded import LoadedModel

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = torch.device("cpu")
BASE = ["model=custom", "model._target_=x.y", "dataset=ade20k", "dataset.root=."]


def config(*overrides: str) -> Config:
    return compose_config([*BASE, *overrides])


class Fixed(nn.Module):
    """Scores that depend on the input: stride-4 averages of it, in `channels` mixtures."""

    def __init__(self, channels: int = 150, spoil: float | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mix = torch.randn(channels, 3, 1, 1, generator=generator)
        self.bias = torch.randn(channels, generator=generator) * 0.1
        self.spoil = spoil

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        scores = F.conv2d(F.avg_pool2d(images, 4, ceil_mode=True), self.mix, self.bias)
        if self.spoil is not None:
            scores[0, 0, 0, 0] = self.spoil
        return scores


def predictor(cfg: Config, module: nn.Module | None = None, **facts: Any) -> NetworkPredictor:
    model = LoadedModel(module or Fixed(), "random", tuple(cfg.model.input.mean), tuple(cfg.model.input.std), **facts)
    return NetworkPredictor(model, cfg.inference, cfg.model)


def labels_of(made: NetworkPredictor | FolderPredictor, prepared: Prepared) -> torch.Tensor:
    [prediction] = made.predict([prepared], CPU, Stopwatch(CPU))
    return prediction.labels


def input_of(made: NetworkPredictor, prepared: Prepared) -> torch.Tensor:
    labels_of(made, prepared)
    seen: torch.Tensor = made.model.module.seen
    return seen


@pytest.mark.parametrize(
    ("rule", "overrides"),
    [
        ("swin_segformer_style_512_Resize", ["inference=mmseg_whole_512"]),
        ("segformer_512_Aligned32", ["inference=mmseg_whole_512_align32"]),
        ("segformer_512_Aligned32_ms", ["inference=mmseg_whole_512_align32_ms"]),
        ("convnext_swinL_640_Resize", ["inference=mmseg_whole_640"]),
        ("convnext_swinL_640_Resize_ms", ["inference=mmseg_whole_640_ms"]),
        ("beit_640_SETR_ms", ["inference=beit_slide_640_ms"]),
        ("dinov2_linear_512", ["inference=dinov2_slide_512"]),
        ("dinov2_ms_640", ["inference=dinov2_slide_640_ms"]),
    ],
)
def test_sizes_equal_the_official_loaders(rule: str, overrides: list[str]) -> None:
    stored = json.loads((GOLDEN / "mmseg0_resize_sizes.json").read_text())[rule]
    protocol = config(*overrides).inference
    assert isinstance(protocol, InferenceConfig)
    for text, sizes in stored.items():
        height, width = map(int, text.split("x"))
        plain = [plan for plan in plan_views((height, width), protocol) if not plan.flipped]
        assert [list(plan.size) for plan in plain] == sizes, text
    assert len(stored) == 10


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("segformer_512_Aligned32_scale(512, 128).0", ["inference=mmseg_whole_512_align32", "inference.resize.side=128", "inference.resize.max_side=512"]),
        ("convnext_swinL_640_Resize_scale(640, 160).0", ["inference=mmseg_whole_512", "inference.resize.side=160", "inference.resize.max_side=640"]),
    ],
)  # fmt: skip
def test_pixels_equal_mmsegmentation(key: str, overrides: list[str]) -> None:
    stored = np.load(GOLDEN / "mmseg0_protocol.npz")
    rgb = np.ascontiguousarray(stored["image_bgr_uint8"][..., ::-1])
    made = predictor(config(*overrides))
    images = input_of(made, made.prepare("x", rgb))
    # mmcv normalises in another order of float operations: one unit in the last place of values up to 3
    assert np.abs(images[0].numpy() - stored[key]).max() < 5e-7


def test_pixels_equal_detectron2() -> None:
    stored = np.load(GOLDEN / "preprocessing.npz")
    overrides = ["rule=short_side", "side=128", "max_side=512", "rounding=detectron2", "backend=pillow"]
    cfg = config(*(f"inference.resize.{o}" for o in overrides))
    prepared = predictor(cfg).prepare("x", stored["rgb"])
    assert np.array_equal(prepared.pixels[0].permute(2, 0, 1).numpy(), stored["d2_ss"])


def slow_labels(cfg: Config, image: np.ndarray, module: nn.Module) -> torch.Tensor:
    """The same protocols written out plainly, with [C, H, W] tensors."""
    resize, output = cfg.inference.resize, cfg.inference.output
    original = image.shape[:2]
    for size in target_sizes(original, resize):
        image = resize_image(image, size, resize.backend)
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)
    mean, std = (torch.tensor(list(getattr(cfg.model.input, k)))[:, None, None] for k in ("mean", "std"))
    x = (x - mean) / std
    height, width = x.shape[1:]
    top = left = 0
    padded = padded_size((height, width), resize)
    if padded != (height, width):
        canvas = torch.zeros(3, *padded)
        if resize.pad_value is not None:
            canvas[:] = (resize.pad_value - mean) / std
        if resize.pad_position == "centre":
            top, left = (padded[0] - height) // 2, (padded[1] - width) // 2
        canvas[:, top : top + height, left : left + width] = x
        x = canvas
    scores = module(x[None])
    if output.upsample == "two_step":
        scores = F.interpolate(scores, x.shape[1:], mode="bilinear", align_corners=False)
        scores = scores[..., top : top + height, left : left + width]
    if output.labels == "input":
        labels = scores.argmax(1)[0].to(torch.uint8).numpy()
        return torch.from_numpy(np.array(Image.fromarray(labels).resize(original[::-1], Image.Resampling.NEAREST)))
    return F.interpolate(scores, original, mode="bilinear", align_corners=False).argmax(1)[0].to(torch.uint8)


@pytest.mark.parametrize(
    "overrides",
    [
        ["inference=original_size"],
        ["inference=mmseg_whole_512", "inference.resize.side=96", "inference.resize.max_side=200"],
        ["inference=mmseg_whole_512_align32", "inference.resize.side=96", "inference.resize.max_side=200"],
        ["inference=mmseg_whole_512", "inference.resize.side=96", "inference.output.upsample=one_step"],
        ["inference=fit_512", "inference.resize.side=128", "inference.resize.pad_to=[128,128]"],
        ["inference=fit_512", "inference.resize.side=128", "inference.resize.pad_to=[128,160]", "inference.output.labels=input"],
        ["inference.resize.rule=exact", "inference.resize.height=64", "inference.resize.width=80"],
        ["inference=mmseg_whole_512", "inference.resize.side=96", "inference.resize.pad_multiple=28", "inference.resize.pad_position=centre"],
        ["inference=mmseg_whole_512", "inference.resize.side=80", "inference.resize.pad_at_least=100", "inference.resize.pad_value=30"],
        ["inference=mmseg_whole_512", "inference.resize.side=96", "inference.resize.multiple_of=28", "inference.resize.multiple_rounding=nearest"],
        ["inference=mmseg_whole_512", "inference.resize.side=96", "inference.resize.backend=torch"],
        ["inference.resize.rule=longest_side", "inference.resize.side=90"],
        ["inference.resize.rule=cover", "inference.resize.height=72", "inference.resize.width=72"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(70, 101), (96, 60), (33, 33)])
def test_labels_equal_a_plain_reference(overrides: list[str], size: tuple[int, int]) -> None:
    cfg = config(*overrides)
    image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    made = predictor(cfg)
    labels = labels_of(made, made.prepare("x", image))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, slow_labels(cfg, image, Fixed()))


@pytest.mark.parametrize(
    ("rule", "size", "expected"),
    [
        (ResizeConfig(rule="short_side", side=100, multiple_of=14, multiple_rounding="nearest"), (100, 105), [(100, 105), (98, 112)]),
        (ResizeConfig(rule="short_side", side=100, multiple_of=14), (100, 105), [(100, 105), (112, 112)]),
        (ResizeConfig(rule="exact", height=5, width=6, multiple_of=14, multiple_rounding="nearest"), (9, 9), [(5, 6), (14, 14)]),
        (ResizeConfig(rule="longest_side", side=50), (100, 200), [(25, 50)]),
        (ResizeConfig(rule="cover", height=64, width=64), (97, 131), [(64, 86)]),
        (ResizeConfig(rule="cover", height=64, width=100), (97, 131), [(74, 100)]),
        (ResizeConfig(rule="short_side", side=128, max_side=150, rounding="detectron2"), (97, 131), [(111, 150)]),
        (ResizeConfig(rule="short_side", side=128, max_side=150), (97, 131), [(111, 150)]),
        (ResizeConfig(rule="short_side", side=3, max_side=None, rounding="detectron2"), (2, 3), [(3, 5)]),
        (ResizeConfig(rule="none"), (7, 9), [(7, 9)]),
    ],
)  # fmt: skip
def test_sizes_by_hand(rule: ResizeConfig, size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    assert target_sizes(size, rule) == expected


def test_padding_by_hand() -> None:
    centred = ResizeConfig(pad_multiple=14, pad_position="centre")
    assert padded_size((512, 640), centred) == (518, 644)
    assert padding_offset((512, 640), (518, 644), centred) == (3, 2)  # DINOv2's CenterPadding: the smaller half first
    assert padding_offset((512, 640), (518, 644), ResizeConfig(pad_multiple=14)) == (0, 0)
    assert padded_size((600, 1000), ResizeConfig(pad_at_least=896)) == (896, 1000)
    assert padded_size((600, 1000), ResizeConfig(pad_at_least=890, pad_multiple=32)) == (896, 1024)


def test_resizers_differ_as_documented() -> None:
    """Halving: Pillow antialiases, OpenCV does not, torch does if asked to (within 1 of Pillow)."""
    image = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    opencv, pillow, plain, smooth = (
        resize_image(image, (40, 60), backend, antialias).astype(int)
        for backend, antialias in (("opencv", False), ("pillow", False), ("torch", False), ("torch", True))
    )
    assert np.abs(opencv - pillow).max() > 20
    assert np.abs(opencv - plain).max() <= 1
    assert np.abs(pillow - smooth).max() <= 1


def test_bgr_networks_see_bgr() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200  # red
    cfg = config(
        "model.input.channel_order=bgr",
        "model.input.mean=[0,0,0]",
        "model.input.std=[1,1,1]",
        "inference=original_size",
    )
    made = predictor(cfg)
    seen = input_of(made, made.prepare("x", image))
    assert seen[0, :, 0, 0].tolist() == [0, 0, 200]


def test_class_map_reaches_the_labels() -> None:
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    made = predictor(config("inference=original_size", "model.class_map=[null,7,149,null]"), Fixed(4))
    assert set(labels_of(made, made.prepare("x", image)).unique().tolist()) <= {7, 149}
    assert "148 of the 150" in made.notes()[0]


# what cannot work is reported before, or at, the first image


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_nan_and_infinity_are_noticed(spoil: float) -> None:
    made = predictor(config("inference=original_size"), Fixed(spoil=spoil))
    prepared = made.prepare("ADE_val_1", np.zeros((20, 30, 3), np.uint8))
    [prediction] = made.predict([prepared], CPU, Stopwatch(CPU))
    assert prediction.invalid_share is not None
    assert prediction.invalid_share > 0  # the counter refuses it: tests/cli


def test_wrong_number_of_channels() -> None:
    made = predictor(config("inference=original_size"), Fixed(32))
    with pytest.raises(HarnessError, match="outputs 32 channels"):
        labels_of(made, made.prepare("x", np.zeros((20, 30, 3), np.uint8)))
    with pytest.raises(HarnessError, match="outputs 32 channels"):  # known before the first image
        predictor(config("inference=original_size"), Fixed(32), channels=32)


def test_a_model_that_fails_is_reported_with_its_input() -> None:
    made = predictor(config("inference=original_size"), nn.Linear(7, 7))
    with pytest.raises(HarnessError, match=r"x: the model failed on an input of \[1, 3, 20, 30\]"):
        labels_of(made, made.prepare("x", np.zeros((20, 30, 3), np.uint8)))


class Raises(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise KeyError("missing feature")


class Doubles(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(2, 150, 5, 5)


class Empty(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, 150, 5, 0)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Raises(), r"x: the model failed .* \(KeyError: 'missing feature'\)"),
        (Doubles(), r"returned \[2, 150, 5, 5\] for an input of \[1, 3, 20, 30\]"),
        (Empty(), r"returned \[1, 150, 5, 0\]"),
    ],
)
def test_models_that_misbehave(module: nn.Module, message: str) -> None:
    made = predictor(config("inference=original_size"), module)
    with pytest.raises(HarnessError, match=message):
        labels_of(made, made.prepare("x", np.zeros((20, 30, 3), np.uint8)))


def test_protocols_that_a_model_cannot_take() -> None:
    made = predictor(config("inference=mmseg_whole_512"), fixed_size=(512, 512))
    with pytest.raises(HarnessError, match="takes 512x512 .* makes 683x512. Choose inference=fit_512"):
        made.check({"a": (512, 683)})
    predictor(config("inference=fit_512"), fixed_size=(512, 512)).check({"a": (512, 683), "b": (10, 3000)})
    small = predictor(config("inference=fit_512", "inference.resize.pad_to=[256,512]"))
    with pytest.raises(HarnessError, match="a: 512x384 .* does not fit"):
        small.check({"a": (384, 512)})
    with pytest.raises(HarnessError, match="a: inference=fit_input scales the image to 8x0"):
        predictor(config("inference.resize.rule=longest_side", "inference.resize.side=8")).check({"a": (10, 3000)})


def test_an_unknown_file_is_fitted_and_the_guess_is_noted() -> None:
    made = predictor(config("inference=fit_input"), fixed_size=(64, 96))
    made.check({"a": (512, 683), "b": (683, 512)})
    prepared = made.prepare("a", np.full((512, 683, 3), 200, np.uint8))
    images = input_of(made, prepared)
    assert images.shape == (1, 3, 64, 96)
    assert prepared.pixels[0].shape == (64, 85, 3)
    assert images[0, :, :, 85:].abs().max() == 0  # the mean colour
    assert "not a published protocol" in " ".join(made.notes())
    free = predictor(config("inference=fit_input"))
    assert free.prepare("a", np.zeros((30, 40, 3), np.uint8)).pixels[0].shape == (30, 40, 3)


def test_legacy_bilinear_equals_its_definition() -> None:
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    found = legacy_bilinear(scores[None], (7, 11))[0]
    for y in range(7):
        for x in range(11):
            v, u = y * 3 / 7, x * 5 / 11
            top, left = int(v), int(u)
            bottom, right = min(top + 1, 2), min(left + 1, 4)
            a = scores[:, top, left] * (1 - (u - left)) + scores[:, top, right] * (u - left)
            b = scores[:, bottom, left] * (1 - (u - left)) + scores[:, bottom, right] * (u - left)
            assert torch.allclose(
                found[:, y, x], a * (1 - (v - top)) + b * (v - top), atol=1e-6
            )  # order of float32 sums


@pytest.mark.parametrize("sizes", [((5, 9), (13, 4)), ((8, 8), (8, 8)), ((3, 100), (50, 7))])
def test_labels_are_resized_as_pillow_does(sizes: Any) -> None:
    (h, w), (height, width) = sizes
    labels = np.random.default_rng(0).integers(0, 150, (h, w)).astype(np.uint8)
    expected = np.array(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))
    assert np.array_equal(resize_labels(torch.from_numpy(labels), (height, width)).numpy(), expected)


# label files


def write_labels(folder: Path, name: str, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(labels).save(folder / f"{name}.png")


@pytest.mark.parametrize(
    ("encoding", "stored", "expected"),
    [("official", [0, 1, 150], [255, 0, 149]), ("zero_based", [0, 149, 255], [0, 149, 255])],
)
def test_label_files(tmp_path: Path, encoding: str, stored: list[int], expected: list[int]) -> None:
    write_labels(tmp_path / "p", "a", np.array([stored], np.uint8))
    made = FolderPredictor(tmp_path / "p", encoding, ade20k_classes())
    prepared = made.prepare("a", np.zeros((1, 3, 3), np.uint8))
    assert labels_of(made, prepared).tolist() == [expected]
    made.check({"a": (1, 3)})
    with pytest.raises(HarnessError, match=r"1 of 2 label files are missing, the first is b\.png"):
        made.check({"a": (1, 3), "b": (1, 3)})


@pytest.mark.parametrize(
    ("encoding", "labels", "message"),
    [
        ("official", np.full((2, 2), 255, np.uint8), "holds the value 255; expected 0 .none. and 1..150"),
        ("zero_based", np.full((2, 2), 150, np.uint8), "holds the value 150; expected 0..149 and 255"),
        ("official", np.zeros((3, 2), np.uint8), "the image is 2x2: label files must have the original"),
        ("official", np.zeros((2, 2, 3), np.uint8), "a colour image, expected one 8-bit channel"),
    ],
)
def test_bad_label_files(tmp_path: Path, encoding: str, labels: np.ndarray, message: str) -> None:
    write_labels(tmp_path / "p", "a", labels)
    with pytest.raises(HarnessError, match=message):
        FolderPredictor(tmp_path / "p", encoding, ade20k_classes()).prepare("a", np.zeros((2, 2, 3), np.uint8))


def test_label_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no such folder"):
        FolderPredictor(tmp_path / "x", "official", ade20k_classes())


def test_label_hash_depends_on_every_pixel() -> None:
    labels = torch.zeros(5, 6, dtype=torch.uint8)
    first = label_hash(labels)
    assert label_hash(labels.clone()) == first
    labels[4, 5] = 1
    assert label_hash(labels) != first
