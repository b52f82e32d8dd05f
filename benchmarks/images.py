"""Synthetic images and scores for the benchmarks: real ADE20K sizes, file sizes like real ones, no download."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ade_harness.data.ade20k import validation_sizes

CLASSES = 150
BITS_PER_PIXEL = 1.3
_TILE = 1024
_RECIPE = 1
"""Raise it when what `make_folder` writes changes: folders of another recipe are made again."""

Size = tuple[int, int]


def sample_ids(count: int) -> list[str]:
    """Return validation ids at equal quantiles of pixel count, in the order of ids.

    Args:
        count: how many, at most 2,000.
    """
    sizes = validation_sizes()
    by_pixels = sorted(sizes, key=lambda i: (sizes[i][0] * sizes[i][1], i))
    return sorted(by_pixels[int((k + 0.5) * len(by_pixels) / count)] for k in range(count))


def make_folder(folder: Path, count: int = 64, seed: int = 0) -> list[tuple[Path, Path]]:
    """Write an ADEChallengeData2016 tree of synthetic images, unless it is there already.

    Each image has the official size of the id that it bears. Pixels are warped Voronoi regions with 1/f texture,
    as JPEG 4:2:0 of about 1.3 bits a pixel; annotations are the regions' labels, 0 to 150.

    Args:
        folder: the new ADEChallengeData2016.
        count: how many images; sizes are taken at equal quantiles of pixel count.
        seed: the same seed gives the same pixels.

    Returns:
        (image, annotation) paths in the order of ids.
    """
    folder = Path(folder)
    images, annotations = folder / "images" / "validation", folder / "annotations" / "validation"
    ids = sample_ids(count)
    pairs = [(images / f"{i}.jpg", annotations / f"{i}.png") for i in ids]
    recipe = {"recipe": _RECIPE, "seed": seed, "ids": ids}
    marker = folder / "made_up.json"
    known = json.loads(marker.read_text()) if marker.exists() else None
    if known == {**recipe, "complete": True} and all(path.exists() for pair in pairs for path in pair):
        return pairs
    if known is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds files that were not made here: give make_folder a new folder.")
    for parent in (images, annotations):
        parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({**recipe, "complete": False}))
    for path in [*images.iterdir(), *annotations.iterdir()]:
        path.unlink()
    rough, smooth = _noise_tile(seed, 1.0), _noise_tile(seed + 1, 2.0)
    sizes = validation_sizes()
    for image_id, (image_path, annotation_path) in zip(ids, pairs, strict=True):
        random = np.random.default_rng([seed, int(image_id.rsplit("_", 1)[1])])
        pixels, labels = _scene(sizes[image_id], rough, smooth, random)
        image_path.write_bytes(_jpeg(pixels))
        Image.fromarray(labels).save(annotation_path, optimize=True)
    marker.write_text(json.dumps({**recipe, "complete": True}))
    return pairs


def stride4_logits(size: Size, kind: str = "confident", seed: int = 0) -> Tensor:
    """Return synthetic scores at a quarter of a network's input size: float32 [150, ceil(h / 4), ceil(w / 4)].

    Args:
        size: (height, width) of the network's input.
        kind: "white" is independent normal numbers, the worst case for anything that skips work; "confident" is like
            a trained network: regions with +8 on their class, and smooth noise on all classes.
        seed: the same seed gives the same numbers.

    Raises:
        ValueError: another kind.
    """
    height, width = -(-size[0] // 4), -(-size[1] // 4)
    generator = torch.Generator().manual_seed(seed)
    if kind == "white":
        return torch.randn(CLASSES, height, width, generator=generator)
    if kind != "confident":
        raise ValueError(f"kind {kind!r}: white or confident")
    coarse = torch.randn(1, CLASSES, height // 8 + 2, width // 8 + 2, generator=generator)
    scores = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)[0].contiguous()
    random = np.random.default_rng([seed, height, width])
    regions = torch.from_numpy(_voronoi((height, width), _noise_tile(seed + 1, 2.0, 256), random, cells=30, warp=5.0))
    classes = torch.from_numpy(_classes(30, random) % CLASSES)[regions]
    return scores.scatter_add_(0, classes[None], torch.full((1, height, width), 8.0))


def _noise_tile(seed: int, power: float, side: int = _TILE) -> npt.NDArray[np.float32]:
    """Return a square of 1/f**power noise, mean 0 and deviation 1, that can be repeated without a seam."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    tile = np.fft.irfft2(np.fft.rfft2(random.standard_normal((side, side))) / frequency**power, (side, side))
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)


def _cut(tile: npt.NDArray[np.float32], size: Size, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return a piece of the endless repetition of a tile, from a random place."""
    top, left = random.integers(0, tile.shape[0], 2)
    rows, columns = (np.arange(n) + start for n, start in zip(size, (top, left), strict=True))
    return tile.take(rows, 0, mode="wrap").take(columns, 1, mode="wrap")


def _voronoi(
    size: Size, tile: npt.NDArray[np.float32], random: np.random.Generator, cells: int, warp: float
) -> npt.NDArray[np.int64]:
    """Return the number of the nearest of some random points, the coordinates shaken by the tile: [H, W]."""
    height, width = size
    y = np.arange(height, dtype=np.float32)[:, None] + warp * _cut(tile, size, random)
    x = np.arange(width, dtype=np.float32)[None] + warp * _cut(tile, size, random)
    points = random.random((cells, 2)) * size
    best = np.full(size, np.inf, np.float32)
    nearest = np.zeros(size, np.int64)
    for cell, (cy, cx) in enumerate(points.astype(np.float32)):
        distance = (y - cy) ** 2 + (x - cx) ** 2
        nearer = distance < best
        np.copyto(best, distance, where=nearer)
        nearest[nearer] = cell
    return nearest


def _classes(cells: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return a class for each region, 1 to 150: few frequent ones and a long tail, as in ADE20K."""
    weights = 1.0 / np.arange(1, CLASSES + 1)
    return random.choice(CLASSES, cells, p=weights / weights.sum()) + 1


def _scene(
    size: Size, rough: npt.NDArray[np.float32], smooth: npt.NDArray[np.float32], random: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return an image [H, W, 3] and its annotation [H, W], 0 where nothing is labelled."""
    cells = 32
    regions = _voronoi(size, smooth, random, cells, warp=20.0)
    classes = _classes(cells, random)
    classes[random.random(cells) < 0.08] = 0
    colours = random.uniform(50, 205, (cells, 3)).astype(np.float32)
    roughness = random.uniform(2, 12, cells).astype(np.float32)
    grey = _cut(rough, size, random)
    fine = grey - cv2.GaussianBlur(grey, (0, 0), 8)  # what is left of 1/f noise without its large spots
    texture = (grey + 2 * fine) * roughness[regions]
    pixels = colours[regions] + texture[..., None]
    pixels += 1.5 * np.stack([_cut(rough, size, random) for _ in range(3)], -1)
    return np.clip(pixels, 0, 255).astype(np.uint8), classes[regions].astype(np.uint8)


def _jpeg(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return the JPEG 4:2:0 whose size is the nearest to the wanted bits a pixel, by search over quality."""
    wanted = pixels.shape[0] * pixels.shape[1] * BITS_PER_PIXEL / 8
    image = Image.fromarray(pixels)
    low, high = 35, 97
    tried: list[bytes] = []
    while low <= high:
        quality = (low + high) // 2
        buffer = BytesIO()
        image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        tried.append(buffer.getvalue())
        if len(tried[-1]) < wanted:
            low = quality + 1
        else:
            high = quality - 1
    return min(tried, key=lambda data: abs(len(data) - wanted))
