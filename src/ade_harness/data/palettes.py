"""Whether the indices of a palette PNG are its labels.

Label files are often saved with a palette, so that people see colours; then the index is the label. But a lossless
optimiser makes a palette from a grey file as well, in which entries are the labels and indices only number them. The
palette shows which: it is the identity, or one that is known to colour labels by their value, or nobody can know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.containers import PNG_START, read_png_header
from ade_harness.data.labels import Color, default_colors

_CITYSCAPES: tuple[Color, ...] = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
"""Colours of the train ids 0..18 (cityscapesscripts/helpers/labels.py)."""
_MIN_ENTRIES = 3
"""Entries of a palette that identify the data set."""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class _Table:
    """The colours that a palette gives to values; where `fixed` is false, black or white."""

    colors: npt.NDArray[np.uint8]
    fixed: npt.NDArray[np.bool_]


def _table(colors: dict[int, Color]) -> _Table:
    values, fixed = np.zeros((256, 3), np.uint8), np.zeros(256, bool)
    for value, color in colors.items():
        values[value], fixed[value] = color, True
    return _Table(values, fixed)


@cache
def _known() -> tuple[_Table, ...]:
    """Grey levels, PASCAL VOC's colours, and those of ADE20K (official and zero-based values) and Cityscapes."""
    ade = ade20k_classes().colors
    return (
        _table({value: (value, value, value) for value in range(256)}),
        _table(dict(enumerate((_BLACK, *default_colors(255))))),
        _table(dict(enumerate((_BLACK, *ade)))),
        _table(dict(enumerate(ade))),
        _table(dict(enumerate(_CITYSCAPES))),
    )


def misleading_entry(
    palette: npt.NDArray[np.uint8], used: npt.NDArray[np.intp], own: tuple[Color | None, ...] = ()
) -> int | None:
    """Return an index whose entry says that indices are not the labels; None if they are.

    Args:
        palette: uint8 [entries, 3] RGB.
        used: the indices that count.
        own: colours by which the data set shows values, None where it has none.
    """
    beyond = used[used >= len(palette)]
    if beyond.size:
        return int(beyond[0])
    tables = _known()
    if any(color is not None for color in own):
        tables = (*tables, _table({value: color for value, color in enumerate(own) if color is not None}))
    shown = palette[used]
    plain = (shown == _BLACK).all(1) | (shown == _WHITE).all(1)
    first = 0
    for table in tables:
        right = np.where(table.fixed[used], (shown == table.colors[used]).all(1), plain)
        if right.all() and (table is tables[0] or _shows_colours(palette, shown, table)):
            return None
        first = first or int(used[np.argmin(right)])
    return first


def _shows_colours(palette: npt.NDArray[np.uint8], shown: npt.NDArray[np.uint8], table: _Table) -> bool:
    """Whether a palette that fits a table is no list of grey levels: optimisers make such lists of grey labels.

    ADE20K's wall is (120, 120, 120), as is the grey label 120: entries that are not used have to show the data set.
    """
    if (shown != shown[:, :1]).any() or (shown == shown[:, :1] * (shown == 255)).all():
        return True  # a colour, or black and white alone, which any table leaves to its indices
    entries, expected = palette[table.fixed[: len(palette)]], table.colors[: len(palette)][table.fixed[: len(palette)]]
    coloured = (expected != expected[:, :1]).any(1)
    return bool(coloured.any()) and bool((entries[coloured] == expected[coloured]).all())


def is_label_file(data: bytes) -> bool:
    """Whether a file is a PNG whose palette colours the classes of ADE20K, PASCAL VOC or Cityscapes: no photograph.

    Args:
        data: of the file, or so much of its start that a palette would be in it.
    """
    if not data.startswith(PNG_START):
        return False
    palette = read_png_header(data, "the file", "image").palette
    if palette is None or len(palette) < _MIN_ENTRIES:
        return False
    return any(
        (palette[fixed] == table.colors[: len(palette)][fixed]).all()
        for table in _known()[1:]
        if (fixed := table.fixed[: len(palette)]).any()
    )
