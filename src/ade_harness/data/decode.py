"""Decode one image or label file from bytes, strictly.

Ordinary whole JPEGs go through OpenCV, which takes two thirds of Pillow's time for the same pixels (both are
libjpeg-turbo). Everything else goes through Pillow, which unlike OpenCV reports a truncated file instead of filling
it with grey.
"""

from __future__ import annotations

import io
import warnings

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ade_harness.errors import HarnessError

_EXIF_ORIENTATION = 0x0112
_JPEG_END = b"\xff\xd9"


def decode_image(data: bytes, name: str, apply_exif: bool = True) -> npt.NDArray[np.uint8]:
    """Decode an image file to RGB as the official loaders do.

    Grey and palette images are expanded to RGB, CMYK is converted, alpha is dropped.

    Args:
        data: the file's bytes.
        name: how error messages call the file.
        apply_exif: turn the image as its EXIF orientation says: mmsegmentation's and detectron2's loaders do,
            DINOv3's and EoMT's do not.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        HarnessError: the file is truncated or no image.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF and on very large images
            if image.format == "JPEG" and image.mode in ("RGB", "L") and data.endswith(_JPEG_END):
                turned = apply_exif and image.getexif().get(_EXIF_ORIENTATION, 1) != 1
                flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
                pixels = None if turned else cv2.imdecode(np.frombuffer(data, np.uint8), flags)
                if pixels is not None:
                    return np.asarray(pixels, np.uint8)
            image.load()
            upright = ImageOps.exif_transpose(image) if apply_exif else image
            return np.array(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HarnessError(_unreadable(name, "image", error)) from error


def decode_labels(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    """Decode a label PNG (8-bit grey, or palette indices) without any mapping.

    Returns:
        uint8 [H, W], the file's own values.

    Raises:
        HarnessError: the file is truncated, or not one 8-bit channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_label_mode(image.mode, name)
            return np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HarnessError(_unreadable(name, "label map", error)) from error


def check_label_mode(mode: str, name: str) -> None:
    """Refuse label files that are not one 8-bit channel (`mode` is Pillow's)."""
    if mode in ("L", "P"):
        return
    what = {
        "RGB": "a colour image",
        "RGBA": "a colour image",
        "I;16": "16-bit",
        "I": "16-bit or 32-bit",
        "1": "1-bit",
    }
    hint = ""
    if mode in ("RGB", "RGBA"):
        hint = (
            " Colour PNGs with the ending _seg.png belong to the full ADE20K (3,000 classes):"
            " this benchmark uses ADEChallengeData2016."
        )
    raise HarnessError(
        f"{name}: the label file is {what.get(mode, f'of mode {mode}')}, expected one 8-bit channel of labels.{hint}"
    )


def read_header(data: bytes, name: str, apply_exif: bool = True) -> tuple[int, int, str]:
    """Return (height, width, Pillow mode) of an image file without decoding its pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if apply_exif and image.format == "JPEG" and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
                width, height = height, width
            return height, width, image.mode
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HarnessError(_unreadable(name, "image", error)) from error


def _unreadable(name: str, what: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "cannot identify" in reason:
        reason = "not an image file that Pillow knows"
    return f"{name}: this {what} cannot be read ({reason}). Replace the file: `data verify` lists all damaged ones."
