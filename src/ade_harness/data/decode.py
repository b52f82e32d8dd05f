"""Decode one image or label file from bytes, strictly.

JPEGs go through simplejpeg: libjpeg-turbo like Pillow and OpenCV, so that the pixels are equal in every bit, but its
warnings are errors here. Pillow and OpenCV fill what is missing with grey and say nothing. PNGs go through Pillow.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from ade_harness.data.containers import (
    COLOUR,
    COLOUR_ALPHA,
    FORMATS,
    GREY,
    GREY_ALPHA,
    PALETTE,
    PngHeader,
    check_pixels,
    check_png,
    check_scans,
    container_of,
    limit_scans,
    read_png_header,
    unreadable,
)
from ade_harness.data.labels import LabelStorage
from ade_harness.data.palettes import misleading_entry
from ade_harness.errors import HarnessError

_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""How an image of each EXIF orientation is turned to be shown."""
_AT_THE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
"""A warning of libjpeg after which every pixel is there: bytes between the last of them and the end."""
_MAX_PADDING = 16
"""Bytes that writers put there. Zeros that stand for lost data are codes too, and mostly many more are left over."""
_METADATA = re.compile(r"unknown JFIF revision|Unknown Adobe color transform", re.IGNORECASE)
"""Warnings that say nothing of the pixels; libjpeg reports only the first warning, so others may follow."""
_APP0, _APP14, _SCAN = 0xE0, 0xEE, 0xDA
"""Markers of a JPEG: JFIF's and Adobe's segments, and the start of the pixels."""


def decode_image(data: bytes, name: str, apply_exif: bool = True) -> npt.NDArray[np.uint8]:
    """Decode an image file to RGB as the official loaders do.

    Grey and palette images are expanded to RGB, CMYK is converted, alpha is dropped.

    Args:
        data: the file's bytes: JPEG or PNG.
        name: how error messages call the file.
        apply_exif: turn the image as its EXIF orientation says: mmsegmentation's and detectron2's loaders do,
            DINOv3's and EoMT's do not.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        HarnessError: the file is truncated, damaged, too large, or of another format.
    """
    container = container_of(data, name, "image")
    if container == "PNG" and check_png(data, name, "image").depth == 16:
        raise HarnessError(f"{name}: has 16 bits per channel, expected 8. Convert the image to 8 bits.")
    with _opened(data, name, "image") as image:
        check_pixels(image.height, image.width, name, "image")
        turn = _TURNS.get(_orientation(image)) if apply_exif else None
        pixels = _decode_jpeg(data, name, image.mode) if container == "JPEG" else None
        if pixels is None:
            pixels = np.array(image.convert("RGB"))
        return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; a PNG's only if it stands before the pixels, where a header has it too."""
    block = image.info.get("exif")  # alone: Pillow's getexif also takes what XMP says, as OpenCV and others do not
    if not isinstance(block, bytes):
        return 1
    try:
        exif = Image.Exif()
        exif.load(block)
        return int(exif.get(_EXIF_ORIENTATION, 1))
    except Exception:  # metadata that no reader understands turns nothing; Pillow raises many kinds (struct.error, ...)
        return 1


def _decode_jpeg(data: bytes, name: str, mode: str) -> npt.NDArray[np.uint8] | None:
    """Return RGB pixels; None for a file that is intact, but whose colours are left to Pillow."""
    limit_scans(data, name, "image")  # first: a decoder takes seconds for each hundred
    space = "CMYK" if mode == "CMYK" else "RGB"
    odd_metadata = False
    try:
        pixels = simplejpeg.decode_jpeg(data, space, fastdct=False, fastupsample=False)
    except ValueError as error:
        plain = _without_metadata(data)
        odd_metadata = plain != data and _METADATA.search(str(error)) is not None
        if odd_metadata:  # without it, is there anything wrong with the pixels?
            _decode_jpeg(plain, name, mode)
        elif (found := _AT_THE_END.search(str(error))) and int(found[1]) <= _MAX_PADDING:
            pixels = simplejpeg.decode_jpeg(data, space, fastdct=False, fastupsample=False, strict=False)
        else:
            raise unreadable(name, "image", error) from error
    check_scans(data, name, "image")
    return None if odd_metadata or space == "CMYK" else np.asarray(pixels, np.uint8)


def _without_metadata(data: bytes) -> bytes:
    """Return a JPEG without JFIF's and Adobe's segments, which say how colours are meant, not where they are."""
    kept, place = [data[:2]], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _SCAN:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place + 1] not in (_APP0, _APP14):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def decode_labels(data: bytes, name: str, storage: LabelStorage = LabelStorage()) -> npt.NDArray[np.uint8]:  # noqa: B008  (frozen)
    """Decode a label PNG without any mapping.

    Args:
        data: the file's bytes.
        name: how error messages call the file.
        storage: how its values are stored; 8-bit grey, or a palette whose indices are the labels, by default.

    Returns:
        uint8 [H, W], the values.

    Raises:
        HarnessError: the file is damaged, no PNG, or stored otherwise: values might not be what was written.
    """
    check_label_kind(data, name, storage)
    header = check_png(data, name, "label map")
    with _opened(data, name, "label map") as image:
        if storage.kind == "colour":
            entries = 256 if header.palette is None else len(header.palette)
            if entries < 256 and (index := int(np.array(image).max(initial=0))) >= entries:
                raise HarnessError(f"{name}: a palette PNG: index {index} is not in its palette of {entries} colours.")
            return _values_of_colours(np.array(image.convert("RGB")), name, storage)
        stored = np.array(image)
    if storage.kind == "uint16":
        if int(stored.max(initial=0)) > 255:
            raise HarnessError(f"{name}: holds the value {int(stored.max())}; labels are at most 255.")
        return stored.astype(np.uint8)
    if header.palette is None:
        return stored
    used = np.flatnonzero(np.bincount(stored.reshape(-1), minlength=256))
    if storage.kind == "palette_colour":
        return np.asarray(_grey_levels(header.palette, used, name)[stored], np.uint8)
    if storage.kind == "grey":
        wrong = misleading_entry(header.palette, used, storage.colors)
        if wrong is not None:
            raise _misleading(header.palette, wrong, name, storage)
    return stored


def _misleading(palette: npt.NDArray[np.uint8], index: int, name: str, storage: LabelStorage) -> HarnessError:
    entry = f"has the colour {tuple(map(int, palette[index]))}" if index < len(palette) else "is not in it"
    return HarnessError(
        f"{name}: a palette PNG whose indices may not be its labels: index {index} {entry}, which is neither that grey"
        f" level nor of a known palette. PNG optimisers and colour quantisers write such files. {storage.advice}"
    )


def _grey_levels(palette: npt.NDArray[np.uint8], used: npt.NDArray[np.intp], name: str) -> npt.NDArray[np.uint8]:
    """Return the value of each index, uint8 [256]: its entry's grey level."""
    levels = np.zeros(256, np.uint8)
    levels[: len(palette)] = palette[:256, 0]
    for index in used:
        if index >= len(palette) or len(set(palette[index].tolist())) > 1:
            colour = tuple(map(int, palette[index])) if index < len(palette) else "no entry"
            raise HarnessError(f"{name}: palette_colour takes grey entries, and index {index} has {colour}.")
    return levels


def _values_of_colours(rgb: npt.NDArray[np.uint8], name: str, storage: LabelStorage) -> npt.NDArray[np.uint8]:
    codes = rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, inverse = np.unique(codes, return_inverse=True)
    values_of: dict[int, list[int]] = {}
    for value, c in enumerate(storage.colors):
        if c is not None:
            values_of.setdefault((c[0] << 16) + (c[1] << 8) + c[2], []).append(value)
    for code in found.tolist():
        meant = values_of.get(code, [])
        color = (code >> 16, code >> 8 & 255, code & 255)
        if not meant:
            raise HarnessError(
                f"{name}: the colour {color} is not one of the data set's {len(values_of)}. Colour-coded labels must"
                " be saved without loss, smoothing or resizing."
            )
        if len(meant) > 1:  # ADE20K's public palette has one such colour
            raise HarnessError(
                f"{name}: the colour {color} stands for {len(meant)} labels ({', '.join(map(str, meant))}), so it is"
                " unknown which was predicted. Save label indices instead of colours."
            )
    values = np.array([values_of[code][0] for code in found.tolist()], np.uint8)
    return np.asarray(values[inverse.reshape(codes.shape)], np.uint8)


def check_label_kind(data: bytes, name: str, storage: LabelStorage) -> PngHeader:
    """Refuse a label file by its first bytes: no PNG, or another colour type or depth than expected.

    Args:
        data: the file, or so much of its start that the palette is in it.
        name: how messages call the file.
        storage: what is expected.

    Raises:
        HarnessError: says what it is.
    """
    if container_of(data, name, "label map") == "JPEG":
        raise HarnessError(
            f"{name}: the label file is a JPEG, whose compression changes labels. Expected one 8-bit channel of labels,"
            " saved as PNG from the labels themselves."
        )
    header = read_png_header(data, name, "label map")
    depth, kind = header.depth, header.colour_type
    expected, fits = {
        "grey": ("one 8-bit channel of labels", (kind == GREY and depth == 8) or kind == PALETTE),
        "palette_index": ("a palette", kind == PALETTE),
        "palette_colour": ("a palette of grey entries", kind == PALETTE),
        "colour": ("8-bit colours", kind == PALETTE or (kind in (COLOUR, COLOUR_ALPHA) and depth == 8)),
        "uint16": ("one 16-bit channel of labels", kind == GREY and depth == 16),
    }[storage.kind]
    if fits:
        return header
    what = {
        GREY: f"grey with {depth} bits per pixel", COLOUR: "a colour image", COLOUR_ALPHA: "a colour image",
        PALETTE: "a palette image", GREY_ALPHA: "grey with alpha",
    }.get(kind, f"of colour type {kind}")  # fmt: skip
    hint = ""
    if storage.kind == "grey" and kind in (COLOUR, COLOUR_ALPHA):
        hint = (
            " Colour PNGs with the ending _seg.png belong to the full ADE20K (3,000 classes):"
            " this benchmark uses ADEChallengeData2016."
        )
    raise HarnessError(f"{name}: the label file is {what}, expected {expected}.{hint} {storage.advice}".rstrip())


def has_known_palette(header: PngHeader, storage: LabelStorage) -> bool:
    """Whether no pixel of a file can make :func:`decode_labels` refuse its palette."""
    if storage.kind != "grey" or header.palette is None:
        return storage.kind in ("grey", "palette_index")
    return misleading_entry(header.palette, np.arange(len(header.palette)), storage.colors) is None


def read_header(data: bytes, name: str, apply_exif: bool = True) -> tuple[int, int]:
    """Return (height, width) of an image file, as shown, without decoding its pixels; raises HarnessError."""
    container_of(data, name, "image")
    with _opened(data, name, "image") as image:
        width, height = image.size
        check_pixels(height, width, name, "image")
        if apply_exif and _orientation(image) >= 5:
            width, height = height, width
    return height, width


@contextmanager
def _opened(data: bytes, name: str, what: str) -> Iterator[Image.Image]:
    """Open a file by Pillow as JPEG or PNG; what goes wrong in the context is one message."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # Pillow's remarks on odd EXIF and on very large images
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, Image.DecompressionBombError) as error:
        raise unreadable(name, what, error) from error
