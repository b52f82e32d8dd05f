"""What an image or label file is, before anything of it is decoded: JPEG or PNG, how large, how its values are stored.

Only these two formats are read, wherever a file comes from: Pillow alone would open some forty, one of which runs
Ghostscript on the sender's program.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ade_harness.errors import HarnessError

MAX_PIXELS = 2**27
"""Pixels of an image that is decoded: five times the largest of public segmentation sets; one byte each and more."""
MAX_FILE_BYTES = 2**28
"""Bytes of an image or label file."""
FORMATS = ("JPEG", "PNG")
"""As Pillow calls them."""
GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
"""Colour types of PNG."""
PNG_START = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
_SOS, _EOI, _PROGRESSIVE = 0xDA, 0xD9, (0xC2, 0xCA)
_FRAMES = tuple(marker for marker in range(0xC0, 0xD0) if marker not in (0xC4, 0xC8, 0xCC))
"""Markers of a JPEG: the start of a scan, the end, frames of scans that refine each other, and all frames."""
_MAX_SCANS = 200
"""Usual progressive JPEGs have 10; each costs a pass over all pixels, and may be 14 bytes."""
_ALONE = (0x00, 0x01, *range(0xD0, 0xD9))
"""After 0xFF: a byte of coded pixels, and markers that no length follows."""
_ADAM7 = (
    (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1),
)  # fmt: skip
"""First row and column of each pass, and the steps to the next ones."""
_PIECE_BYTES = 2**20
"""Decompressed at once, to be counted."""
_CHUNKS = 2**16
"""Chunks of a PNG: encoders that write the most make one for each 8 KB."""
_OTHERS = {
    b"GIF8": "GIF", b"BM": "BMP", b"II*\x00": "TIFF", b"MM\x00*": "TIFF", b"RIFF": "WebP", b"%!PS": "PostScript",
    b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF", b"<svg": "SVG", b"\x93NUMPY": "NumPy", b"version https://git-lfs":
    "a Git LFS pointer: `git lfs pull` fetches the file", b"<!DO": "HTML", b"<htm": "HTML",
}  # fmt: skip


@dataclass(frozen=True)
class PngHeader:
    """What a PNG says before its pixels."""

    height: int
    width: int
    depth: int
    """Bits of a channel: 1, 2, 4, 8 or 16."""
    colour_type: int
    """`GREY`, `COLOUR`, `PALETTE`, `GREY_ALPHA` or `COLOUR_ALPHA`."""
    interlaced: bool
    """Whether the pixels come in the seven passes of Adam7."""
    palette: npt.NDArray[np.uint8] | None
    """[entries, 3] RGB, of colour type `PALETTE` alone: others may carry one as a suggestion."""


class UnreadableError(HarnessError):
    """A file that is no image, or no whole one."""


def unreadable(name: str, what: str, reason: object) -> UnreadableError:
    """Return the error of a file that cannot be decoded; `what` is "image" or "label map"."""
    text = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    text = re.sub(r" ?<[\w.]+ object at 0x[0-9a-f]+>", "", text)  # Pillow names the bytes in memory
    return UnreadableError(f"{name}: this {what} cannot be read ({text}). Replace the file.")


def container_of(data: bytes, name: str, what: str) -> str:
    """Return "JPEG" or "PNG" by a file's first bytes, whatever its name says; raises HarnessError for all else."""
    if data.startswith(PNG_START):
        return "PNG"
    if data.startswith(_JPEG):
        return "JPEG"
    if not data:
        raise unreadable(name, what, "the file is empty")
    other = next((kind for start, kind in _OTHERS.items() if data.startswith(start)), None)
    raise unreadable(name, what, f"neither JPEG nor PNG{f' but {other}' if other else ''}")


def check_pixels(height: int, width: int, name: str, what: str, maximum: int = MAX_PIXELS) -> None:
    """Refuse an image with no pixel, or with more than can be meant."""
    if not 0 < height * width <= maximum:
        text = f"it says {width}x{height} pixels (width x height); at most {maximum:,} are decoded"
        raise unreadable(name, what, text)


def read_png_header(data: bytes, name: str, what: str) -> PngHeader:
    """Read what stands before a PNG's pixels.

    Args:
        data: the file, or so much of its start that the palette is in it.
        name: how messages call the file.
        what: "image" or "label map".

    Raises:
        HarnessError: damaged, or too large.
    """
    header, palettes, at_pixels = None, [], False
    for kind, content in _chunks(data, name, what):
        if kind == b"IHDR" and len(content) == 13:
            width, height, depth, colour_type = struct.unpack(">IIBB", content[:10])
            header = height, width, depth, colour_type, content[12] == 1
        elif kind == b"PLTE":
            palettes.append(np.frombuffer(content[: len(content) // 3 * 3], np.uint8).reshape(-1, 3))
        elif kind == b"IDAT":
            at_pixels = True
            break
    if header is None:
        raise unreadable(name, what, "no PNG header")
    check_pixels(header[0], header[1], name, what)
    if header[3] != PALETTE:
        return PngHeader(*header, None)
    if len(palettes) > 1 or (at_pixels and not palettes):  # Pillow takes the last one, or shows indices as grey
        found = f"{len(palettes)} palettes" if palettes else "no palette"
        raise unreadable(name, what, f"a palette image with {found} before its pixels")
    return PngHeader(*header, palettes[0] if palettes else None)


def check_png(data: bytes, name: str, what: str) -> PngHeader:
    """Check that a PNG is intact: every chunk's checksum, and the end. Decoders skip some of them.

    Raises:
        HarnessError: damaged or cut off.
    """
    last, headers, palettes, pixels = b"", 0, 0, []
    for kind, content in _chunks(data, name, what):
        last = kind
        headers += kind == b"IHDR"
        palettes += kind == b"PLTE"
        if kind == b"IDAT":
            pixels.append(content)
        if kind == b"IEND":
            break
    if last != b"IEND":
        raise unreadable(name, what, "it is truncated")
    if headers > 1 or palettes > 1:
        raise unreadable(name, what, f"it has several {'headers' if headers > 1 else 'palettes'}")
    header = read_png_header(data, name, what)
    _check_rows(header, b"".join(pixels), name, what)
    return header


def _check_rows(header: PngHeader, pixels: bytes, name: str, what: str) -> None:
    """Check that the compressed pixels are as many as the header says: decoders fill rows that are missing.

    More than that is let through: every pixel is there.
    """
    wanted, found = _filtered_bytes(header), 0
    stream = zlib.decompressobj()
    try:
        while found < wanted and pixels and not stream.eof:
            found += len(stream.decompress(pixels, min(wanted - found, _PIECE_BYTES)))
            pixels = stream.unconsumed_tail
    except zlib.error as error:
        raise unreadable(name, what, f"damaged: {error}") from error
    if found < wanted:
        raise unreadable(name, what, f"rows are missing: {found:,} bytes of pixels, expected {wanted:,}")


def _filtered_bytes(header: PngHeader) -> int:
    """Return the bytes of all rows, each with its filter, before compression (PNG specification, 7 and 8)."""
    channels = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}.get(header.colour_type, 1)
    passes = _ADAM7 if header.interlaced else ((0, 0, 1, 1),)
    wanted = 0
    for top, left, down, right in passes:
        rows, columns = -(-(header.height - top) // down), -(-(header.width - left) // right)
        if columns > 0:
            wanted += rows * (1 + -(-columns * channels * header.depth // 8))
    return wanted


def limit_scans(data: bytes, name: str, what: str) -> None:
    """Refuse a JPEG of so many scans that decoding it would take for ever; of any bytes, before they are decoded."""
    if sum(marker == _SOS for marker, _ in _segments(data)) > _MAX_SCANS:
        raise unreadable(name, what, f"a JPEG of more than {_MAX_SCANS} scans")


def check_scans(data: bytes, name: str, what: str) -> None:
    """Check that a JPEG has all its scans.

    Those of a progressive one refine the whole image, and others may hold a colour component each: without the last
    ones a decoder has every pixel, only coarser or in other colours, and warns of nothing.

    Raises:
        HarnessError: of a coefficient, bits are missing (ITU-T T.81, G.1.1.1.2: those below the last ``Al``).
    """
    missing: dict[int, npt.NDArray[np.uint8]] = {}
    progressive = False
    for marker, content in _segments(data):
        if marker in _FRAMES:
            missing = {content[6 + 3 * i]: np.ones(64, np.uint8) for i in range((len(content) - 6) // 3)}
            progressive = marker in _PROGRESSIVE
        elif marker == _SOS and len(content) >= 4 + 2 * content[0]:
            components = content[1 : 1 + 2 * content[0] : 2]
            start, end, bits = content[-3:] if progressive else (0, 63, 0)
            for component in components:
                if component in missing:
                    missing[component][start : end + 1] = bits & 15
            if not progressive and not any(left.any() for left in missing.values()):
                return  # most files: one scan of all components
    if any(left.any() for left in missing.values()):
        raise unreadable(name, what, "the last scans of the JPEG are missing")


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, content) of a JPEG's segments up to its end; skip the coded pixels after a scan's header."""
    place = data.find(b"\xff", 2)
    while 0 <= place < len(data) - 3:
        marker = data[place + 1]
        if marker == _EOI:
            return
        if marker == 0xFF or marker in _ALONE:  # a fill byte; or no segment follows
            place = data.find(b"\xff", place + (1 if marker == 0xFF else 2))
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, data[place + 4 : end]
        place = data.find(b"\xff", end)


def _chunks(data: bytes, name: str, what: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, content) of chunks; of those that matter for pixels, and are complete, the checksum is verified."""
    place = len(PNG_START)
    for _ in range(_CHUNKS):
        if place + 8 > len(data):
            return
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data) and kind != b"IDAT":
            raise unreadable(name, what, "it is truncated")
        content = data[place + 8 : end - 4]
        if end <= len(data) and not kind[0] & 0x20:  # critical: ancillary ones may be damaged
            (expected,) = struct.unpack_from(">I", data, end - 4)
            if zlib.crc32(content, zlib.crc32(kind)) != expected:
                raise unreadable(name, what, f"damaged: a checksum is wrong, in the chunk {kind!r}")
        yield kind, content
        place = end
    raise unreadable(name, what, f"it has more than {_CHUNKS:,} chunks")
