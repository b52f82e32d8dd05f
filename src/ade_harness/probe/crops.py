"""Training crops: everything random in crop n depends on the seed and n alone, whoever makes it and when.

The steps are those of mmsegmentation 0.x (Resize with a ratio, RandomCrop, RandomFlip, PhotoMetricDistortion,
Normalize, Pad), which DINOv3's transforms follow with other colour functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ade_harness.config.probe import ProbeConfig
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.labels import IGNORE_INDEX

Pixels = npt.NDArray[np.uint8]


@dataclass
class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Crop n of a training: image float32 [3, C, C], normalised, and target int64 [C, C] with 255 where none.

    Image n mod N of the data set's order shuffled anew for every round of N crops.
    """

    dataset: SegmentationDataset
    recipe: ProbeConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return int(self.recipe.iterations * self.recipe.batch)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        cv2.setNumThreads(0)  # loaders are processes
        images = len(self.dataset.pairs)
        order = np.random.default_rng([self.recipe.seed, 0, n // images]).permutation(images)
        rng = np.random.default_rng([self.recipe.seed, 1, n])
        sample = self.dataset.load(int(order[n % images]))
        image, target = make_crop(sample.image, sample.target, self.recipe, rng)
        return normalised(image, target, self.recipe.crop, self.mean, self.std)


def make_crop(image: Pixels, target: Pixels, recipe: ProbeConfig, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """Scale, crop, mirror and recolour one image; uint8 [h, w, 3] and [h, w], at most ``recipe.crop`` on a side."""
    side = int(recipe.side * rng.uniform(recipe.scale[0], recipe.scale[1]))
    height, width = image.shape[:2]
    factor = side / min(height, width)
    size = (max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5)))
    image, target = _resize(image, target, size, recipe.backend)
    top, left = _choose_crop(target, recipe, rng)
    box = (slice(top, top + recipe.crop), slice(left, left + recipe.crop))
    image, target = image[box], target[box]
    if rng.random() < recipe.flip:
        image, target = image[:, ::-1], target[:, ::-1]
    return distort(np.ascontiguousarray(image), recipe.distortion, rng), np.ascontiguousarray(target)


def _resize(image: Pixels, target: Pixels, size: tuple[int, int], backend: str) -> tuple[Pixels, Pixels]:
    """Resize to (height, width): bilinear and nearest, as the library of the recipe samples them."""
    shape = (size[1], size[0])
    if backend == "opencv":
        return (
            cv2.resize(image, shape, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False),
            cv2.resize(target, shape, interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False),
        )
    smooth, nearest = Image.Resampling.BILINEAR, Image.Resampling.NEAREST
    return (
        np.asarray(Image.fromarray(image).resize(shape, smooth)),
        np.asarray(Image.fromarray(target).resize(shape, nearest)),
    )


def _choose_crop(target: Pixels, recipe: ProbeConfig, rng: np.random.Generator) -> tuple[int, int]:
    """Draw (top, left); up to ten times more while one class fills more than ``most_of_one_class`` of the crop."""
    crop = recipe.crop
    for attempt in range(11):
        top, left = (int(rng.integers(0, max(length - crop, 0) + 1)) for length in target.shape)
        if recipe.most_of_one_class >= 1 or attempt == 10:
            break
        counts = np.bincount(target[top : top + crop, left : left + crop].reshape(-1), minlength=256)[:IGNORE_INDEX]
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < recipe.most_of_one_class:
            break
    return top, left


def distort(image: Pixels, kind: str, rng: np.random.Generator) -> Pixels:
    """Change brightness, contrast, saturation and hue, each with probability 1/2; contrast first or last.

    Args:
        image: uint8 [h, w, 3] RGB.
        kind: ``mmseg`` (saturation and hue in HSV, hue by up to 36 degrees), ``dinov3`` (saturation against grey, hue
            by up to half a turn), or ``none``.
        rng: of this crop.
    """
    if kind == "none":
        return image
    if rng.random() < 0.5:
        image = _linear(image, 1.0, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else None
    if contrast is not None and contrast_first:
        image = _linear(image, contrast, 0.0)
    if rng.random() < 0.5:
        image = _saturate(image, kind, rng.uniform(0.5, 1.5))
    if rng.random() < 0.5:
        turn = int(rng.integers(-18, 18)) if kind == "mmseg" else int(rng.uniform(-0.5, 0.5) * 180)
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + turn) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)
    if contrast is not None and not contrast_first:
        image = _linear(image, contrast, 0.0)
    return image


def _linear(image: Pixels, factor: float, offset: float) -> Pixels:
    changed: Pixels = np.clip(image.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
    return changed


def _saturate(image: Pixels, kind: str, factor: float) -> Pixels:
    if kind == "mmseg":
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _linear(hsv[..., 1], factor, 0.0)
        saturated: Pixels = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)
        return saturated
    grey = (image.astype(np.float32) @ np.array([0.2989, 0.587, 0.114], np.float32))[..., None]
    mixed: Pixels = np.clip(factor * image + (1 - factor) * grey, 0, 255).astype(np.uint8)
    return mixed


def normalised(
    image: Pixels, target: Pixels, crop: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Normalise, then pad right and below: the image with zeros, the target with 255."""
    height, width = target.shape
    pixels = (image.astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    planes = np.zeros((3, crop, crop), np.float32)
    planes[:, :height, :width] = pixels.transpose(2, 0, 1)
    labels = np.full((crop, crop), IGNORE_INDEX, np.int64)
    labels[:height, :width] = target
    return torch.from_numpy(planes), torch.from_numpy(labels)


class Share:
    """The crops of one rank from some step on: step by step, its part of each batch."""

    def __init__(self, recipe: ProbeConfig, first_step: int, rank: int, world_size: int) -> None:
        self.recipe = recipe
        self.first_step = first_step
        self.own = range(rank, recipe.batch, world_size)

    def __len__(self) -> int:
        return int(self.recipe.iterations - self.first_step)

    def __iter__(self):  # type: ignore[no-untyped-def]
        for step in range(self.first_step, self.recipe.iterations):
            yield [step * self.recipe.batch + n for n in self.own]
