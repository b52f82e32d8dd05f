"""The loops that numba compiles for the CPU: passes over the scores, without a tensor of [C, H, W].

`label_rows` prunes exactly. Bilinear interpolation is a convex combination, so inside a cell of the scores' grid
only a class whose largest corner reaches the largest of all classes' smallest corners can win. Where that leaves
one class (most of a trained network's output) nothing is interpolated; where it leaves few, only those; where it
leaves many (noise), rows are interpolated class by class with vector instructions. Every value that is computed is
computed in torch's float32 order, so labels equal torch's bit for bit.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from numba import types
from numba.extending import intrinsic

Floats = Any  # float32 arrays
Bytes = Any  # uint8 arrays

_jit = nb.njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")

SLACK = np.float32(2e-6)
"""Fraction of the largest absolute score: over twice the rounding error of two bilinear steps (12 units of 2^-24)."""
_DENSE_ROWS = 16
_SPARSE_SHARE = np.float32(0.08)
"""Fraction of all classes: with more candidates per pixel than this, interpolating all rows by vectors is faster."""


@intrinsic
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """A * b + c with one rounding, float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), code


@_jit
def largest_magnitude(scores: Floats) -> tuple[Any, Any]:
    """Return the largest absolute value of float32 [C, h, w], and how many values are infinite or NaN."""
    bits = scores.reshape(-1).view(np.uint32)
    largest = np.uint32(0)
    special = 0
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)  # as integers, magnitudes of floats have the floats' order
        largest = max(largest, magnitude)
        special += magnitude >= np.uint32(0x7F800000)
    return np.array([largest], np.uint32).view(np.float32)[0], special


@_jit
def _lerp_row(source: Floats, low: Any, high: Any, w_low: Floats, w_high: Floats, out: Floats) -> None:
    for x in range(out.size):
        out[x] = _fma(source[low[x]], w_low[x], source[high[x]] * w_high[x])


@_jit
def _mix_rows(upper: Floats, lower: Floats, w_upper: Any, w_lower: Any, out: Floats) -> None:
    for x in range(out.size):
        out[x] = _fma(upper[x], w_upper, lower[x] * w_lower)


@_jit
def _dense_rows(
    scores: Floats, y1: Any, x1: Any, y2: Any, x2: Any, two_steps: bool, start: int, stop: int, scratch: Any, out: Any
) -> None:
    """Label rows start..stop-1 by interpolating every class."""
    columns, rows, wide, best = scratch
    rows_out = stop - start
    best[:rows_out] = -np.inf
    out[start:stop] = 0
    first_mid, last_mid = y2[0][start], y2[1][stop - 1]
    first_low, last_low = y1[0][first_mid], y1[1][last_mid]
    for c in range(scores.shape[0]):
        plane = scores[c]
        for r in range(first_low, last_low + 1):
            _lerp_row(plane[r], x1[0], x1[1], x1[2], x1[3], columns[r - first_low])
        if two_steps:
            for m in range(first_mid, last_mid + 1):
                low, high = y1[0][m] - first_low, y1[1][m] - first_low
                _mix_rows(columns[low], columns[high], y1[2][m], y1[3][m], rows)
                _lerp_row(rows, x2[0], x2[1], x2[2], x2[3], wide[m - first_mid])
        label = np.int32(c)
        for y in range(start, stop):
            if two_steps:
                upper, lower = wide[y2[0][y] - first_mid], wide[y2[1][y] - first_mid]
                w_upper, w_lower = y2[2][y], y2[3][y]
            else:
                upper, lower = columns[y1[0][y] - first_low], columns[y1[1][y] - first_low]
                w_upper, w_lower = y1[2][y], y1[3][y]
            row_best, row_out = best[y - start], out[y]
            for x in range(row_out.size):
                value = _fma(upper[x], w_upper, lower[x] * w_lower)
                better = value > row_best[x]
                row_best[x] = value if better else row_best[x]
                row_out[x] = label if better else row_out[x]


@_jit
def _at(plane: Floats, y: Any, x: Any, row: Any, column: Any) -> Any:
    """One value of a bilinear step: x first, then y."""
    upper, lower = plane[y[0][row]], plane[y[1][row]]
    left, right, w_left, w_right = x[0][column], x[1][column], x[2][column], x[3][column]
    above = _fma(upper[left], w_left, upper[right] * w_right)
    below = _fma(lower[left], w_left, lower[right] * w_right)
    return _fma(above, y[2][row], below * y[3][row])


@_jit
def _at_two(plane: Floats, y1: Any, x1: Any, y2: Any, x2: Any, row: Any, column: Any) -> Any:
    """One value of two bilinear steps."""
    top, bottom, left, right = y2[0][row], y2[1][row], x2[0][column], x2[1][column]
    w_left, w_right = x2[2][column], x2[3][column]
    above = _fma(_at(plane, y1, x1, top, left), w_left, _at(plane, y1, x1, top, right) * w_right)
    below = _fma(_at(plane, y1, x1, bottom, left), w_left, _at(plane, y1, x1, bottom, right) * w_right)
    return _fma(above, y2[2][row], below * y2[3][row])


@_jit
def _bounds(scores: Floats, first: int, last: int, span: int, largest: Floats, floor: Floats, column: Any) -> None:
    """Per class and cell column, the largest corner in rows first..last; per column the best of the smallest."""
    row_min, row_max = column
    width = scores.shape[2]
    floor[:] = -np.inf
    for c in range(scores.shape[0]):
        plane, peak = scores[c], largest[c]
        source = plane[first]
        for x in range(width):
            row_min[x] = source[x]
            row_max[x] = source[x]
        for r in range(first + 1, last + 1):
            source = plane[r]
            for x in range(width):
                row_min[x] = min(row_min[x], source[x])
                row_max[x] = max(row_max[x], source[x])
        for x in range(width, row_min.size):
            row_min[x] = row_min[width - 1]
            row_max[x] = row_max[width - 1]
        if span == 2:
            for x in range(width):
                peak[x] = max(row_max[x], row_max[x + 1])
                floor[x] = max(floor[x], min(row_min[x], row_min[x + 1]))
        else:
            for x in range(width):
                smallest, greatest = row_min[x], row_max[x]
                for k in range(1, span):
                    smallest = min(smallest, row_min[x + k])
                    greatest = max(greatest, row_max[x + k])
                peak[x] = greatest
                floor[x] = max(floor[x], smallest)


@_jit
def _candidates(largest: Floats, floor: Floats, slack: Any, number: Any, only: Any) -> None:
    """Count the classes that can win in each cell column; where it is one, `only` is that class."""
    number[:] = 0
    only[:] = 0
    for c in range(largest.shape[0]):
        peak = largest[c]
        for x in range(floor.size):
            possible = peak[x] >= floor[x] - slack
            number[x] += np.int32(1) if possible else np.int32(0)
            only[x] += np.int32(c) if possible else np.int32(0)


@_jit
def label_rows(scores: Floats, y1: Any, x1: Any, y2: Any, x2: Any, two_steps: bool, magnitude: Any, out: Any) -> None:
    """Write the label map; of one view; see :func:`ade_harness.kernels.reference.label_map`.

    Args:
        scores: float32 [C, h, w], finite.
        y1: axis from h to the height of the first step; x1 likewise for the width.
        y2: axis from the (cropped) first step's height to H; x2 likewise. Identities if there is one step.
        two_steps: whether there is a second step.
        magnitude: the largest absolute score.
        out: uint8 or int32 [H, W].
    """
    channels, _, width = scores.shape
    height_out, width_out = out.shape
    slack = magnitude * SLACK

    # the cell column of each output column, and where each cell column's output columns begin
    begin = np.zeros(width + 1, np.int64)
    span: Any = 1
    for x in range(width_out):
        left, right = x1[0][x2[0][x]], x1[1][x2[1][x]]
        span = max(span, np.int64(right) - np.int64(left) + 1)
        begin[left + 1] = x + 1
    for x in range(1, width + 1):
        begin[x] = max(begin[x], begin[x - 1])

    max_low: Any = 1
    max_mid: Any = 1
    for y in range(height_out):
        last = min(y + _DENSE_ROWS, height_out) - 1
        max_mid = max(max_mid, np.int64(y2[1][last]) - np.int64(y2[0][y]) + 1)
        max_low = max(max_low, np.int64(y1[1][y2[1][last]]) - np.int64(y1[0][y2[0][y]]) + 1)
    middle = x1[0].size
    scratch = (
        np.empty((max_low, middle), np.float32),
        np.empty(middle, np.float32),
        np.empty((max_mid if two_steps else 1, width_out), np.float32),
        np.empty((_DENSE_ROWS, width_out), np.float32),
    )
    largest = np.empty((channels, width), np.float32)
    floor = np.empty(width, np.float32)
    column = (np.empty(width + span, np.float32), np.empty(width + span, np.float32))
    number = np.empty(width, np.int32)
    only = np.empty(width, np.int32)
    possible = np.empty(channels, np.int64)

    y = 0
    dense_from = 0  # rows dense_from..y-1 wait to be done densely
    while y < height_out:
        first = np.int64(y1[0][y2[0][y]])
        stop = y + 1
        while stop < height_out and stop - y < _DENSE_ROWS and np.int64(y1[0][y2[0][stop]]) == first:
            stop += 1
        last = np.int64(y1[1][y2[1][stop - 1]])
        _bounds(scores, first, last, span, largest, floor, column)
        _candidates(largest, floor, slack, number, only)
        work = 0
        for x in range(width):
            if number[x] > 1:
                work += number[x] * (begin[x + 1] - begin[x])
        if work > _SPARSE_SHARE * channels * width_out:
            if stop - dense_from > _DENSE_ROWS:
                if y > dense_from:
                    _dense_rows(scores, y1, x1, y2, x2, two_steps, dense_from, y, scratch, out)
                dense_from = y
            y = stop
            continue
        if y > dense_from:
            _dense_rows(scores, y1, x1, y2, x2, two_steps, dense_from, y, scratch, out)
        for x in range(width):
            start_x, stop_x = begin[x], begin[x + 1]
            if number[x] == 1:
                for row in range(y, stop):
                    for at in range(start_x, stop_x):
                        out[row, at] = only[x]
            elif start_x < stop_x:
                found = 0
                threshold = floor[x] - slack
                for c in range(channels):
                    if largest[c, x] >= threshold:
                        possible[found] = c
                        found += 1
                for row in range(y, stop):
                    for at in range(start_x, stop_x):
                        best = np.float32(-np.inf)
                        label = possible[0]
                        for k in range(found):
                            plane = scores[possible[k]]
                            if two_steps:
                                value = _at_two(plane, y1, x1, y2, x2, row, at)
                            else:
                                value = _at(plane, y1, x1, row, at)
                            if value > best:
                                best = value
                                label = possible[k]
                        out[row, at] = label
        y = stop
        dense_from = y
    if y > dense_from:
        _dense_rows(scores, y1, x1, y2, x2, two_steps, dense_from, y, scratch, out)


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 with these bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), code


_ROUND = np.float32(12582912.0)  # 1.5 * 2^23: adding it leaves no fraction bits
_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(-0.693359375)
_LN2_LOW = np.float32(2.12194440e-4)


@_jit
def _exp(value: Any) -> Any:
    """Exp of a float32 in -87..0, within 2 units of the last place; the polynomial is a Taylor series' minimax fit."""
    value = max(value, np.float32(-87.0))
    power = (value * _LOG2_E + _ROUND) - _ROUND
    r = _fma(power, _LN2_LOW, _fma(power, _LN2_HIGH, value))
    p = np.float32(1.9875691500e-4)
    p = _fma(p, r, np.float32(1.3981999507e-3))
    p = _fma(p, r, np.float32(8.3334519073e-3))
    p = _fma(p, r, np.float32(4.1665795894e-2))
    p = _fma(p, r, np.float32(1.6666665459e-1))
    p = _fma(p, r, np.float32(5.0000001201e-1))
    p = _fma(p, r * r, r) + np.float32(1.0)
    return p * _as_float((np.int32(power) + np.int32(127)) << np.int32(23))


@_jit
def _overlap_factors(rows: Any, columns: Any, first: int, last: int) -> tuple[Any, bool]:
    """Return, for canvas rows first..last, what to divide sums by; or to multiply, where that is exact.

    Counts of windows are mostly powers of two, whose reciprocals are exact, and multiplying is much faster.
    """
    factors = np.empty((last - first + 1, columns.size), np.float32)
    multiply = True
    for m in range(first, last + 1):
        for x in range(columns.size):
            number = np.int64(rows[m] * columns[x])
            factors[m - first, x] = np.float32(number)
            multiply = multiply and (number & (number - 1)) == 0
    if multiply:
        for m in range(factors.shape[0]):
            for x in range(columns.size):
                factors[m, x] = np.float32(1) / factors[m, x]
    return factors, multiply


@_jit
def view_rows(
    scores: Any,
    origins: Any,
    y1: Any,
    x1: Any,
    rows: Any,
    columns: Any,
    area: Any,
    y2: Any,
    x2: Any,
    steps: Any,
    start: int,
    stop: int,
    out: Any,
    labels: Any,
) -> None:
    """Compute rows start..stop-1 of a view at the label map's size; see :class:`ade_harness.kernels.views.View`.

    Args:
        scores: float32 [N, C, h, w].
        origins: int64 [N, 2].
        y1: axis from h to the window's height; x1 likewise for the width.
        rows: windows over each canvas row; columns likewise.
        area: (top, left, height, width) of the valid part of the canvas.
        y2: axis from the area's height to H; x2 likewise.
        steps: (whether y2 and x2 change anything, whether windows overlap).
        out: float32 [C, stop - start, W] for the scores; or [1, ...] as work space, when only labels are wanted.
        labels: uint8 or int32 [stop - start, W] for the first largest channel; or [0, 0], when scores are wanted.
    """
    second, overlapping = steps
    keep = labels.size == 0
    top, left = area[0], area[1]
    first_mid, last_mid = top + np.int64(y2[0][start]), top + np.int64(y2[1][stop - 1])
    height, width = y1[0].size, x1[0].size
    middle = np.empty((last_mid - first_mid + 1, columns.size), np.float32)
    low_rows = np.empty((scores.shape[2], width), np.float32)
    wide = np.empty((middle.shape[0], x2[0].size), np.float32)
    part = np.empty(width, np.float32)
    best = np.full(labels.shape, -np.inf, np.float32)
    labels[:] = 0
    factors, multiply = _overlap_factors(rows, columns, first_mid, last_mid)
    for c in range(scores.shape[1]):
        middle[:] = 0
        for n in range(scores.shape[0]):
            window_top, window_left = origins[n, 0], origins[n, 1]
            begin, end = max(first_mid, window_top) - window_top, min(last_mid + 1, window_top + height) - window_top
            if begin >= end:
                continue
            plane = scores[n, c]
            first_low, last_low = np.int64(y1[0][begin]), np.int64(y1[1][end - 1])
            for r in range(first_low, last_low + 1):
                _lerp_row(plane[r], x1[0], x1[1], x1[2], x1[3], low_rows[r - first_low])
            for y in range(begin, end):
                upper, lower = low_rows[np.int64(y1[0][y]) - first_low], low_rows[np.int64(y1[1][y]) - first_low]
                _mix_rows(upper, lower, y1[2][y], y1[3][y], part)
                target = middle[window_top + y - first_mid]
                for x in range(width):
                    target[window_left + x] += part[x]
        if overlapping:
            for m in range(middle.shape[0]):
                line, factor = middle[m], factors[m]
                if multiply:
                    for x in range(line.size):
                        line[x] = line[x] * factor[x]
                else:
                    for x in range(line.size):
                        line[x] = line[x] / factor[x]
        if second:
            for m in range(middle.shape[0]):
                _lerp_row(middle[m, left : left + area[3]], x2[0], x2[1], x2[2], x2[3], wide[m])
        for y in range(start, stop):
            row = out[c if keep else 0, y - start]
            if second:
                upper = wide[top + np.int64(y2[0][y]) - first_mid]
                lower = wide[top + np.int64(y2[1][y]) - first_mid]
                _mix_rows(upper, lower, y2[2][y], y2[3][y], row)
            else:
                row[:] = middle[top + y - first_mid, left : left + row.size]
            if not keep:
                row_best, row_labels, label = best[y - start], labels[y - start], np.int32(c)
                for x in range(row.size):
                    better = row[x] > row_best[x]
                    row_best[x] = row[x] if better else row_best[x]
                    row_labels[x] = label if better else row_labels[x]


@_jit
def softmax_rows(values: Any) -> None:
    """Replace float32 [C, R, W] by its softmax over C."""
    channels, rows, width = values.shape
    largest, total = np.empty(width, np.float32), np.empty(width, np.float32)
    for r in range(rows):
        largest[:] = -np.inf
        total[:] = 0
        for c in range(channels):
            line = values[c, r]
            for x in range(width):
                largest[x] = max(largest[x], line[x])
        for c in range(channels):
            line = values[c, r]
            for x in range(width):
                line[x] = _exp(line[x] - largest[x])
                total[x] += line[x]
        for c in range(channels):
            line = values[c, r]
            for x in range(width):
                line[x] = line[x] / total[x]


@_jit
def add_rows(values: Any, flipped: bool, total: Any) -> None:
    """Add float32 [C, R, W] to `total`, mirrored if flipped."""
    channels, rows, width = values.shape
    for c in range(channels):
        for r in range(rows):
            line, into = values[c, r], total[c, r]
            if flipped:
                for x in range(width):
                    into[x] += line[width - 1 - x]
            else:
                for x in range(width):
                    into[x] += line[x]


@_jit
def best_rows(total: Any, divisor: Any, out: Any) -> None:
    """Write the first largest channel of float32 [C, R, W] / divisor to uint8 or int32 [R, W]."""
    channels, rows, width = total.shape
    best, label = np.empty(width, np.float32), np.empty(width, np.int32)
    for r in range(rows):
        best[:] = -np.inf
        label[:] = 0
        for c in range(channels):
            line = total[c, r]
            for x in range(width):
                value = line[x] / divisor
                better = value > best[x]
                best[x] = value if better else best[x]
                label[x] = np.int32(c) if better else label[x]
        for x in range(width):
            out[r, x] = label[x]


@_jit
def count_pixels(labels: Bytes, target: Bytes, counts: Any) -> None:
    """Add pixels to int64 [C, C + 1]; see :func:`ade_harness.kernels.reference.count`."""
    classes, columns = counts.shape
    flat, truth, table = labels.reshape(-1), target.reshape(-1), counts.reshape(-1)
    for i in range(flat.size):
        if truth[i] < classes:
            table[np.int64(truth[i]) * columns + min(np.int64(flat[i]), columns - 1)] += 1


@_jit
def look_up(pixels: Bytes, table: Floats, order: Any, out: Floats) -> None:
    """Write table[c, pixels[y, x, order[c]]] to float32 [3, H, W]."""
    height, width, _ = pixels.shape
    for y in range(height):
        line = pixels[y]
        for c in range(3):
            values, source, target = table[c], order[c], out[c, y]
            for x in range(width):
                target[x] = values[line[x, source]]
