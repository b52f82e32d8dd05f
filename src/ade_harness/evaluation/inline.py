"""Evaluate inside somebody else's process: no ranks, signals, seeds or run directory of its own.

The same parts as :mod:`ade_harness.evaluation.story` (data set, predictor, kernels, rows, end checks) without what a
process that is the caller's does not want: loader processes (threads prepare images here: decoding and resizing leave
Python's lock), a supervisor, a ledger on disk. Images that are lost with the process are the price.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ade_harness import kernels
from ade_harness.config.composed import Composed
from ade_harness.config.schema import Config
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.data.factory import open_dataset
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError, ShortMemoryError
from ade_harness.evaluation.data import Failure, ImageItems, LoadedImage, group_images
from ade_harness.evaluation.job import describe_marks
from ade_harness.evaluation.launching import Launched, launch, refuse_invalid
from ade_harness.evaluation.recorder import row_of
from ade_harness.evaluation.score import advice, describe_costs, require_labelled
from ade_harness.inference.predictor import Predictor
from ade_harness.metrics.confusion import Matrix
from ade_harness.metrics.counts import Row
from ade_harness.runs.exactness import check_exact, check_rows
from ade_harness.runs.provenance import code_state
from ade_harness.runs.result import Result, summarise
from ade_harness.runtime.balance import Balance, RankShare
from ade_harness.runtime.cluster import host_name
from ade_harness.runtime.gpu_errors import is_out_of_memory

_AHEAD = 2
"""Batches that each thread prepares ahead."""


@dataclass(frozen=True)
class Opened:
    """A data set and a predictor that fit each other; equal in every process that opens them."""

    dataset: SegmentationDataset
    sizes: dict[str, tuple[int, int]]
    predictor: Predictor
    marks: tuple[str, ...]
    """What the numbers are not."""
    groups: list[list[int]]
    """Indices of the images of each batch."""
    costs: list[float]
    """Expected, of each batch."""


@dataclass(frozen=True)
class Counted:
    """What one process has counted."""

    rows: list[Row]
    matrix: Matrix
    """Their sum, added up image by image: it is compared with the rows in the end."""
    seconds: float
    gpu_peak: int | None = None
    """Bytes of GPU memory that torch held at once; None without a GPU, or where the process had held more before."""
    kernels_reason: str | None = None
    """What of the label kernels had to be left to plain torch, and why."""


def open_here(cfg: Config, open_predictor: Callable[[Classes], Predictor]) -> Opened:
    """Open the data set and the model, with every check that can be made before the first image.

    Args:
        cfg: the whole configuration.
        open_predictor: called with the data set's classes.

    Raises:
        HarnessError: a file that cannot be read, or a protocol that the model or an image does not fit.
    """
    dataset = open_dataset(cfg.dataset, cfg.inference.exif)
    sizes, wrong = dataset.read_headers(cfg.dataset.check_headers)
    if wrong:
        more = f" {len(wrong) - 1} more images fail." if len(wrong) > 1 else ""
        raise HarnessError(next(iter(wrong.values())) + more)
    predictor = open_predictor(dataset.classes)
    predictor.check(sizes)
    in_order = [sizes[image_id] for image_id in dataset.ids]
    groups = group_images(in_order, predictor, cfg.inference.images)
    costs = [sum(predictor.cost(in_order[i]) for i in group) for group in groups]
    marks = describe_marks(cfg, dataset, predictor.facts(), list(sizes.values()))
    return Opened(dataset, sizes, predictor, tuple(marks), groups, costs)


def share_of(costs: Sequence[float], rank: int, world_size: int) -> list[int]:
    """Return a rank's batches: the most expensive first, in turn, so that ranks end at about the same time."""
    order = sorted(range(len(costs)), key=lambda number: -costs[number])
    return order[rank::world_size]


def count_here(
    opened: Opened,
    numbers: Sequence[int],
    device: torch.device,
    kernels_choice: str = "auto",
    threads: int = 1,
    on_images: Callable[[int], None] = lambda _: None,
    rank: int = 0,
    keep: Callable[[Row, npt.NDArray[np.uint8], Matrix], None] = lambda *_: None,
) -> Counted:
    """Predict and count batches of images, in their order.

    Args:
        opened: data set and predictor; its network is on `device`.
        numbers: of the batches in ``opened.groups``.
        device: where the network is.
        kernels_choice: ``runtime.kernels``.
        threads: that prepare images beside the computation; 0 prepares them in between.
        on_images: called with the number of images counted so far.
        rank: that the rows name.
        keep: called with each image's row, labels uint8 [H, W] and counts int64 [C, C + 1], for a run directory.

    Raises:
        HarnessError: names the first image that cannot be read or predicted.
    """
    begin = time.perf_counter()
    held = peak_bytes(device)
    chosen, reason = kernels.selection(kernels_choice, device.type)
    classes = len(opened.dataset.classes)
    matrix, rows = np.zeros((classes, classes + 1), np.int64), []
    items = ImageItems(opened.dataset, opened.groups, opened.predictor, set())
    launched = deque[Launched]()

    def finish(batch: Launched) -> None:
        seconds = sum(batch.wait().values()) / len(batch.images)
        for image, prediction, counted, confidence in zip(
            batch.images, batch.predictions, batch.counts, batch.calibrations, strict=True
        ):
            refuse_invalid(image.image_id, prediction.invalid_share)
            counts = counted.numpy()
            rows.append(row_of(image, prediction.labels, counts, confidence.numpy(), seconds, rank))
            np.add(matrix, counts, out=matrix)
            keep(rows[-1], prediction.labels.numpy(), counts)
        on_images(len(rows))

    for batch in _prepared(items, numbers, threads, pinned=device.type == "cuda"):
        for item in batch:
            if isinstance(item, Failure):
                raise HarnessError(item.message)
        images = [item for item in batch if isinstance(item, LoadedImage)]
        for again in (False, True):
            try:
                launched.append(launch(images, opened.predictor, device, chosen, classes))
                break
            except RuntimeError as error:
                if isinstance(error, HarnessError) or not is_out_of_memory(error):
                    raise
                short = str(error).splitlines()[0]
            # outside of the except block, where the traceback would keep tensors: once more with nothing else there
            while launched:
                finish(launched.popleft())
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if again:
                raise ShortMemoryError(
                    f"{images[0].image_id}: out of memory beside the forward ({short}). Use a smaller"
                    " inference.images, or a device with more free memory."
                )
        while len(launched) > (1 if device.type == "cuda" else 0):  # a GPU works on one while another is counted
            finish(launched.popleft())
    while launched:
        finish(launched.popleft())
    peak = peak_bytes(device)
    return Counted(rows, matrix, time.perf_counter() - begin, peak if peak > held else None, reason)


def peak_bytes(device: torch.device) -> int:
    """Return the bytes that torch has held at once on a GPU so far; 0 on others.

    The caller's record is read and not begun anew (``torch.cuda.reset_peak_memory_stats``): it may be watched.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _prepared(
    items: ImageItems, numbers: Sequence[int], threads: int, pinned: bool = False
) -> Iterator[list[LoadedImage | Failure]]:
    """Yield prepared batches in order; threads work ahead, and are ended with the generator.

    Args:
        items: of the data set.
        numbers: of the batches.
        threads: how many; 0 prepares in between.
        pinned: whether pixels are to lie in pinned memory, from which a GPU copies them while the host goes on.
    """

    def prepared(number: int) -> list[LoadedImage | Failure]:
        return [i.pin_memory() if pinned and isinstance(i, LoadedImage) else i for i in items[number]]

    if threads == 0:
        for number in numbers:
            yield prepared(number)
        return
    todo, pending = iter(numbers), deque[Future[list[LoadedImage | Failure]]]()
    pool = ThreadPoolExecutor(threads, "ade_harness")
    try:
        for number in todo:
            pending.append(pool.submit(prepared, number))
            if len(pending) > _AHEAD * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def conclude(
    composed: Composed, opened: Opened, counted: Sequence[Counted], run_dir: Path = Path()
) -> tuple[Result, list[Row]]:
    """Make the result of what all processes have counted, after the end checks of every run.

    Args:
        composed: the configuration.
        opened: data set and predictor.
        counted: of each process.
        run_dir: of the result, if it has one.

    Returns:
        The result, and the rows in the order of image ids.

    Raises:
        HarnessError: images are missing or counted twice, or no pixel is labelled: there is no score.
    """
    dataset = opened.dataset
    rows = sorted((row for part in counted for row in part.rows), key=lambda row: row.image_id)
    matrix: Matrix = np.sum([part.matrix for part in counted], axis=0)
    check_rows(rows, opened.sizes)
    check_exact(rows, matrix, dataset.ids)
    require_labelled(matrix, len(rows))
    seconds = max(part.seconds for part in counted)
    peak = max((part.gpu_peak for part in counted if part.gpu_peak is not None), default=None)
    shares = [
        RankShare(rank, host_name(), len(part.rows), part.seconds, part.seconds) for rank, part in enumerate(counted)
    ]
    result = summarise(
        composed.config, run_dir, dataset, rows, matrix, opened.marks, composed.changes, opened.predictor.facts(),
        code_state()["commit"],
        notes=(
            *opened.predictor.notes(),
            *dataset.remarks,
            *dict.fromkeys(
                f"runtime.kernels={composed.config.runtime.kernels}: {part.kernels_reason}"
                for part in counted if part.kernels_reason is not None
            ),
            *advice(rows, dataset.classes, opened.predictor.facts()),
        ),
        seconds=seconds,
        images_per_second=len(rows) / seconds if seconds else 0.0,
        balance=Balance(tuple(shares)),
        stages={},
        costs=describe_costs(composed.config, opened.predictor, opened.predictor.facts(), opened.sizes, peak),
    )  # fmt: skip
    return result, rows
