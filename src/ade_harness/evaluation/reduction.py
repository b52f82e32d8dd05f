"""The sum of "map, then sum": what all ranks have counted, lost and remarked is brought together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ade_harness.evaluation.data import Failure
from ade_harness.evaluation.job import Job
from ade_harness.evaluation.module import EvaluationModule
from ade_harness.inference.memory import gpu_shortages, shortage_note
from ade_harness.metrics.confusion import Matrix
from ade_harness.metrics.counts import Row, matrix_of
from ade_harness.runtime.balance import Balance, RankShare, measure_balance
from ade_harness.runtime.coordination import all_reduce_sum, gather
from ade_harness.runtime.ranks import Ranks


@dataclass(frozen=True)
class Work:
    """What all ranks together have done."""

    matrix: Matrix
    """Their sum, with what was counted before."""
    failures: Sequence[Failure]
    stopped: bool
    """Whether a rank ended the work before its end."""
    notes: Sequence[str]
    """What the predictors of all ranks remark: one may have run short of memory where the others did not."""
    start: float
    """``time.monotonic()`` when the command began."""
    images_per_second: float
    balance: Balance
    stages: Mapping[str, float]
    gpu_peak: int | None = None
    """Bytes of GPU memory that torch held at once, on the rank that needed most."""
    changes: Sequence[str] = ()
    """How the model differed from the one that an earlier session counted with (``run.allow_changed``)."""
    warnings: Sequence[str] = ()
    """About ranks that were slow."""


def sum_stages(of_ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Add up the seconds that ranks spent in each stage."""
    names = dict.fromkeys(name for stages in of_ranks for name in stages)
    return {name: sum(stages.get(name, 0.0) for stages in of_ranks) for name in names}


def reduce_work(
    ranks: Ranks, job: Job, module: EvaluationModule, before: Sequence[Row], share: RankShare, begin: float,
    start: float,
) -> Work:  # fmt: skip
    """Bring together what the ranks have done; every rank calls it once, and rank 0 gets the whole.

    Args:
        ranks: still connected.
        job: what is evaluated.
        module: of this rank, closed.
        before: rows that an earlier session counted, on rank 0; none elsewhere.
        share: what this rank has done.
        begin: ``time.monotonic()`` when the work began.
        start: ``time.monotonic()`` when the command began.
    """
    rate, stopped = (len(job.dataset.ids) - len(before)) / (time.monotonic() - begin), ranks.coordinator.stopped
    counted = module.recorder.matrix
    total = all_reduce_sum(counted) + matrix_of(before, len(counted))
    failures: list[Failure] = sum(gather(module.failures), [])
    on_gpu = torch.cuda.is_available() and ranks.trainer.strategy.root_device.type == "cuda"
    changes = _once([*module.changes, *([] if stopped else job.predictor.changes())])
    notes = _once([*job.predictor.notes(), *module.remarks, *module.recorder.remarks])
    return Work(
        total, failures, stopped,
        notes=(*notes, *shortage_note(sum(gather(gpu_shortages() if on_gpu else 0)))),
        start=start,
        images_per_second=rate,
        balance=measure_balance(gather(share)),
        stages=sum_stages(gather(module.stages)),
        gpu_peak=max(gather(torch.cuda.max_memory_allocated() if on_gpu else 0)) or None,
        changes=changes,
    )  # fmt: skip


def _once(remarks: list[str]) -> tuple[str, ...]:
    """Return what all ranks remark, each remark once."""
    return tuple(dict.fromkeys(sum(gather(remarks), [])))
