"""Pictures of single images: image, truth, prediction, errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ade_harness.data.labels import IGNORE_INDEX, NO_CLASS, Classes
from ade_harness.files.atomic import replaced

MASKS = ".npz"
"""Beside an overlay: what it was drawn from, as ``image``, ``truth`` and ``prediction``."""
_GAP = 6
_CAPTION = 22
_MIN_PANEL_HEIGHT = 240
_MAX_PANEL_WIDTH = 2000
"""Of a panel that is enlarged: of a strip, the height alone would make a picture that no viewer opens."""
_LEGEND_WIDTH = 190
_WRONG = (214, 39, 40)
_RIGHT = (225, 225, 225)
_IGNORED = (60, 60, 60)


def draw_overlay(
    image: npt.NDArray[np.uint8],
    target: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    classes: Classes,
    marks: Sequence[str] = (),
) -> Image.Image:
    """Draw four panels side by side, with the classes that cover most.

    Args:
        image: uint8 [H, W, 3] RGB.
        target: uint8 [H, W], 255 where nothing is counted.
        labels: uint8 [H, W].
        classes: of the data set.
        marks: written below the panels.
    """
    colors = classes.palette
    valid = target != IGNORE_INDEX
    errors = np.full((*target.shape, 3), _IGNORED, np.uint8)
    errors[valid & (labels == target)] = _RIGHT
    errors[valid & (labels != target)] = _WRONG
    right = (labels == target)[valid].mean() if valid.any() else 0.0
    half = image // 2
    panels = {
        "image": image,
        "truth: " + _largest(target[valid], classes): half + colors[target] // 2,
        "prediction: " + _largest(labels[labels != NO_CLASS], classes): half + colors[labels] // 2,
        f"errors: {right:.1%} of valid pixels right (red wrong, dark not counted)": errors,
    }
    scale = _scale_of(*image.shape[:2])
    height, width = image.shape[0] * scale, image.shape[1] * scale
    canvas = Image.new("RGB", (4 * width + 3 * _GAP, height + _CAPTION * (1 + bool(marks))), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(13)
    for column, (caption, pixels) in enumerate(panels.items()):
        left = column * (width + _GAP)
        panel = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(panel, (left, _CAPTION))
        text = caption[:width]  # a character is wider than a pixel, so most of it will do
        while draw.textlength(text, font=font) > width and len(text) > 4:
            text = text[:-4] + "..."
        draw.text((left + 2, 3), text, fill="black", font=font)
    if marks:
        draw.text((2, height + _CAPTION + 3), "; ".join(marks)[: canvas.width], fill=_WRONG, font=font)
    return canvas


def _scale_of(height: int, width: int) -> int:
    """Return how many times a small image is enlarged."""
    return max(1, min(-(-_MIN_PANEL_HEIGHT // height), _MAX_PANEL_WIDTH // width))


def draw_prediction(
    image: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], classes: Classes, maximum: int = 12
) -> Image.Image:
    """Draw an image beside its labels in the data set's colours, above a legend of the largest classes.

    Args:
        image: uint8 [H, W, 3] RGB.
        labels: uint8 [H, W]: 0..C-1, 255 for void.
        classes: of the data set.
        maximum: classes in the legend.
    """
    scale = _scale_of(*image.shape[:2])
    size = image.shape[1] * scale, image.shape[0] * scale
    colors = classes.palette
    pictures = image, image // 3 + colors[labels] // 3 * 2
    panels = [Image.fromarray(picture).resize(size, Image.Resampling.NEAREST) for picture in pictures]
    font = ImageFont.load_default(13)
    counts = np.bincount(labels[labels != NO_CLASS].reshape(-1), minlength=len(classes))
    shown = [int(c) for c in np.argsort(-counts, kind="stable")[:maximum] if counts[c]]
    width = max(2 * size[0] + _GAP, _LEGEND_WIDTH)
    columns = max(1, min(len(shown), width // _LEGEND_WIDTH))
    canvas = Image.new("RGB", (width, size[1] + _CAPTION * max(1, -(-len(shown) // columns))), "white")
    for column, panel in enumerate(panels):
        canvas.paste(panel, (column * (size[0] + _GAP), 0))
    draw = ImageDraw.Draw(canvas)
    for place, number in enumerate(shown):
        left, top = place % columns * _LEGEND_WIDTH, size[1] + place // columns * _CAPTION
        colour = tuple(int(value) for value in colors[number])
        draw.rectangle((left + 4, top + 5, left + 16, top + 17), fill=colour, outline="black")
        text = f"{classes.names[number]} {counts[number] / labels.size:.1%}"
        draw.text((left + 21, top + 4), text, fill="black", font=font)
    return canvas


def save_overlay(
    path: Path,
    image: npt.NDArray[np.uint8],
    target: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.uint8],
    classes: Classes,
    marks: Sequence[str] = (),
) -> None:
    """Write :func:`draw_overlay` as a PNG."""
    with replaced(path, durable=False) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_overlay(image, target, labels, classes, marks).save(temporary, "PNG")


def save_masks(
    path: Path, image: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]
) -> None:
    """Write what an overlay was drawn from; arguments as of :func:`draw_overlay`."""
    with replaced(path, durable=False) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, image=image, truth=target, prediction=labels)


def _largest(values: npt.NDArray[np.uint8], classes: Classes) -> str:
    counts = np.bincount(values.reshape(-1), minlength=1)
    names = classes.names
    return ", ".join(names[c] for c in np.argsort(-counts, kind="stable")[:4] if counts[c] and c < len(names))
