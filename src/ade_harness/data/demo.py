"""A synthetic data set in exactly the layout and format of ADEChallengeData2016, from a seed.

It lets the whole harness run with no download: regions of the 150 classes with a colour and a stripe texture of
their own, uneven light, sensor noise, unlabelled areas, grey-scale JPEGs, and the real distribution of image
sizes scaled down. A score on it shows that the harness works; it is not an ADE20K score.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ade_harness.data.ade20k import open_ade20k, validation_sizes
from ade_harness.data.ade20k_labels import NUM_CLASSES, ade20k_info
from ade_harness.data.dataset import SegmentationDataset, select
from ade_harness.errors import HarnessError

GENERATOR_VERSION = 1
"""Part of the cache folder's name: raise it with any change of the pixels."""
VALIDATION_SEED = 2016
"""The embedded demo's images; the packaged network was trained on other seeds."""
TRAINING_SEED = 2017
"""Seed of the training split, for probes."""
SCALE = 4
"""Real sizes are divided by this."""
_GREY_SHARE = 0.03
_UNLABELLED_SHARE = 0.08


def class_colors() -> npt.NDArray[np.float32]:
    """Return float32 [150, 3]: a 6 x 5 x 5 lattice of RGB, shuffled so that neighbours in the list differ."""
    lattice = np.stack(
        np.meshgrid(np.linspace(35, 220, 6), np.linspace(40, 215, 5), np.linspace(40, 215, 5), indexing="ij"),
        -1,
    ).reshape(NUM_CLASSES, 3)
    return lattice[np.random.default_rng(150).permutation(NUM_CLASSES)].astype(np.float32)


def make_sample(seed: int, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], bool]:
    """Draw one image.

    Image number `index` always holds class ``index % 150 + 1``, so 150 images in a row hold all classes.

    Returns:
        image uint8 [H, W, 3]; annotation uint8 [H, W] with 0 and 1..150; whether to store it as grey-scale JPEG.
    """
    rng = np.random.default_rng([seed, index])
    real = list(validation_sizes().values())
    height, width = (max(48, side // SCALE) for side in real[rng.integers(len(real))])
    annotation = _layout(rng, index, height, width)
    grey = bool(rng.random() < _GREY_SHARE)
    return _render(rng, annotation), annotation, grey


def _layout(rng: np.random.Generator, index: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Warped Voronoi regions, classes drawn with a softened ADE20K frequency, some regions unlabelled."""
    regions = int(rng.integers(6, 15))
    ratio = np.sqrt([c.pixel_ratio for c in ade20k_info()])
    labels = rng.choice(NUM_CLASSES, regions, replace=False, p=ratio / ratio.sum()) + 1
    labels[rng.random(regions) < _UNLABELLED_SHARE] = 0
    labels[0] = index % NUM_CLASSES + 1
    sites = rng.random((regions, 2)) * (height, width)
    sites[0] = (height, width) * rng.uniform(0.3, 0.7, 2)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, 4)
    y += 4 * np.sin(x / 11 + phase[0]) + 2 * np.sin(x / 5 + phase[1])
    x += 4 * np.sin(y / 13 + phase[2]) + 2 * np.sin(y / 6 + phase[3])
    distance = (y[..., None] - sites[:, 0]) ** 2 + (x[..., None] - sites[:, 1]) ** 2
    distance[..., 0] *= 0.8  # the required class is never squeezed out
    annotation: npt.NDArray[np.uint8] = labels[distance.argmin(-1)].astype(np.uint8)
    return annotation


def _render(rng: np.random.Generator, annotation: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    height, width = annotation.shape
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    table = np.vstack([[[128, 128, 128]], class_colors()]).astype(np.float32)
    table += rng.normal(0, 7, table.shape).astype(np.float32)  # the same class looks different in every image
    image = table[annotation]
    orientation, period = annotation % 4, 3 + annotation % 3
    angle = orientation * np.float32(np.pi / 4)
    stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / period))
    image += (14 * stripes)[..., None]
    light = (x / width - 0.5) * rng.normal(0, 14) + (y / height - 0.5) * rng.normal(0, 14)
    image += light[..., None] + rng.normal(0, 9, image.shape).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def write_dataset(root: Path, images: int, seed: int = VALIDATION_SEED, split: str = "validation") -> Path:
    """Write `images` pairs below ``root/ADEChallengeData2016``; an existing whole copy is reused.

    The folder appears under its name only when all files are written, so an interrupted call leaves no half set.

    Returns:
        The folder ADEChallengeData2016.
    """
    final = root / "ADEChallengeData2016"
    if final.exists():
        return final
    prefix = "ADE_val_" if split == "validation" else "ADE_train_"
    try:
        root.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".writing-", dir=root))
        for folder in ("images", "annotations"):
            (work / folder / split).mkdir(parents=True)
        for index in range(images):
            image, annotation, grey = make_sample(seed, index)
            stem = f"{prefix}{index + 1:08d}"
            picture = Image.fromarray(image)
            (picture.convert("L") if grey else picture).save(work / "images" / split / f"{stem}.jpg", quality=90)
            Image.fromarray(annotation).save(work / "annotations" / split / f"{stem}.png")
        names = "".join(f"{c.index + 1}\t{', '.join(c.names)}\n" for c in ade20k_info())
        (work / "objectInfo150.txt").write_text("Idx\tName\n" + names)
        work.chmod(0o755)  # mkdtemp's folders are for one user only
        try:
            work.rename(final)
        except OSError:
            if not final.exists():  # otherwise another process was faster, with the same bytes
                raise
            shutil.rmtree(work)
    except OSError as error:
        raise HarnessError(
            f"{root}: the demo data set cannot be written ({error.strerror or error})."
            " Set ADE_HARNESS_CACHE to a folder with some free space."
        ) from error
    return final


def open_demo(
    cache: Path, images: int, limit: int | None = None, ids: list[str] | None = None, split: str = "validation"
) -> SegmentationDataset:
    """Write a split of the demo set into `cache` if it is not there, and open it."""
    seed = VALIDATION_SEED if split == "validation" else TRAINING_SEED
    root = write_dataset(cache / f"demo-v{GENERATOR_VERSION}-{seed}-{images}", images, seed, split)
    opened = open_ade20k(root, split)
    pairs = select(opened.pairs, limit, ids, root)
    return replace(opened, name="demo", pairs=pairs, expected_images=images, is_demo=True, is_official=False)
