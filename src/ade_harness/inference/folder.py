"""Label maps that any framework wrote, in place of a network."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ade_harness.config.schema import Config
from ade_harness.data.containers import MAX_FILE_BYTES, check_pixels
from ade_harness.data.decode import decode_labels
from ade_harness.data.labels import NO_CLASS, Classes, Color, LabelStorage
from ade_harness.errors import HarnessError, require
from ade_harness.files.reading import expanded, read_regular
from ade_harness.inference.predictor import Prepared, ReadyLabels
from ade_harness.kernels.views import Size
from ade_harness.runtime.queue import Loaders


def classes_of_stored(stored: npt.NDArray[np.uint8], encoding: str, name: str, classes: int) -> npt.NDArray[np.uint8]:
    """Return the classes of a stored label map, uint8 [H, W]: 0..C-1, 255 for none.

    Args:
        stored: uint8 [H, W], the file's own values.
        encoding: "official" (0 void, 1..C) or "zero_based" (0..C-1, 255 void).
        name: how messages call the file.
        classes: their number C.

    Raises:
        HarnessError: a value that the encoding does not have.
    """
    table = np.full(256, NO_CLASS, np.uint8)
    allowed = np.zeros(256, bool)
    if encoding == "official":
        table[1 : classes + 1] = np.arange(classes)
        allowed[: classes + 1] = True
        expected = (
            f"0 (none) and 1..{classes} (model.encoding=official); 0..{classes - 1} with 255 is"
            " model.encoding=zero_based"
        )
    else:
        table[:classes] = np.arange(classes)
        allowed[:classes] = True
        allowed[NO_CLASS] = True
        expected = (
            f"0..{classes - 1} and 255 (none) (model.encoding=zero_based); 0..{classes} is model.encoding=official"
        )
    wrong = np.unique(stored[~allowed[stored]])
    if wrong.size:
        raise HarnessError(f"{name}: holds the value {wrong[0]}; expected {expected}.")
    labels: npt.NDArray[np.uint8] = table[stored]
    return labels


_ZERO_BASED = "_zero_based"


class FolderPredictor(ReadyLabels):
    """Takes the label maps from files ``<image id>.png`` (or ``.npy``) made by any framework.

    Args:
        folder: where they are.
        encoding: ``model.encoding``: what values mean, and how files store them.
        classes: of the data set.

    Raises:
        HarnessError: no such folder.
    """

    def __init__(self, folder: Path, encoding: str, classes: Classes) -> None:
        if not folder.is_dir():
            raise HarnessError(f"model.path={folder}: no such folder.")
        self.folder = folder
        zero_based = encoding == "zero_based" or encoding.endswith(_ZERO_BASED) or encoding == "colour"
        self.values = "zero_based" if zero_based else "official"
        kind = encoding.removesuffix(_ZERO_BASED)
        self.suffix = ".npy" if kind == "npy" else ".png"
        self.storage = LabelStorage(
            "grey" if kind in ("official", "zero_based", "npy") else kind, _colors(classes, zero_based), _ADVICE
        )
        self.classes = len(classes)

    def check(self, sizes: Mapping[str, Size]) -> None:
        """Refuse a folder in which images have no file."""
        missing = [i for i in sizes if not self._path(i).is_file()]
        if missing:
            raise HarnessError(
                f"{self.folder}: {len(missing)} of {len(sizes)} label files are missing, the first is"
                f" {missing[0]}{self.suffix}. Every image needs one; dataset.ids or dataset.limit evaluate fewer."
            )

    def facts(self) -> dict[str, Any]:
        """Return where the label maps were."""
        return {"origin": str(self.folder)}

    def loaders(self, workers: int | None, rank: int, world_size: int) -> Loaders:
        """Return as many as ``runtime.workers`` says."""
        return Loaders(workers)

    def stop(self) -> None:
        """Nothing is waited for."""

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Read the image's label file and check it."""
        path, content = self._path(image_id), self._read(image_id)
        if self.suffix == ".npy":
            stored = _read_array(content, str(path))
        else:
            stored = decode_labels(content, str(path), self.storage)
        if stored.shape != image.shape[:2]:
            raise HarnessError(
                f"{path}: {stored.shape[1]}x{stored.shape[0]} (width x height), the image is"
                f" {image.shape[1]}x{image.shape[0]}: label files must have the original image's size."
            )
        labels = torch.from_numpy(classes_of_stored(stored, self.values, str(path), self.classes))
        return Prepared(image_id, (labels,), (image.shape[0], image.shape[1]))

    def source_hash(self, image_id: str) -> str:
        """Return BLAKE2b of the image's label file."""
        return hashlib.blake2b(self._read(image_id), digest_size=16).hexdigest()

    def _path(self, image_id: str) -> Path:
        return self.folder / f"{image_id}{self.suffix}"

    def _read(self, image_id: str) -> bytes:
        return read_regular(self._path(image_id), MAX_FILE_BYTES)

    def notes(self) -> list[str]:
        """Nothing to remark."""
        return []


_ADVICE = (
    "If you know how the labels are stored, say so: model.encoding=palette_index (the indices), palette_colour (the"
    " grey levels of the palette), colour, uint16 or npy (docs/models.md)."
)


def _colors(classes: Classes, zero_based: bool) -> tuple[Color | None, ...]:
    """Return the colour of each stored value; unlabelled is black."""
    colors: list[Color | None] = [None] * 256
    first = 0 if zero_based else 1
    colors[first : first + len(classes)] = classes.colors
    colors[NO_CLASS if zero_based else 0] = (0, 0, 0)
    return tuple(colors)


def _read_array(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """Return the array of an .npy file as uint8 [H, W]; raises HarnessError for anything but integers of 0..255."""
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        expected = f"{name}: expected integers [H, W] of 0..255, it holds {dtype} {list(shape)}."
        require(len(shape) == 2 and dtype.kind in "iu" and not dtype.hasobject, expected)
        check_pixels(shape[0], shape[1], name, "label map")
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except HarnessError:
        raise
    except Exception as error:  # NumPy reads a header by Python's own parser, which fails in many ways
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HarnessError(f"{name}: is not a .npy file ({reason}).") from error
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= 255:
        raise HarnessError(f"{name}: holds values of {int(array.min())}..{int(array.max())}; labels are 0..255.")
    return np.asarray(array, np.uint8)


def open_folder(cfg: Config, classes: Classes) -> FolderPredictor:
    """Open ``model.path``; raises as :class:`FolderPredictor`."""
    return FolderPredictor(expanded(cfg.model.path or ""), cfg.model.encoding, classes)
