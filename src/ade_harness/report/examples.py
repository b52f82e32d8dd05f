"""Pictures of a page: one image with truth, predictions and errors as layers that the browser puts together."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ade_harness.config.compose import stored_node
from ade_harness.config.dataset import DatasetConfig
from ade_harness.data.dataset import Sample, SegmentationDataset
from ade_harness.data.factory import open_dataset
from ade_harness.data.labels import IGNORE_INDEX, NO_CLASS, Classes
from ade_harness.errors import HarnessError
from ade_harness.metrics.counts import Row
from ade_harness.metrics.regions import Regions, add_regions, find_regions
from ade_harness.runs.finished import FinishedRun
from ade_harness.runs.label_maps import FOLDER, read_label_map
from ade_harness.runs.record import is_own

_MAX_SIDE = 480
_JPEG_QUALITY = 80
_LEGEND = 8
# orange and blue are a colour-blind safe pair; grey is right
_RIGHT, _WRONG, _NOT_COUNTED = (208, 208, 208), (213, 94, 0), (70, 70, 70)


@dataclass(frozen=True)
class Layer:
    """One way to look at an image: a data URL, and what it is."""

    name: str
    source: str


@dataclass(frozen=True)
class Example:
    """An image with its layers, all of one size."""

    image_id: str
    caption: str
    width: int
    height: int
    image: str
    """Data URL of the image itself."""
    layers: tuple[Layer, ...]
    legend: tuple[tuple[str, str], ...]
    """(class name, CSS colour) of the classes that cover most."""
    class_names: tuple[str, ...]
    """Names of the classes that are in the ground truth, in the order of the data set."""


def kept_images(run: FinishedRun) -> set[str]:
    """Return the images whose label maps a run has kept."""
    folder = run.path / FOLDER
    return {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.png")}


def reopen_dataset(run: FinishedRun) -> tuple[SegmentationDataset | None, str | None]:
    """Open the data set of a run once more.

    Returns:
        The data set, or None and the reason why it cannot be opened.
    """
    if not is_own(run.path, run.manifest):  # it may name any folder of this machine, or ask for thousands of images
        return None, f"{run.name} was not made by you on this machine, so its data set is not opened"
    try:
        dataset: DatasetConfig = stored_node(DatasetConfig, run.config["dataset"])
        return open_dataset(dataset, run.config["inference"]["exif"]), None
    except HarnessError as error:
        return None, str(error)


class Samples:
    """The pairs of a run's data set, checked to be the files that were evaluated."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset
        self._index = {image_id: index for index, image_id in enumerate(dataset.ids)}

    def load(self, row: Row) -> Sample | None:
        """Return an image with its truth; None if it is not there, or is not what the ledger has counted."""
        if row.image_id not in self._index:
            return None
        try:
            sample = self._dataset.load(self._index[row.image_id])
        except HarnessError:
            return None
        return sample if row.content_hash == sample.content_hash else None


def make_examples(
    named: Sequence[tuple[str, FinishedRun]], samples: Samples, chosen: Sequence[tuple[str, str]]
) -> list[Example]:
    """Draw images with the predictions of one run or of several.

    Args:
        named: (name of the layer, run) of each run.
        samples: the images.
        chosen: (image id, caption).

    Returns:
        In the order of `chosen`, without those that cannot be drawn.
    """
    rows = [{row.image_id: row for row in run.rows} for _, run in named]
    drawn = []
    for image_id, caption in chosen:
        sample = samples.load(rows[0][image_id])
        maps = [read_label_map(run.path, of[image_id]) for (_, run), of in zip(named, rows, strict=True)]
        if sample is not None and all(labels is not None for labels in maps):
            found = [(name, labels) for (name, _), labels in zip(named, maps, strict=True) if labels is not None]
            drawn.append(_draw(image_id, caption, sample, found, named[0][1].classes))
    return drawn


def _draw(
    image_id: str,
    caption: str,
    sample: Sample,
    maps: Sequence[tuple[str, npt.NDArray[np.uint8]]],
    classes: Classes,
) -> Example:
    height, width = sample.target.shape
    scale = min(1.0, _MAX_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    layers = [Layer("truth", _indexed(sample.target, size, classes.palette))]
    for name, labels in maps:
        several = len(maps) > 1
        layers.append(
            Layer(f"prediction of {name}" if several else "prediction", _indexed(labels, size, classes.palette))
        )
        states = np.where(sample.target == IGNORE_INDEX, 2, labels != sample.target).astype(np.uint8)
        colors = np.array([_RIGHT, _WRONG, _NOT_COUNTED], np.uint8)
        layers.append(Layer(f"errors of {name}" if several else "errors", _indexed(states, size, colors)))
    seen = np.concatenate([sample.target.reshape(-1), *(labels.reshape(-1) for _, labels in maps)])
    counts = np.bincount(seen, minlength=256)
    counts[[IGNORE_INDEX, NO_CLASS]] = 0
    names, colors = classes.names, classes.palette
    largest = [int(c) for c in np.argsort(-counts, kind="stable")[:_LEGEND] if counts[c]]
    legend = tuple((names[c], "#" + "".join(f"{v:02x}" for v in colors[c])) for c in largest)
    picture = Image.fromarray(sample.image).resize(size, Image.Resampling.LANCZOS)
    present = tuple(names[c] for c in np.unique(sample.target) if c < len(names))
    return Example(image_id, caption, *size, data_url(picture, "JPEG"), tuple(layers), legend, present)


def _indexed(values: npt.NDArray[np.uint8], size: tuple[int, int], colors: npt.NDArray[np.uint8]) -> str:
    """Return a palette PNG of a map: a tenth of its size in RGB."""
    picture = Image.fromarray(values).resize(size, Image.Resampling.NEAREST)
    picture.putpalette(colors.tobytes())
    return data_url(picture, "PNG")


def data_url(picture: Image.Image, kind: str) -> str:
    """Return a picture as a data URL, JPEG or PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": _JPEG_QUALITY} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()


def measure_regions(
    run: FinishedRun, samples: Samples, workers: int, progress: Callable[[Iterable[Regions], int], Iterable[Regions]]
) -> Regions | None:
    """Count boundaries, bands and objects of all images; None unless the run has kept every label map.

    Args:
        run: what was evaluated.
        samples: the images.
        workers: threads; OpenCV leaves the interpreter's lock.
        progress: wraps the images' results, for a progress bar.
    """
    if not set(kept_images(run)).issuperset(row.image_id for row in run.rows):
        return None

    def measure(row: Row) -> Regions | None:
        sample, labels = samples.load(row), read_label_map(run.path, row)
        return None if sample is None or labels is None else find_regions(sample.target, labels, len(run.classes))

    with ThreadPoolExecutor(workers) as pool:
        found = [r for r in progress(pool.map(measure, run.rows), len(run.rows)) if r is not None]  # type: ignore[arg-type]
    return add_regions(found, len(run.classes)) if len(found) == len(run.rows) else None
