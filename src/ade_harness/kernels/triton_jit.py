"""Device code, by Triton: labels of views, norms of their softmax, masks, counts, normalised pixels, invalid scores.

Triton compiles annotations too: none but `tl.constexpr` may stand at a function with `@triton.jit`. Kernels are
launched without the fusion of products and sums (``enable_fp_fusion=False``): each float32 operation that is written
here rounds once, and where torch's own kernel fuses, :func:`triton.language.fma` is written.

Integers that change from image to image are not specialised: Triton would compile a kernel again for a size that is a
multiple of 16, or 1, in the middle of a run and on every rank, and no address here gains from knowing it.

A table of int64 describes the views of an image: `FIELDS` numbers for each (see `fields`), then the origins of all
windows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

FIELDS = tl.constexpr(13)
"""Pointer to the scores; their height and width; the window's; the valid area's top, left, height and width; flipped;
legacy; the number of windows; where their origins begin in the table."""


@triton.jit
def _mix(a, b, w_a, w_b):
    """Interpolate between two values."""
    return tl.fma(a, w_a, b * w_b)


@triton.jit
def _axis(target, old, new, legacy):
    """Return indices and weights of :func:`ade_harness.kernels.bilinear.axis` at `target`."""
    scale = tl.div_rn(tl.cast(old, tl.float32), tl.cast(new, tl.float32))
    index = target.to(tl.float32)
    centred = tl.fma(index + 0.5, tl.zeros_like(index) + scale, tl.zeros_like(index) - 0.5)
    position = tl.where(legacy, index * scale, tl.maximum(centred, 0.0))
    low = tl.minimum(position.to(tl.int32), old - 1)
    high = tl.where(old == new, low, tl.minimum(low + 1, old - 1))
    upper = tl.minimum(position - low.to(tl.float32), 1.0)
    return low, high, 1.0 - upper, upper


@triton.jit
def _window(planes, m, n, low_height, low_width, height, width, legacy, in_channels):
    """Return float32 [B, P], the upsampled window's values at rows m and columns n int32 [P], and where it has any."""
    inside = (m >= 0) & (m < height) & (n >= 0) & (n < width)
    top, bottom, w_top, w_bottom = _axis(m, low_height, height, legacy)
    left, right, w_left, w_right = _axis(n, low_width, width, legacy)
    mask = in_channels & inside[None, :]
    a = tl.load(planes + (top * low_width + left)[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(planes + (top * low_width + right)[None, :], mask=mask, other=0.0).to(tl.float32)
    c = tl.load(planes + (bottom * low_width + left)[None, :], mask=mask, other=0.0).to(tl.float32)
    d = tl.load(planes + (bottom * low_width + right)[None, :], mask=mask, other=0.0).to(tl.float32)
    w_left, w_right = w_left[None, :], w_right[None, :]
    value = _mix(_mix(a, b, w_left, w_right), _mix(c, d, w_left, w_right), w_top[None, :], w_bottom[None, :])
    # torch copies where the size stays; weights 1 and 0 would make NaN of infinities
    value = tl.where((low_height == height) & (low_width == width) & (legacy == 0), a, value)
    return tl.where(mask, value, 0.0), inside


@triton.jit
def _geometry(row):
    """Return the fields of a view's row that are sizes and places, as int32, and whether it is flipped and legacy."""
    low_height, low_width = tl.load(row + 1).to(tl.int32), tl.load(row + 2).to(tl.int32)
    window_height, window_width = tl.load(row + 3).to(tl.int32), tl.load(row + 4).to(tl.int32)
    top, left = tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    height, width = tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)
    flipped, legacy = tl.load(row + 9) != 0, tl.load(row + 10) != 0
    return low_height, low_width, window_height, window_width, top, left, height, width, flipped, legacy


@triton.jit
def _places(y, x, top, left, area_height, area_width, height, width, flipped):
    """Return rows and columns of the canvas that pixels y, x of the label map lie between, and their weights."""
    m0, m1, w_m0, w_m1 = _axis(y, area_height, height, False)
    n0, n1, w_n0, w_n1 = _axis(tl.where(flipped, width - 1 - x, x), area_width, width, False)
    return m0 + top, m1 + top, n0 + left, n1 + left, w_m0, w_m1, w_n0, w_n1


@triton.jit
def _view(
    table, view, first, channel, channels, y, x, height, width,
    TWO_STEPS: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Return float32 [B, P]: channels `channel` int32 [B] of one view at pixels y, x int32 [P] of the label map.

    `first` has the dtype of the scores. Windows that no pixel of the tile can need are passed over.
    """
    row = table + view * FIELDS
    pointer = tl.load(row).to(tl.pointer_type(first.dtype.element_ty))
    (
        low_height,
        low_width,
        window_height,
        window_width,
        area_top,
        area_left,
        area_height,
        area_width,
        flipped,
        legacy,
    ) = _geometry(row)
    windows = tl.load(row + 11).to(tl.int32)
    origins = table + tl.load(row + 12)
    plane = low_height.to(tl.int64) * low_width  # [N, C, h, w] can have more elements than 32 bits count
    in_channels = (channel < channels)[:, None]
    m0, m1, n0, n1, w_m0, w_m1, w_n0, w_n1 = _places(
        y, x, area_top, area_left, area_height, area_width, height, width, flipped
    )
    first_m, last_m = tl.min(m0, 0), tl.max(m1, 0)
    first_n, last_n = tl.min(n0, 0), tl.max(n1, 0)
    a = tl.zeros((BLOCK, PIXELS), tl.float32)
    over_a = tl.zeros((PIXELS,), tl.float32)
    if TWO_STEPS:
        b, c, d = a, a, a
        over_b, over_c, over_d = over_a, over_a, over_a
    for window in range(windows):
        top = tl.load(origins + 2 * window).to(tl.int32)
        left = tl.load(origins + 2 * window + 1).to(tl.int32)
        needed = (last_m >= top) & (first_m < top + window_height) & (last_n >= left) & (first_n < left + window_width)
        if needed:
            planes = pointer + (channel.to(tl.int64) + window * channels)[:, None] * plane
            value, inside = _window(
                planes, m0 - top, n0 - left, low_height, low_width, window_height, window_width, legacy, in_channels
            )
            a += value
            over_a += inside.to(tl.float32)
            if TWO_STEPS:
                value, inside = _window(
                    planes, m0 - top, n1 - left, low_height, low_width, window_height, window_width, legacy, in_channels
                )
                b += value
                over_b += inside.to(tl.float32)
                value, inside = _window(
                    planes, m1 - top, n0 - left, low_height, low_width, window_height, window_width, legacy, in_channels
                )
                c += value
                over_c += inside.to(tl.float32)
                value, inside = _window(
                    planes, m1 - top, n1 - left, low_height, low_width, window_height, window_width, legacy, in_channels
                )
                d += value
                over_d += inside.to(tl.float32)
    if windows > 1:
        a = tl.div_rn(a, tl.broadcast_to(over_a[None, :], a.shape))
        if TWO_STEPS:
            b = tl.div_rn(b, tl.broadcast_to(over_b[None, :], b.shape))
            c = tl.div_rn(c, tl.broadcast_to(over_c[None, :], c.shape))
            d = tl.div_rn(d, tl.broadcast_to(over_d[None, :], d.shape))
    if TWO_STEPS:  # noqa: SIM102  (decided when it is compiled, and the other when it runs)
        if (area_height != height) | (area_width != width):
            upper = _mix(a, b, w_n0[None, :], w_n1[None, :])
            lower = _mix(c, d, w_n0[None, :], w_n1[None, :])
            a = _mix(upper, lower, w_m0[None, :], w_m1[None, :])
    return a


@triton.jit
def _whole(
    planes, m0, m1, n0, n1, w_m0, w_m1, w_n0, w_n1, low_height, low_width, height, width, legacy, in_channels,
    TWO_STEPS: tl.constexpr,
):  # fmt: skip
    """Return float32 [B, P] of a view of one window that is the canvas; see `_view`."""
    a, _ = _window(planes, m0, n0, low_height, low_width, height, width, legacy, in_channels)
    if TWO_STEPS:
        b, _ = _window(planes, m0, n1, low_height, low_width, height, width, legacy, in_channels)
        c, _ = _window(planes, m1, n0, low_height, low_width, height, width, legacy, in_channels)
        d, _ = _window(planes, m1, n1, low_height, low_width, height, width, legacy, in_channels)
        upper = _mix(a, b, w_n0[None, :], w_n1[None, :])
        lower = _mix(c, d, w_n0[None, :], w_n1[None, :])
        a = _mix(upper, lower, w_m0[None, :], w_m1[None, :])
    return a


@triton.jit
def _exp(value, CUDA: tl.constexpr):
    """What torch's softmax calls on CUDA; Triton's own is an approximation, and all that its interpreter has."""
    if CUDA:
        return libdevice.exp(value)
    return tl.exp(value)


@triton.jit
def _tile(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return rows and columns int32 [ROWS * COLUMNS] of this program's pixels."""
    pixel = tl.arange(0, ROWS * COLUMNS)
    return tl.program_id(0) * ROWS + pixel // COLUMNS, tl.program_id(1) * COLUMNS + pixel % COLUMNS


@triton.jit(do_not_specialize=["channels", "height", "width"], do_not_specialize_on_alignment=["first"])
def view_norms(
    table, first, norms, channels, height, width,
    TWO_STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CUDA: tl.constexpr,
):  # fmt: skip
    """Fill norms float32 [V, 2, H, W]: each view's largest score, and the sum of exp(score - largest), in order."""
    y, x = _tile(ROWS, COLUMNS)
    view = tl.program_id(2)
    at = (view * 2 * height + y).to(tl.int64) * width + x
    mask = (y < height) & (x < width)
    y, x = tl.minimum(y, height - 1), tl.minimum(x, width - 1)
    one = tl.arange(0, 1)
    largest = tl.full((1, ROWS * COLUMNS), float("-inf"), tl.float32)
    for number in range(channels):
        value = _view(table, view, first, one + number, channels, y, x, height, width, TWO_STEPS, 1, ROWS * COLUMNS)
        largest = tl.where((value > largest) | (value != value), value, largest)  # noqa: PLR0124  (NaN stays)
    total = tl.zeros((1, ROWS * COLUMNS), tl.float32)
    for number in range(channels):
        value = _view(table, view, first, one + number, channels, y, x, height, width, TWO_STEPS, 1, ROWS * COLUMNS)
        total += _exp(value - largest, CUDA)
    tl.store(norms + at[None, :], largest, mask=mask[None, :])
    tl.store(norms + (at + tl.cast(height, tl.int64) * width)[None, :], total, mask=mask[None, :])


@triton.jit
def _best(total, channel):
    """Return the value [P] and channel that argmax takes of [B, P]: NaN before all, the first of equal ones."""
    nan = total != total  # noqa: PLR0124
    key = tl.where(nan, float("inf"), total)
    top = tl.max(key, 0)
    any_nan = tl.max(nan.to(tl.int32), 0) != 0
    taken = (key == top[None, :]) & (nan | (any_nan[None, :] == 0))
    index = tl.min(tl.where(taken, tl.broadcast_to(channel[:, None], total.shape), 2147483647), 0)
    return tl.where(any_nan, float("nan"), top), index


@triton.jit(
    do_not_specialize=["views", "channels", "height", "width"], do_not_specialize_on_alignment=["first", "norms"]
)
def label_tile(
    table, first, norms, labels, views, channels, height, width, inverse,
    TWO_STEPS: tl.constexpr, PROBABILITIES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CUDA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Label one tile: average the views (their softmax, given `norms`) and take the best channel, a block at a time.

    `WHOLE` says that there is one view of one window that is the canvas: its indices and weights are computed once and
    not for each block.
    """
    PIXELS: tl.constexpr = ROWS * COLUMNS
    row, column = _tile(ROWS, COLUMNS)
    mask = (row < height) & (column < width)
    at = row.to(tl.int64) * width + column
    y, x = tl.minimum(row, height - 1), tl.minimum(column, width - 1)
    best = tl.full((PIXELS,), float("-inf"), tl.float32)
    label = tl.zeros((PIXELS,), tl.int32)
    block = tl.arange(0, BLOCK)
    if WHOLE:
        pointer = tl.load(table).to(tl.pointer_type(first.dtype.element_ty))
        low_height, low_width, window_height, window_width, top, left, area_height, area_width, flipped, legacy = (
            _geometry(table)
        )
        plane = low_height.to(tl.int64) * low_width
        m0, m1, n0, n1, w_m0, w_m1, w_n0, w_n1 = _places(
            y, x, top, left, area_height, area_width, height, width, flipped
        )
    for start in range(0, channels, BLOCK):
        channel = start + block
        total = tl.zeros((BLOCK, PIXELS), tl.float32)
        if WHOLE:
            total = _whole(
                pointer + channel.to(tl.int64)[:, None] * plane, m0, m1, n0, n1, w_m0, w_m1, w_n0, w_n1, low_height,
                low_width, window_height, window_width, legacy, (channel < channels)[:, None], TWO_STEPS,
            )  # fmt: skip
        for view in range(0 if WHOLE else views):
            value = _view(table, view, first, channel, channels, y, x, height, width, TWO_STEPS, BLOCK, PIXELS)
            if PROBABILITIES:
                norm = norms + tl.cast(height, tl.int64) * width * (2 * view) + at
                largest = tl.load(norm, mask=mask, other=0.0)[None, :]
                share = tl.load(norm + tl.cast(height, tl.int64) * width, mask=mask, other=1.0)[None, :]
                value = tl.div_rn(_exp(value - largest, CUDA), tl.broadcast_to(share, value.shape))
            total += value
        if not WHOLE and views > 1:
            if CUDA:  # torch divides by a number of the host by multiplying by its inverse there, and only there
                total *= inverse
            else:
                total = tl.div_rn(total, tl.zeros_like(total) + views)
        total = tl.where((channel < channels)[:, None], total, float("-inf"))
        value, index = _best(total, channel)
        better = (value > best) | ((value != value) & (best == best))  # noqa: PLR0124
        best = tl.where(better, value, best)
        label = tl.where(better, index, label)
    tl.store(labels + at, label.to(labels.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "queries", "low_height", "low_width", "canvas_height", "canvas_width", "top", "left", "area_height",
        "area_width", "height", "width",
    ],
    do_not_specialize_on_alignment=["masks"],
)  # fmt: skip
def mask_tile(
    masks, out, queries, low_height, low_width, canvas_height, canvas_width, top, left, area_height, area_width,
    height, width, TWO_STEPS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CUDA: tl.constexpr,
):  # fmt: skip
    """Fill one tile of out [Q, H, W] with the sigmoid of masks [Q, h, w], upsampled to the canvas and then to (H, W).

    Each step rounds to the masks' dtype, as torch's kernels do.
    """
    PIXELS: tl.constexpr = ROWS * COLUMNS
    ROUNDED: tl.constexpr = masks.dtype.element_ty
    row, column = _tile(ROWS, COLUMNS)
    mask = (row < height) & (column < width)
    at = row.to(tl.int64) * width + column
    y, x = tl.minimum(row, height - 1), tl.minimum(column, width - 1)
    block = tl.arange(0, BLOCK)
    plane = tl.cast(low_height, tl.int64) * low_width
    pixels = tl.cast(height, tl.int64) * width
    if TWO_STEPS:
        m0, m1, n0, n1, w_m0, w_m1, w_n0, w_n1 = _places(y, x, top, left, area_height, area_width, height, width, False)
    else:
        m0, n0 = y + top, x + left
    for start in range(0, queries, BLOCK):
        query = (start + block)[:, None]
        of_queries = query < queries
        planes = masks + query.to(tl.int64) * plane
        value, _ = _window(planes, m0, n0, low_height, low_width, canvas_height, canvas_width, False, of_queries)
        value = value.to(ROUNDED).to(tl.float32)
        if TWO_STEPS:
            b, _ = _window(planes, m0, n1, low_height, low_width, canvas_height, canvas_width, False, of_queries)
            c, _ = _window(planes, m1, n0, low_height, low_width, canvas_height, canvas_width, False, of_queries)
            d, _ = _window(planes, m1, n1, low_height, low_width, canvas_height, canvas_width, False, of_queries)
            b, c, d = b.to(ROUNDED).to(tl.float32), c.to(ROUNDED).to(tl.float32), d.to(ROUNDED).to(tl.float32)
            upper = _mix(value, b, w_n0[None, :], w_n1[None, :])
            lower = _mix(c, d, w_n0[None, :], w_n1[None, :])
            value = _mix(upper, lower, w_m0[None, :], w_m1[None, :]).to(ROUNDED).to(tl.float32)
        one = tl.zeros((BLOCK, PIXELS), tl.float32) + 1.0
        share = tl.div_rn(one, one + _exp(-value, CUDA)).to(ROUNDED)
        tl.store(out + query.to(tl.int64) * pixels + at[None, :], share.to(out.dtype.element_ty),
                 mask=of_queries & mask[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["pixels", "classes"])
def count_tile(labels, target, counts, pixels, classes, SIZE: tl.constexpr):
    """Add a run of pixels to counts int64 [C, C + 1]; the two commonest pairs, as a rule, by one addition each.

    Neighbours have equal pairs of ground truth and label more often than not, and additions to one address wait for
    each other.
    """
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < pixels
    truth = tl.load(target + at, mask=mask, other=255).to(tl.int32)
    label = tl.minimum(tl.load(labels + at, mask=mask, other=0).to(tl.int32), classes)
    key = tl.where(truth < classes, truth * (classes + 1) + label, -1)
    for _ in tl.static_range(2):
        common = tl.max(key, 0)
        same = key == common
        tl.atomic_add(counts + tl.maximum(common, 0), tl.sum(same.to(tl.int64), 0), mask=common >= 0, sem="relaxed")
        key = tl.where(same, -1, key)
    tl.atomic_add(counts + tl.maximum(key, 0), tl.full((SIZE,), 1, tl.int64), mask=key >= 0, sem="relaxed")


@triton.jit(
    do_not_specialize=[
        "canvas_height", "canvas_width", "top", "left", "height", "width", "reverse", "flipped", "padded", "scale",
        "pad",
    ]
)  # fmt: skip
def normalise_tile(
    pixels, canvas, means, canvas_height, canvas_width, top, left, height, width, reverse, flipped, padded, scale, pad,
    CUDA: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Fill one run of pixels of canvas float32 [3, H, W] from pixels uint8 [h, w, 3]; means float32 [2, 3].

    What differs between models and views is a number: a kernel for each would be compiled in the middle of a run.
    """
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = at < canvas_height * canvas_width
    y, x = at // canvas_width - top, at % canvas_width - left
    inside = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    x = tl.where(flipped != 0, width - 1 - x, x)
    for plane in tl.static_range(3):
        source = plane + reverse * (2 - 2 * plane)
        value = tl.load(pixels + (y * width + x) * 3 + source, mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value, pad)
        value = value * scale if CUDA else tl.div_rn(value, tl.zeros_like(value) + scale)  # by 1 it stays
        mean, std = tl.load(means + plane), tl.load(means + 3 + plane)
        value = tl.div_rn(value - mean, tl.zeros_like(value) + std)
        value = tl.where(inside | (padded != 0), value, 0.0)
        tl.store(canvas + plane * canvas_height * canvas_width + at, value, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["first"])
def count_invalid(table, first, total, SIZE: tl.constexpr):
    """Add how many values are NaN or +inf to `total` int64 [1]; table: (pointer, number of values) of each tensor."""
    tensor = tl.program_id(1)
    pointer = tl.load(table + 2 * tensor).to(tl.pointer_type(first.dtype.element_ty))
    values = tl.load(table + 2 * tensor + 1)
    found = tl.zeros((SIZE,), tl.int64)
    for start in range(tl.program_id(0).to(tl.int64) * SIZE, values, tl.num_programs(0) * SIZE):
        at = start + tl.arange(0, SIZE)
        value = tl.load(pointer + at, mask=at < values, other=0.0)
        found += ((value != value) | (value == float("inf"))).to(tl.int64)  # noqa: PLR0124
    invalid = tl.sum(found, 0)
    tl.atomic_add(total, invalid, mask=invalid > 0, sem="relaxed")
