"""The end of an evaluation, on rank 0: the sum is compared with the ledger, and only then becomes a score."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ade_harness.config.dataset import DatasetKind
from ade_harness.config.schema import Config, OnError
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.evaluation.job import Job, skipped_marks
from ade_harness.evaluation.reduction import Work
from ade_harness.inference.flops import flops_of_image
from ade_harness.inference.predictor import Predictor
from ade_harness.metrics.confusion import Matrix
from ade_harness.metrics.counts import Row
from ade_harness.metrics.diagnosis import diagnose
from ade_harness.runs.directory import LEDGER
from ade_harness.runs.exactness import check_exact, check_rows, incomplete
from ade_harness.runs.ledger import read_rows
from ade_harness.runs.record import RunRecord, is_mixed
from ade_harness.runs.result import Result, summarise, write_result


def describe_costs(
    cfg: Config,
    predictor: Predictor,
    facts: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    gpu_peak: int | None,
) -> dict[str, Any]:
    """Return what a network costs, for metrics.json: parameters, operations of the first image, GPU memory."""
    wanted = cfg.dataset.kind != DatasetKind.demo if cfg.metrics.flops is None else cfg.metrics.flops
    size = next(iter(sizes.values()), None) if wanted else None
    mine = bool(getattr(getattr(predictor, "model", None), "of_caller", False))
    flops = None if size is None else flops_of_image(predictor.network, cfg.inference, size, not mine)
    return {
        "parameters": facts.get("parameters"),
        "flops": flops,
        "flops_image": None if size is None or flops is None else list(size),
        "gpu_peak_bytes": gpu_peak,
    }


def require_labelled(matrix: Matrix, images: int) -> None:
    """Refuse a sum without a pixel: a mean over no class would be 0 or NaN, and neither is a score.

    Raises:
        HarnessError: none of the images has a labelled pixel.
    """
    if not matrix.any():
        raise HarnessError(
            f"No score: none of the {images} images has a labelled pixel, so there is nothing to score."
            " Are these the annotations of this data set?"
        )


def advice(rows: Sequence[Row], classes: Classes, facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what the counts suggest about labels that are shifted or ordered otherwise; a random network has none."""
    found = None if facts.get("weights") == "random" else diagnose(rows, classes)
    return () if found is None else (found,)


def score(cfg: Config, job: Job, record: RunRecord, marks: Sequence[str], work: Work) -> Result:
    """Check that every image is counted exactly once, write the result, and finish the record.

    Args:
        cfg: the whole configuration.
        job: what was evaluated.
        record: of the run.
        marks: what its numbers are not.
        work: what the ranks have done.

    Raises:
        HarnessError: images are missing or the sum is not the ledger's: there is no score, and the message names them.
    """
    dataset, skip = job.dataset, cfg.run.on_error == OnError.skip
    rows, _ = read_rows(record.path / LEDGER)
    lost = job.skipped | {f.image_id: f.message for f in work.failures}
    if work.failures and (not skip or not rows or work.stopped):
        record.leave("incomplete", lost)
        raise HarnessError(incomplete(lost, len(rows), len(dataset.ids), record.path))
    check_rows(rows, job.sizes)
    check_exact(rows, work.matrix, [i for i in dataset.ids if i not in lost])
    try:
        require_labelled(work.matrix, len(rows))
    except HarnessError:
        record.leave("incomplete", lost)
        raise
    if lost:
        marks = skipped_marks(marks, len(rows), dataset.expected_images, len(lost))
    if work.changes:
        record.add_changes(work.changes)
    mixed = [mark for mark in record.manifest["marks"] if is_mixed(mark)]
    marks = [*(mark for mark in marks if not is_mixed(mark)), *mixed]
    result = summarise(
        cfg, record.path, dataset, rows, work.matrix, marks, job.protocol_changes, job.facts,
        record.manifest["code"]["commit"],
        notes=(*work.notes, *job.notes, *work.warnings, *advice(rows, dataset.classes, job.facts)),
        seconds=time.monotonic() - work.start,
        images_per_second=work.images_per_second,
        balance=work.balance,
        stages=work.stages,
        costs=describe_costs(cfg, job.predictor, job.facts, job.sizes, work.gpu_peak),
    )  # fmt: skip
    write_result(result)
    record.finish(rows, result.timings(), marks, lost)
    return result
