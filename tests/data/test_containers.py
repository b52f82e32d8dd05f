"""Files that are not what they seem: each is read as what it is, or refused with the reason."""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ade_harness.data.ade20k import open_ade20k
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.containers import PNG_START, check_png, check_scans, read_png_header
from ade_harness.data.decode import _without_metadata, decode_image, decode_labels, read_header
from ade_harness.data.labels import LabelStorage, default_colors
from ade_harness.data.palettes import is_label_file, misleading_entry
from ade_harness.errors import HarnessError
from ade_harness.files.reading import read_regular
from ade_harness.inference.folder import FolderPredictor

Labels = npt.NDArray[np.uint8]
LABELS: Labels = np.random.default_rng(5).integers(0, 151, (12, 17)).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def grey(labels: Labels = LABELS) -> bytes:
    return encoded(Image.fromarray(labels))


def palette_png(indices: Labels, palette: list[tuple[int, int, int]], bits: int | None = None) -> bytes:
    image = Image.fromarray(indices).convert("L")
    image.putpalette([v for color in palette for v in color])
    return encoded(image, **({"bits": bits} if bits else {}))


def optimised(labels: Labels = LABELS) -> bytes:
    """What a lossless optimiser makes of a grey file: entries are the labels, in order of their first occurrence."""
    values = list(dict.fromkeys(labels.reshape(-1).tolist()))
    index = np.array([values.index(v) for v in labels.reshape(-1)], np.uint8).reshape(labels.shape)
    return palette_png(index, [(v, v, v) for v in values])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# labels


@pytest.mark.parametrize(
    "palette",
    [
        [(v, v, v) for v in range(256)],
        [(0, 0, 0), *ade20k_classes().colors],
        [(0, 0, 0), *default_colors(255)],
    ],
    ids=["grey", "ade20k", "voc"],
)
def test_a_palette_that_shows_labels_by_their_value_is_read_by_index(palette: list[tuple[int, int, int]]) -> None:
    assert np.array_equal(decode_labels(palette_png(LABELS, palette), "a.png"), LABELS)
    assert np.array_equal(decode_labels(palette_png(LABELS % 4, palette[:4], bits=2), "a.png"), LABELS % 4)


@pytest.mark.parametrize(
    "palette", [[(0, 0, 0), (120, 120, 120)], [(120, 120, 120)], [(0, 0, 0)] * 7 + [(128, 128, 128)]]
)
def test_grey_entries_that_a_known_palette_has_too_show_nothing(palette: list[tuple[int, int, int]]) -> None:
    """The label 120, optimised to a palette, looks like ADE20K's wall, whose index is 1 (or 0); VOC has such a grey too."""
    stored = np.full((4, 4), len(palette) - 1, np.uint8)
    with pytest.raises(HarnessError, match="a palette PNG whose indices may not be its labels"):
        decode_labels(palette_png(stored, palette), "a.png")
    whole = [(0, 0, 0), *ade20k_classes().colors]  # entries that are not used show whose palette it is
    assert (decode_labels(palette_png(np.ones((4, 4), np.uint8), whole), "a.png") == 1).all()


@pytest.mark.parametrize("own", [(None, (10, 20, 30), (40, 50, 60)), ((7, 8, 9), (10, 20, 30), (40, 50, 60))])
def test_a_palette_of_the_data_sets_own_colours_shows_labels_by_their_value(own: tuple[Any, ...]) -> None:
    palette = np.array([color or (0, 0, 0) for color in own], np.uint8)
    used = np.array([0, 1, 2])
    assert misleading_entry(palette, used, own) is None
    assert misleading_entry(palette, used) is not None  # of no data set that is known
    assert misleading_entry(palette[[0, 2, 1]], used, own) is not None
    assert misleading_entry(palette, used, (None, None, None)) is not None


def test_palettes_of_fewer_classes_are_known_too() -> None:
    """Cityscapes' train ids, as hexadecimal colours in order, and ADE20K's zero-based values."""
    cityscapes = [
        (int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16))
        for c in [
            "804080",
            "f423e8",
            "464646",
            "66669c",
            "be9999",
            "999999",
            "faaa1e",
            "dcdc00",
            "6b8e23",
            "98fb98",
            "4682b4",
            "dc143c",
            "ff0000",
            "00008e",
            "000046",
            "003c64",
            "005064",
            "0000e6",
            "770b20",
        ]
    ]
    assert len(cityscapes) == 19
    for colors in (cityscapes, list(ade20k_classes().colors)):
        labels = LABELS % len(colors)
        every = np.arange(len(colors), dtype=np.uint8)[None]
        for stored in (labels, every):
            assert np.array_equal(decode_labels(palette_png(stored, colors), "a.png"), stored)
        for index in range(len(colors)):
            wrong = [*colors[:index], (1, 2, 3), *colors[index + 1 :]]
            with pytest.raises(
                HarnessError, match=rf"index {index} has the colour \(1, 2, 3\)|index \d+ has the colour"
            ):
                decode_labels(palette_png(every, wrong), "a.png")
    unlabelled = np.array([[0, 5, 255]], np.uint8)
    for color, fits in (((0, 0, 0), True), ((255, 255, 255), True), ((9, 9, 9), False)):
        palette = [*cityscapes, *[(3, 3, 3)] * 236, color]
        if fits:
            assert np.array_equal(decode_labels(palette_png(unlabelled, palette), "a.png"), unlabelled)
        else:
            with pytest.raises(HarnessError, match="indices may not be its labels"):
                decode_labels(palette_png(unlabelled, palette), "a.png")


@pytest.mark.parametrize("change", ["optimised", "one entry", "too short", "quantised"])
def test_a_palette_that_may_only_number_the_labels_is_refused(change: str) -> None:
    identity = [(v, v, v) for v in range(256)]
    data = {
        "optimised": optimised(),
        "one entry": palette_png(LABELS, [*identity[:7], (9, 9, 9), *identity[8:]]),
        "too short": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 3, 0, 0, 0))
        + chunk(b"PLTE", bytes([0, 0, 0, 1, 1, 1]))
        + chunk(b"IDAT", zlib.compress(b"\0\0\1\2"))
        + chunk(b"IEND", b""),
        "quantised": encoded(Image.fromarray(np.stack([LABELS, LABELS, 255 - LABELS], 2)).quantize(64)),
    }[change]
    with pytest.raises(HarnessError, match=r"a\.png: a palette PNG whose indices may not be its labels: index \d+ "):
        decode_labels(data, "a.png")


def test_only_entries_in_use_count() -> None:
    palette = [(v, v, v) for v in range(256)]
    palette[200] = (1, 2, 3)
    assert np.array_equal(decode_labels(palette_png(LABELS, palette), "a.png"), LABELS)


def test_storage_that_is_named_is_read() -> None:
    assert np.array_equal(decode_labels(optimised(), "a", LabelStorage("palette_colour")), LABELS)
    odd = palette_png(LABELS, [(v, 255 - v, 7) for v in range(256)])
    assert np.array_equal(decode_labels(odd, "a", LabelStorage("palette_index")), LABELS)
    with pytest.raises(HarnessError, match=r"a: palette_colour takes grey entries, and index \d+ has \(\d+, \d+, 7\)"):
        decode_labels(odd, "a", LabelStorage("palette_colour"))
    for entry in ((4, 4, 7), (4, 7, 4), (7, 4, 4)):
        odd = palette_png(LABELS, [entry] * 256)
        with pytest.raises(HarnessError, match=r"palette_colour takes grey entries, and index \d+ has \(\d, \d, \d\)"):
            decode_labels(odd, "a", LabelStorage("palette_colour"))
    wide = encoded(Image.fromarray(LABELS.astype(np.uint16)))
    assert np.array_equal(decode_labels(wide, "a", LabelStorage("uint16")), LABELS)
    with pytest.raises(HarnessError, match="a: holds the value 256; labels are at most 255"):
        decode_labels(encoded(Image.fromarray(np.full((2, 2), 256, np.uint16))), "a", LabelStorage("uint16"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encoded(Image.fromarray(LABELS), "JPEG", quality=100), "is a JPEG, whose compression changes labels"),
        (encoded(Image.fromarray(LABELS), "TIFF"), "neither JPEG nor PNG but TIFF"),
        (encoded(Image.fromarray(LABELS), "GIF"), "neither JPEG nor PNG but GIF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "neither JPEG nor PNG but PostScript"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer: `git lfs pull`"),
        (b"", "the file is empty"),
        (encoded(Image.fromarray(LABELS).convert("1")), "grey with 1 bits per pixel, expected one 8-bit channel"),
        (encoded(Image.fromarray(LABELS.astype(np.uint16))), "grey with 16 bits per pixel"),
        (cv2.imencode(".png", np.stack([LABELS] * 3, 2).astype(np.uint16) * 257)[1].tobytes(), "a colour image"),
        (grey()[:-12], "it is truncated"),
        (grey()[:60], "it is truncated"),
    ],
)  # fmt: skip
def test_other_label_files_are_refused_by_what_they_are(data: bytes, message: str) -> None:
    with pytest.raises(HarnessError, match=rf"a\.png: .*{message}"):
        decode_labels(data, "a.png")


@pytest.mark.parametrize(
    ("kind", "taken"),
    [("grey", {"L", "P"}), ("palette_index", {"P"}), ("palette_colour", {"P"}), ("colour", {"P", "RGB", "RGBA"}), ("uint16", {"I;16"})],
)  # fmt: skip
def test_each_storage_takes_its_own_files_alone(kind: str, taken: set[str]) -> None:
    grey_palette = Image.fromarray(LABELS)
    grey_palette.putpalette([v for value in range(256) for v in (value, value, value)])
    files = {
        "L": Image.fromarray(LABELS), "P": grey_palette, "RGB": Image.fromarray(np.stack([LABELS] * 3, 2)),
        "RGBA": Image.fromarray(np.stack([LABELS, LABELS, LABELS, np.full_like(LABELS, 255)], 2)), "LA": Image.new("LA", (4, 4)),
        "1": Image.new("1", (4, 4)), "I;16": Image.fromarray(LABELS.astype(np.uint16)),
    }  # fmt: skip
    storage = LabelStorage(kind, tuple((v, v, v) for v in range(256)))
    for mode, image in files.items():
        if mode in taken:
            assert np.array_equal(decode_labels(encoded(image), "a.png", storage), LABELS), mode
        else:
            with pytest.raises(HarnessError, match=r"a\.png: the label file is .*, expected"):
                decode_labels(encoded(image), "a.png", storage)


def test_a_long_text_before_the_palette_is_no_damage(tiny_ade: Path) -> None:
    path = tiny_ade / "annotations/validation/ADE_val_00001002.png"
    data = path.read_bytes()
    path.write_bytes(data[:33] + chunk(b"tEXt", b"a\0" + b"b" * 100_000) + data[33:])
    sizes, wrong = open_ade20k(tiny_ade).read_headers()
    assert wrong == {}
    assert np.array_equal(open_ade20k(tiny_ade).load(2).target.shape, sizes["ADE_val_00001002"])


def test_every_flipped_bit_of_a_label_file_that_changes_labels_is_noticed() -> None:
    data = grey()
    for place in range(8, len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            try:
                found = decode_labels(bytes(damaged), "a.png")
            except HarnessError:
                continue
            assert np.array_equal(found, LABELS), (place, bit)  # a chunk's name became another ancillary one


PNG = b"\x89PNG\r\n\x1a\n"


def test_the_end_of_a_png_is_checked_too() -> None:
    data = grey()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-12], data[:-30]):
        with pytest.raises(
            HarnessError, match=r"a\.png: .*(a checksum is wrong, in the chunk b'IEND'|it is truncated)"
        ):
            decode_labels(damaged, "a.png")
    assert np.array_equal(decode_labels(data + b"x" * 20, "a.png"), LABELS)  # what follows the end is nobody's


def test_a_palette_counts_where_the_format_has_it() -> None:
    """Before the pixels, whatever text comes first; behind them decoders do not look."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 3, 0, 0, 0))
    text, palette, other = (chunk(b"tEXt", b"a\0b"), *(chunk(b"PLTE", bytes(range(i, i + 9))) for i in (0, 100)))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0\1\2"))
    data = PNG + header + text + palette + text + pixels + other + chunk(b"IEND", b"")
    found = read_png_header(data, "a.png", "label map")
    assert found.palette is not None
    assert found.palette.reshape(-1).tolist() == list(range(9))
    late = PNG + header + pixels + palette + chunk(b"IEND", b"")
    twice = PNG + header + other + palette + pixels + chunk(b"IEND", b"")
    none = PNG + header + pixels + chunk(b"IEND", b"")
    for wrong, what in ((late, "no palette"), (none, "no palette"), (twice, "2 palettes")):
        with pytest.raises(HarnessError, match=f"a palette image with {what} before its pixels"):
            read_png_header(wrong, "a.png", "label map")
    with pytest.raises(HarnessError, match="it has several palettes"):
        check_png(data, "a.png", "label map")
    grey = PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 0, 0, 0, 0)) + palette + pixels
    assert read_png_header(grey, "a.png", "label map").palette is None  # nobody looks it up


def test_chunks_are_taken_for_what_they_are() -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 3, 0, 0, 0))
    text = chunk(b"tEXt", b"a\0" + b"b" * 11)  # as long as a header
    found = read_png_header(PNG + header + text + chunk(b"PLTE", bytes(range(10))), "a.png", "image")
    assert (found.height, found.width, found.depth, found.colour_type) == (1, 3, 8, 3)
    assert found.palette is not None
    assert found.palette.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]  # the tenth byte is no entry
    with pytest.raises(HarnessError, match=r"a\.png: .*it is truncated"):
        read_png_header(PNG + header[:8], "a.png", "image")
    damaged = text[:-1] + bytes([text[-1] ^ 1])
    data = grey()
    assert check_png(data[:33] + damaged + data[33:], "a.png", "image").width == 17  # says nothing of the pixels


def test_only_eight_bit_labels_get_a_hint_at_the_full_set() -> None:
    colours = encoded(Image.fromarray(np.stack([LABELS] * 3, 2)))
    for data, kind, reported in (
        (colours, "grey", True),
        (colours, "uint16", False),
        (encoded(Image.new("LA", (4, 4))), "grey", False),
    ):
        with pytest.raises(HarnessError) as error:
            decode_labels(data, "a.png", LabelStorage(kind))
        assert ("_seg.png" in str(error.value)) == reported


def test_the_orientation_of_a_png_counts_before_the_pixels_alone() -> None:
    """A header is read without what stands behind them: both must say the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(photo((96, 128)), "PNG", exif=exif)
    place = data.index(b"eXIf") - 4
    length = int.from_bytes(data[place : place + 4], "big") + 12
    moved = data[:place] + data[place + length : -12] + data[place : place + length] + data[-12:]
    for file, size in ((data, (128, 96)), (moved, (96, 128))):
        assert read_header(file, "a.png") == decode_image(file, "a.png").shape[:2] == size


def test_one_pixel_is_an_image_and_none_is_not() -> None:
    assert decode_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), "a.png").tolist() == [[[1, 2, 3]]]
    empty = PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 0, 0, 0, 0)) + chunk(b"IEND", b"")
    with pytest.raises(HarnessError, match="it says 0x5 pixels"):
        read_png_header(empty, "a.png", "image")


def test_the_index_that_is_wrong_is_named() -> None:
    identity = [(v, v, v) for v in range(256)]
    with pytest.raises(HarnessError, match=r"index 7 has the colour \(9, 9, 9\)"):
        decode_labels(palette_png(LABELS, [*identity[:7], (9, 9, 9), *identity[8:]]), "a.png")
    short = (
        PNG + chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 1, 8, 3, 0, 0, 0)) + chunk(b"PLTE", bytes([0, 0, 0, 1, 1, 1]))
    )
    short += chunk(b"IDAT", zlib.compress(b"\0\0\1\2")) + chunk(b"IEND", b"")
    with pytest.raises(HarnessError, match=r"palette_colour takes grey entries, and index 2 has no entry"):
        decode_labels(short, "a.png", LabelStorage("palette_colour"))


# images


def photo(size: tuple[int, int] = (96, 128)) -> Image.Image:
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3)).astype(np.uint8)
    return Image.fromarray(cv2.resize(small, (size[1], size[0]), interpolation=cv2.INTER_CUBIC))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": "4:1:1"}])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpegs_are_decoded_as_by_pillow_in_every_bit(mode: str, options: dict[str, Any], orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo().convert(mode), "JPEG", exif=exif, **(options if mode == "RGB" else {}))
    with Image.open(io.BytesIO(data)) as opened:
        plain = np.array(opened.convert("RGB"))
        turn = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 3),
                7: lambda a: np.rot90(a.swapaxes(0, 1), 2), 8: np.rot90}.get(orientation, np.array)  # fmt: skip
    assert np.array_equal(decode_image(data, "a.jpg", apply_exif=False), plain)
    assert np.array_equal(decode_image(data, "a.jpg"), turn(plain))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_header_says_the_size_that_the_decoder_gives(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG"):
        data = encoded(photo((96, 128)), kind, exif=exif)
        for apply_exif in (True, False):
            assert read_header(data, "a", apply_exif) == decode_image(data, "a", apply_exif).shape[:2]
        assert (read_header(data, "a")[0] == 128) == (orientation >= 5)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_half_a_jpeg_is_refused_whatever_its_end(mode: str, progressive: bool) -> None:
    data = encoded(photo().convert(mode), "JPEG", progressive=progressive)
    for end in (b"", b"\xff\xd9", b"\0" * 50 + b"\xff\xd9"):
        with pytest.raises(HarnessError, match=r"a\.jpg: this image cannot be read"):
            decode_image(data[: len(data) // 2] + end, "a.jpg")


def scans(data: bytes) -> list[int]:
    """Return where the scans of a JPEG begin: 0xFF is followed by 0 within coded pixels."""
    return [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_progressive_jpeg_without_its_last_scans_is_refused(mode: str) -> None:
    """Each scan is whole and the end is there: libjpeg decodes a coarser image, and warns of nothing."""
    data = encoded(photo().convert(mode), "JPEG", progressive=True)
    expected = decode_image(data, "a.jpg")
    starts = scans(data)
    assert len(starts) >= 4
    for start in starts[1:]:
        tables = data.rfind(b"\xff\xc4", 0, start)  # a scan's Huffman table stands before it
        cut = data[: tables if tables > starts[0] else start] + b"\xff\xd9"
        with Image.open(io.BytesIO(cut)) as opened:  # Pillow says nothing
            coarser = not np.array_equal(np.array(opened.convert("RGB")), expected)
        assert coarser or start == starts[-1]  # this one may hold black's last bits, of an image that has none
        with pytest.raises(HarnessError, match=r"a\.jpg: .*the last scans of the JPEG are missing"):
            decode_image(cut, "a.jpg")
    filled = data[:2] + b"\xff\xff\xff" + data[2:]  # fill bytes before a marker are allowed
    assert np.array_equal(decode_image(filled, "a.jpg"), expected)


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def frame(components: int = 1, marker: int = 0xC2) -> bytes:
    """Return the header of a progressive frame of 8 x 8 pixels."""
    each = b"".join(bytes([i + 1, 0x11, 0]) for i in range(components))
    return segment(marker, bytes([8, 0, 8, 0, 8, components]) + each)


def scan(start: int, end: int, bits: int, *components: int) -> bytes:
    each = b"".join(bytes([c, 0]) for c in components)
    return segment(0xDA, bytes([len(components)]) + each + bytes([start, end, bits])) + b"\x12\xff\x00\x34"


SOI, EOI = b"\xff\xd8", b"\xff\xd9"
ALL = scan(0, 0, 0, 1) + scan(1, 63, 0, 1)


@pytest.mark.parametrize(
    ("data", "complete"),
    [
        (SOI + frame() + ALL + EOI, True),
        (SOI + frame(marker=0xCA) + ALL + EOI, True),
        (SOI + frame() + scan(0, 0, 0, 1) + EOI, False),
        (SOI + frame(marker=0xCA) + scan(0, 0, 0, 1) + EOI, False),
        (SOI + frame() + scan(1, 63, 0, 1) + EOI, False),
        (SOI + frame() + scan(0, 0, 0, 1) + scan(1, 62, 0, 1) + EOI, False),
        (SOI + frame() + scan(0, 0, 1, 1) + scan(1, 63, 0, 1) + EOI, False),  # the lowest bit is missing
        (SOI + frame() + scan(0, 0, 1, 1) + scan(1, 63, 0, 1) + scan(0, 0, 0x10, 1) + EOI, True),  # and comes later
        (SOI + frame(2) + scan(0, 0, 0, 1, 2) + scan(1, 63, 0, 1) + EOI, False),
        (SOI + frame(2) + scan(0, 0, 0, 1, 2) + scan(1, 63, 0, 1) + scan(1, 63, 0, 2) + EOI, True),
        (SOI + frame() + ALL, True),  # whether the end is missing is the decoder's to say
        (SOI + frame() + ALL + b"\xff", True),
        (SOI + frame() + scan(0, 0, 0, 1) + EOI + ALL, False),  # after the end there is nothing
        # a comment of 300 bytes, in which something looks like the end
        (SOI + segment(0xFE, bytes(200) + EOI + bytes(96)) + frame() + scan(0, 0, 0, 1) + EOI, False),
        (SOI + b"\xff" + frame() + scan(0, 0, 0, 1) + EOI, False),  # fill bytes
        (SOI + b"\xff\xff" + frame() + scan(0, 0, 0, 1) + EOI, False),
        (SOI + frame() + scan(0, 0, 0, 1) + b"\xff" + scan(1, 63, 0, 1) + EOI, True),
        (SOI + frame() + scan(0, 0, 0, 1) + b"\xff\xff" + scan(1, 63, 0, 1) + EOI, True),
        # restart markers, and TEM, are followed by pixels or segments, not by a length
        (SOI + frame() + scan(0, 0, 0, 1) + b"\xff\xd0\x00\x30" + scan(1, 63, 0, 1) + EOI, True),
        (SOI + frame() + scan(0, 0, 0, 1) + b"\xff\xd7\x00\x30" + scan(1, 63, 0, 1) + EOI, True),
        (SOI + frame() + scan(0, 0, 0, 1) + b"\xff\x01\x00\x30" + scan(1, 63, 0, 1) + EOI, True),
        (SOI + frame() + ALL + segment(0xDA, bytes([9, 1])) + EOI, True),  # a scan that is none
        (SOI + frame() + ALL + segment(0xDA, bytes([1, 1, 0])) + EOI, True),
        (SOI + frame() + segment(0xDA, b"\1\1\0\0\x3f\0") + EOI, True),  # the shortest header that can be
        (SOI + frame() + scan(0, 63, 0, 7) + EOI, False),  # of a component that the frame has not
        (SOI + frame(marker=0xC0) + scan(0, 0, 0, 1) + EOI, True),  # a baseline frame has one scan
    ],
)  # fmt: skip
def test_scans_are_counted_coefficient_by_coefficient(data: bytes, complete: bool) -> None:
    if complete:
        check_scans(data, "a.jpg", "image")
    else:
        with pytest.raises(HarnessError, match=r"a\.jpg: .*the last scans"):
            check_scans(data, "a.jpg", "image")


def test_metadata_is_found_between_other_segments() -> None:
    data = encoded(photo(), "JPEG")
    length = int.from_bytes(data[4:6], "big")
    metadata, place = data[2 : 4 + length], 4 + length
    assert metadata[4:8] == b"JFIF"
    assert data[place : place + 2] == b"\xff\xdb"
    behind = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")  # a table of quantisation
    moved = data[:2] + data[place:behind] + metadata[:9] + b"\x09" + metadata[10:] + data[behind:]
    assert np.array_equal(decode_image(moved, "a.jpg"), decode_image(data, "a.jpg"))
    assert _without_metadata(SOI + b"\xff\xe0\x00\x02") == SOI  # a segment that ends the file
    for cut in range(2, 12):
        assert _without_metadata(data[:cut]).startswith(SOI)


@pytest.mark.parametrize("kind", ["JFIF", "Adobe"])
def test_odd_metadata_is_no_damage_and_hides_none(kind: str) -> None:
    """libjpeg reports only the first warning: behind a harmless one there may be half an image."""
    data = encoded(photo(), "JPEG") if kind == "JFIF" else encoded(photo().convert("CMYK"), "JPEG")
    place = data.index(b"JFIF\0") + 5 if kind == "JFIF" else data.index(b"Adobe") + 11
    odd = data[:place] + b"\x09" + data[place + 1 :]
    with Image.open(io.BytesIO(odd)) as opened:
        expected = np.array(opened.convert("RGB"))
    assert np.array_equal(decode_image(odd, "a.jpg"), expected)
    for end in (b"", b"\xff\xd9"):
        with pytest.raises(HarnessError, match=r"a\.jpg: this image cannot be read"):
            decode_image(odd[: len(odd) // 2] + end, "a.jpg")


def test_bytes_after_the_last_pixel_are_no_damage() -> None:
    data = encoded(photo(), "JPEG")
    expected = decode_image(data, "a.jpg")
    for odd in (data + b"\0" * 100, data[:-2] + b"\0\0\0\0\xff\xd9"):
        assert np.array_equal(decode_image(odd, "a.jpg"), expected)


def test_padding_before_the_end_has_at_most_sixteen_bytes() -> None:
    data = encoded(Image.fromarray(np.full((8, 8, 3), 90, np.uint8)), "JPEG")  # 4 bytes of pixels, all decoded
    expected = decode_image(data, "a.jpg")
    padded = [data[:-2] + b"\1" * n + b"\xff\xd9" for n in range(30)]
    refused = [bool(_refusal(file)) for file in padded]
    first = refused.index(True)
    assert refused == [n >= first for n in range(30)]
    assert "17 extraneous bytes" in _refusal(padded[first])
    for file in padded[:first]:
        assert np.array_equal(decode_image(file, "a.jpg"), expected)


def _refusal(data: bytes) -> str:
    """Return why an image is not read; nothing if it is."""
    try:
        decode_image(data, "a.jpg")
    except HarnessError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kept", [0.5, 0.9])
@pytest.mark.parametrize("quality", [75, 95])
def test_zeros_in_place_of_lost_data_are_damage(kept: float, quality: int) -> None:
    """As a file has that was made in its full length and never filled: zeros may be codes of a JPEG too."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (200, 300, 3)).astype(np.uint8))
    data = encoded(noise, "JPEG", quality=quality)
    cut = int(kept * len(data))
    with pytest.raises(HarnessError, match=r"a\.jpg: this image cannot be read"):
        decode_image(data[:cut] + b"\0" * (len(data) - cut - 2) + b"\xff\xd9", "a.jpg")


def test_images_that_take_too_much_are_refused_before_they_are_decoded() -> None:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    bomb = start + chunk(b"IDAT", zlib.compress(b"\0" * 10_000_000)) + chunk(b"IEND", b"")
    with pytest.raises(HarnessError, match=r"60000x60000 pixels .* at most 134,217,728 are decoded"):
        decode_image(bomb, "a.png")
    with pytest.raises(HarnessError, match="more than 65,536 chunks"):
        decode_image(start + chunk(b"tEXt", b"a\0b") * 70_000, "a.png")
    with pytest.raises(HarnessError, match="has 16 bits per channel, expected 8"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.uint16))), "a.png")


def test_what_is_no_regular_file_is_refused(tmp_path: Path, tiny_ade: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", Path("/dev/zero"), tmp_path):
        with pytest.raises(HarnessError, match=r"not a regular file|Is a directory"):
            read_regular(path, 100)
    (tmp_path / "large").write_bytes(b"x" * 101)
    with pytest.raises(HarnessError, match="has 101 bytes; at most 100"):
        read_regular(tmp_path / "large", 100)
    image = tiny_ade / "images/validation/ADE_val_00001003.jpg"
    image.unlink()
    os.mkfifo(image)
    assert "not a regular file" in open_ade20k(tiny_ade).read_headers()[1]["ADE_val_00001003"]


@pytest.mark.slow
def test_a_member_that_unpacks_to_gigabytes_is_refused(tiny_ade: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(tiny_ade.rglob("*.*")):
            archive.write(path, path.relative_to(tiny_ade.parent))
        with archive.open("ADEChallengeData2016/images/validation/ADE_val_00000001.jpg", "w") as member:
            for _ in range(300):
                member.write(bytes(1 << 20))
        archive.write(next(tiny_ade.rglob("*.png")), "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png")
    assert "unpacks to 314,572,800 bytes" in open_ade20k(tmp_path / "a.zip").read_headers()[1]["ADE_val_00000001"]


# the two doors of labels


def test_headers_find_annotations_that_are_not_what_they_seem(tiny_ade: Path) -> None:
    folder = tiny_ade / "annotations/validation"
    for number, change in enumerate((optimised, lambda a: encoded(Image.fromarray(a), "JPEG"), grey)):
        path = folder / f"ADE_val_0000100{number}.png"
        path.write_bytes(change(np.array(Image.open(path))))
    wrong = open_ade20k(tiny_ade).read_headers()[1]
    assert list(wrong) == ["ADE_val_00001000", "ADE_val_00001001"]
    assert "indices may not be its labels" in wrong["ADE_val_00001000"]
    assert "JPEG" in wrong["ADE_val_00001001"]


@pytest.mark.parametrize("zero_based", [False, True])
@pytest.mark.parametrize("encoding", ["official", "palette_index", "palette_colour", "colour", "uint16", "npy"])
def test_predictions_in_each_encoding(tmp_path: Path, encoding: str, zero_based: bool) -> None:
    classes = ade20k_classes()
    expected = np.where(LABELS == 0, 255, LABELS - 1).astype(np.uint8)
    if encoding == "colour":  # 6 and 48, road and skyscraper, have one colour
        expected[expected == 48] = 6
        expected[expected == 6] = 7
    stored = expected if zero_based or encoding == "colour" else LABELS
    path = tmp_path / f"a.{'npy' if encoding == 'npy' else 'png'}"
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = classes.colors
    data = {
        "official": lambda: grey(stored), "palette_colour": lambda: optimised(stored),
        "palette_index": lambda: palette_png(stored, [(255 - v, 3, v) for v in range(256)]),
        "colour": lambda: encoded(Image.fromarray(palette[stored])), "npy": lambda: b"",
        "uint16": lambda: encoded(Image.fromarray(stored.astype(np.uint16))),
    }[encoding]()  # fmt: skip
    path.write_bytes(data)
    if encoding == "npy":
        np.save(path, stored.astype(np.int64))
    name = encoding if not zero_based or encoding == "colour" else f"{encoding}_zero_based".replace("official_", "")
    predictor = FolderPredictor(tmp_path, name, classes)
    predictor.check({"a": LABELS.shape})  # type: ignore[dict-item]
    found = predictor.prepare("a", np.zeros((*LABELS.shape, 3), np.uint8))
    assert np.array_equal(found.pixels[0].numpy(), expected)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.float32), r"expected integers \[H, W\] of 0..255, it holds float32"),
        (np.zeros((4, 4, 3), np.uint8), r"it holds uint8 \[4, 4, 3\]"),
        (np.full((4, 4), -1), r"holds values of -1..-1; labels are 0..255"),
        (np.full((4, 4), 256), r"holds values of 256..256"),
        (np.array([[object()]]), "it holds object"),
        (None, "is not a .npy file"),
    ],
)
def test_arrays_that_are_no_labels_are_refused(tmp_path: Path, array: Any, message: str) -> None:
    if array is None:
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff{")
    else:
        np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(HarnessError, match=message):
        FolderPredictor(tmp_path, "npy", ade20k_classes()).prepare("a", np.zeros((4, 4, 3), np.uint8))


def test_colours_that_are_none_of_the_data_sets_are_refused(tmp_path: Path) -> None:
    for color, message in (
        ((1, 2, 3), r"the colour \(1, 2, 3\) is not one of the data set's 150"),
        (ade20k_classes().colors[48], r"the colour \(140, 140, 140\) stands for 2 labels \(6, 48\)"),
    ):
        (tmp_path / "a.png").write_bytes(encoded(Image.new("RGB", (4, 4), color)))
        with pytest.raises(HarnessError, match=message):
            FolderPredictor(tmp_path, "colour", ade20k_classes()).prepare("a", np.zeros((4, 4, 3), np.uint8))


def png_of(height: int, width: int, depth: int, colour: int, rows: bytes, *, interlaced: bool = False) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, int(interlaced))
    palette = chunk(b"PLTE", bytes(range(6))) if colour == 3 else b""
    return PNG_START + chunk(b"IHDR", header) + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("colour", "depth"), [(0, 1), (0, 2), (0, 8), (0, 16), (2, 8), (2, 16), (3, 4), (3, 8), (4, 8), (6, 8)]
)
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 1), (9, 3), (2, 17), (13, 13)])
def test_every_row_of_a_png_is_there(height: int, width: int, colour: int, depth: int, interlaced: bool) -> None:
    """The bytes are those that an independent encoder writes: passes of Adam7 by the specification's own table."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    grid = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    counts = []
    for number in "1234567" if interlaced else "*":
        taken = np.array([[number in ("*", grid[y % 8][x % 8]) for x in range(width)] for y in range(height)])
        rows, columns = int(taken.any(1).sum()), int(taken.any(0).sum())
        counts += [1 + math.ceil(columns * channels * depth / 8)] * rows
    whole = bytes(sum(counts))
    assert (
        check_png(png_of(height, width, depth, colour, whole, interlaced=interlaced), "a.png", "image").width == width
    )
    check_png(png_of(height, width, depth, colour, whole + b"0", interlaced=interlaced), "a.png", "image")
    for missing in {1, counts[-1]}:
        with pytest.raises(HarnessError, match=r"a\.png: this image cannot be read \(rows are missing"):
            check_png(png_of(height, width, depth, colour, whole[:-missing], interlaced=interlaced), "a.png", "image")


def test_what_follows_the_last_row_is_not_decompressed() -> None:
    """A bomb behind a whole image: a label map of 620 bytes whose stream goes on for 64 MB of zeros."""
    rows = b"".join(b"\0" + bytes([7] * 30) for _ in range(20))
    bomb = png_of(20, 30, 8, 0, rows + bytes(64 << 20))
    tracemalloc.start()
    try:
        check_png(bomb, "a.png", "image")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_half_of_a_label_map_is_not_read_as_a_whole_one() -> None:
    """Its stream is whole, and every checksum is right: Pillow and OpenCV fill the rest with zeros."""
    rows = b"".join(b"\0" + bytes([7] * 30) for _ in range(20))
    assert (decode_labels(png_of(20, 30, 8, 0, rows), "a.png") == 7).all()
    for decode in (decode_labels, decode_image):
        with pytest.raises(HarnessError, match="rows are missing: 310 bytes of pixels, expected 620"):
            decode(png_of(20, 30, 8, 0, rows[:310]), "a.png")
    twice = png_of(20, 30, 8, 0, rows).replace(b"IDAT", b"IDAT", 1)
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 30, 10, 8, 0, 0, 0, 0))
    place = len(PNG_START) + 25
    with pytest.raises(HarnessError, match="several headers"):
        decode_labels(twice[:place] + second + twice[place:], "a.png")


def scans_of_components(number: int) -> bytes:
    """Return a sequential JPEG that holds the first so many of three components, each in a scan of its own."""
    parts = []
    for seed in range(3):
        buffer = io.BytesIO()
        noise = np.random.default_rng(seed).integers(0, 256, (16, 24)).astype(np.uint8)
        Image.fromarray(noise).save(buffer, "JPEG", quality=80)
        parts.append(buffer.getvalue())
    first = parts[0]
    frame = first.find(b"\xff\xc0")
    components = b"".join(bytes([c, 0x11, 0]) for c in (1, 2, 3))
    header = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 16, 24, 3) + components
    after = frame + 2 + struct.unpack_from(">H", first, frame + 2)[0]
    content = first[:frame] + header + first[after : first.find(b"\xff\xda")]
    for component in range(number):
        scan = parts[component]
        start = scan.find(b"\xff\xda")
        content += scan[start : start + 5] + bytes([component + 1]) + scan[start + 6 : -2]
    return content + b"\xff\xd9"


def test_a_sequential_jpeg_without_its_last_scans_is_refused() -> None:
    whole = decode_image(scans_of_components(3), "a.jpg")
    assert whole.shape == (16, 24, 3)
    assert whole.std((0, 1)).min() > 20
    for number in (1, 2):
        with pytest.raises(HarnessError, match=r"a\.jpg: .*the last scans of the JPEG are missing"):
            decode_image(scans_of_components(number), "a.jpg")


@pytest.mark.parametrize(
    ("colors", "expected"),
    [
        (None, False),  # a photograph
        ([(v, v, v) for v in range(256)], False),  # and one of 256 grey levels
        ([(0, 0, 0), *ade20k_classes().colors], True),
        (list(ade20k_classes().colors), True),
        ([(0, 0, 0), *ade20k_classes().colors[:2]], True),  # three entries identify a data set
        ([(0, 0, 0), ade20k_classes().colors[0]], False),  # two do not
        ([(0, 0, 0), *default_colors(20)], True),
        ([(0, 0, 0), *default_colors(20)[:-1], (1, 2, 3)], False),
        ([(10, 20, 30), (40, 50, 60), (70, 80, 90)], False),
    ],
)
def test_files_of_labels_are_no_photographs(colors: list[tuple[int, int, int]] | None, expected: bool) -> None:
    if colors is None:
        assert not is_label_file(encoded(Image.new("RGB", (4, 4)), "PNG"))
        assert not is_label_file(encoded(Image.new("RGB", (4, 4)), "JPEG"))
        return
    header = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + b"\0" * 4) * 4)) + chunk(b"IEND", b"")
    data = PNG_START + chunk(b"IHDR", header) + chunk(b"PLTE", bytes(v for color in colors for v in color)) + pixels
    assert is_label_file(data) is expected


def test_the_passes_of_adam7_of_every_size() -> None:
    """By the specification's own table: a byte less than its rows have is refused, whatever the size."""
    grid = ["16462646", "77777777", "56565656", "77777777", "36463646", "77777777", "56565656", "77777777"]
    pattern = np.array([list(row) for row in grid])
    for height, width in itertools.product(range(1, 18), range(1, 18)):
        tiled = np.tile(pattern, (3, 3))[:height, :width]
        taken = [tiled == number for number in "1234567"]
        whole = bytes(sum(int(t.any(1).sum()) * (1 + int(t.any(0).sum())) for t in taken))
        check_png(png_of(height, width, 8, 0, whole, interlaced=True), "a.png", "image")
        with pytest.raises(HarnessError, match="rows are missing"):
            check_png(png_of(height, width, 8, 0, whole[:-1], interlaced=True), "a.png", "image")


@pytest.mark.parametrize(("length", "entries"), [(6, 2), (7, 2), (8, 2), (9, 3)])
def test_a_palette_has_whole_entries(length: int, entries: int) -> None:
    header = struct.pack(">IIBBBBB", 4, 4, 8, 3, 0, 0, 0)
    data = PNG_START + chunk(b"IHDR", header) + chunk(b"PLTE", bytes(range(length))) + chunk(b"IDAT", b"")
    palette = read_png_header(data, "a.png", "image").palette
    assert palette is not None
    assert palette.tolist() == [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(entries)]


def test_the_first_index_beyond_a_palette_is_refused() -> None:
    """Decoders show it as black, which may be the colour of a class."""
    colors = ade20k_classes().colors[:4]
    storage = LabelStorage("colour", tuple(ade20k_classes().colors))
    header = struct.pack(">IIBBBBB", 4, 1, 8, 3, 0, 0, 0)
    start = PNG_START + chunk(b"IHDR", header) + chunk(b"PLTE", bytes(v for color in colors for v in color))
    for last in (3, 4):
        data = start + chunk(b"IDAT", zlib.compress(bytes([0, 0, 1, 2, last]))) + chunk(b"IEND", b"")
        if last == 3:
            assert decode_labels(data, "a.png", storage).shape == (1, 4)
            continue
        with pytest.raises(HarnessError, match="index 4 is not in its palette of 4 colours"):
            decode_labels(data, "a.png", storage)


@pytest.mark.parametrize("length", [0xDA00, 0xDADA, 0xFFFF])
def test_metadata_is_found_behind_a_long_segment_whose_length_looks_like_a_scan(length: int) -> None:
    data = encoded(Image.fromarray(np.full((8, 8, 3), 90, np.uint8)), "JPEG")
    assert data[2:4] == b"\xff\xe0"
    end = 4 + int.from_bytes(data[4:6], "big")
    long = b"\xff\xe1" + struct.pack(">H", length) + bytes(length - 2)
    assert _without_metadata(data[:2] + long + data[2:]) == data[:2] + long + data[end:]


def test_a_palette_of_one_colour_is_enough_for_labels_of_one_class() -> None:
    picture = Image.fromarray(np.zeros((4, 5), np.uint8), mode="P")
    picture.putpalette([7, 8, 9])
    colors: tuple[Any, ...] = ((7, 8, 9), (1, 2, 3))
    found = decode_labels(encoded(picture, bits=8), "a", LabelStorage("colour", colors))
    assert np.array_equal(found, np.zeros((4, 5)))


def test_a_segment_for_arithmetic_coding_is_no_frame() -> None:
    """DAC (0xCC) stands among the markers of frames: what the frame said, and its scans lack, is still known after it."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8))
    plain = encoded(photo, "JPEG", progressive=True)
    first, last = plain.index(b"\xff\xda"), plain.rindex(b"\xff\xda")
    with_segment = plain[:first] + b"\xff\xcc\x00\x04\x00\x10" + plain[first:]
    assert np.array_equal(decode_image(with_segment, "a"), decode_image(plain, "a"))
    with pytest.raises(HarnessError, match="the last scans of the JPEG are missing"):
        decode_image(with_segment[: last + 6] + b"\xff\xd9", "a")


def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded() -> None:
    """Each costs a pass over all pixels, and has 14 bytes: 264 kB held a server for 15 seconds."""
    whole = encoded(Image.new("RGB", (64, 48), (9, 9, 9)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    scan = whole[last:-2]
    begin = time.monotonic()
    with pytest.raises(HarnessError, match="a JPEG of more than 200 scans"):
        decode_image(whole[:-2] + scan * 50_000 + whole[-2:], "a")
    assert time.monotonic() - begin < 20


def test_only_exif_turns_an_image() -> None:
    """Not what XMP says: OpenCV, with which labels are compared, does not look there."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8))
    xmp = b'http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    plain = encoded(photo, "JPEG")
    with_xmp = plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:]
    assert decode_image(with_xmp, "a").shape == (24, 40, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(photo, "JPEG", exif=exif), "a").shape == (40, 24, 3)


def test_a_damaged_png_is_named_without_addresses_of_memory() -> None:
    data = bytearray(encoded(Image.new("RGB", (8, 8))))
    data[12:16] = b"IHDX"
    with pytest.raises(HarnessError) as caught:
        decode_image(bytes(data), "a.png")
    assert "a.png" in str(caught.value)
    assert "0x" not in str(caught.value)
