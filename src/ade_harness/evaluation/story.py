"""The story: build, evaluate, check, record, report.

    evaluate = map(image -> integer confusion counts) + sum

Every rank runs this function. Ranks share nothing while they work but a queue and a few counters; each writes its
images' counts to its own ledger files. At the end the ranks' matrices are summed once, and rank 0 compares the sum
with the ledger on disk, image by image, before it says any number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from lightning.pytorch import seed_everything
from rich.console import Console

from ade_harness.config.schema import Config
from ade_harness.errors import HarnessError
from ade_harness.evaluation.data import EvaluationData, Failure, ImageItems, group_images
from ade_harness.evaluation.job import Job, build_job, open_run, skipped_marks
from ade_harness.evaluation.module import EvaluationModule, counted_before, sum_stages
from ade_harness.metrics.counts import matrix_of
from ade_harness.metrics.diagnosis import diagnose
from ade_harness.runs.directory import LEDGER, wait_to_see
from ade_harness.runs.exactness import check_exact, check_rows, incomplete
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerWriter, read_rows
from ade_harness.runs.live import LiveStatus
from ade_harness.runs.record import RunRecord
from ade_harness.runs.result import Result, summarise, write_result
from ade_harness.runtime.balance import RankShare, measure_balance
from ade_harness.runtime.coordination import agreed, all_reduce_sum, broadcast, gather
from ade_harness.runtime.progress import reporter_for
from ade_harness.runtime.ranks import RankCallback, Ranks, started_ranks


def evaluate(
    cfg: Config, console: Console, on_run_dir: Callable[[Path], None] = lambda _: None
) -> tuple[Result, RunRecord] | None:
    """Evaluate one model on one data set.

    Args:
        cfg: a configuration from :func:`ade_harness.config.compose.compose_config`.
        console: for progress.
        on_run_dir: told the run directory as soon as it is there.

    Returns:
        The result and its record on rank 0, None on the other ranks.

    Raises:
        HarnessError: nothing was scored; what was counted is in the ledger, and the message says how to go on.
        StopRequestedError, RankLostError: the same, after a signal or the death of another rank.
    """
    start = time.monotonic()
    seed_everything(cfg.runtime.seed, verbose=False)
    with started_ranks(cfg.runtime) as ranks:
        job = build_job(cfg, ranks.coordinator)
        record = agreed(ranks.coordinator, "record", lambda: open_run(cfg, job, ranks, console))
        try:
            return _evaluate(cfg, console, on_run_dir, start, ranks, job, record)
        finally:
            if record is not None:
                record.lock.release()


def _evaluate(
    cfg: Config,
    console: Console,
    on_run_dir: Callable[[Path], None],
    start: float,
    ranks: Ranks,
    job: Job,
    record: RunRecord | None,
) -> tuple[Result, RunRecord] | None:
    dataset, predictor, coordinator = job.dataset, job.predictor, ranks.coordinator
    run_dir: Path
    run_dir, marks = broadcast((record.path, record.manifest["marks"]) if record else None)
    on_run_dir(run_dir)
    ranks.watchdog.note(run=str(run_dir))
    ledger = run_dir / LEDGER
    agreed(coordinator, "seen", lambda: wait_to_see(run_dir))
    live = LiveStatus.of(record, len(dataset.ids), console, coordinator) if record else None
    ranks.watchdog.on_beats = live.on_beats if live else None
    before = (
        agreed(coordinator, "past", lambda: record and counted_before(ledger, dataset, predictor, console.print)) or []
    )
    done: set[str] = broadcast({row.image_id for row in before})  # one rank reads: others may write soon

    sizes = [job.sizes[i] for i in dataset.ids]
    groups = group_images(sizes, predictor, cfg.inference.images)  # of all images: batches never depend on the past
    todo = [group for group in groups if not done.issuperset(dataset.ids[i] for i in group)]
    drawn = np.linspace(0, len(dataset.ids) - 1, min(cfg.run.overlays, len(dataset.ids))).astype(int)
    items = ImageItems(dataset, todo, predictor, {dataset.ids[i] for i in drawn})
    costs = [sum(predictor.cost(sizes[i]) for i in group) for group in todo]
    names = [", ".join(dataset.ids[i] for i in group) for group in todo]

    skip, maps = cfg.run.on_error == "skip", LabelMaps(run_dir, cfg.run.label_maps)
    writer = LedgerWriter(ledger, marks)
    network = job.model.module if job.model else None
    module = EvaluationModule(
        predictor, writer, coordinator, run_dir, maps, marks, cfg.runtime.kernels, skip, done, network
    )
    data = EvaluationData(items, costs, cfg.runtime.sharding, job.loaders, coordinator)
    reporter = reporter_for(coordinator.rank, console, len(dataset.ids), len(done))
    callback = RankCallback(ranks, costs, names, data.sampler, reporter)
    ranks.trainer.callbacks.append(callback)
    ranks.watchdog.on_loss = writer.flush
    begin = time.monotonic()
    if live is not None:
        live.begin(len(done))
    try:
        try:
            if todo:
                ranks.trainer.test(module, datamodule=data, verbose=False)
        finally:
            module.close(coordinator.rank)  # also after Ctrl-C: what was counted stays counted
        share = RankShare.of(ranks.watchdog.beat, time.monotonic() - begin)
        callback.wait_for_all()
    finally:
        callback.close()
    seconds, stopped = time.monotonic() - begin, coordinator.stopped
    failures: list[Failure] = sum(gather(module.failures), [])
    total = all_reduce_sum(module.matrix, ranks.trainer.strategy.root_device) + matrix_of(before)
    stages, balance = sum_stages(gather(module.stages)), measure_balance(gather(share))
    ranks.part()
    if record is None or live is None:
        return None

    live.close()
    rows, _ = read_rows(ledger)
    lost = job.skipped | {f.image_id: f.message for f in failures}
    if failures and (not skip or not rows or stopped):
        record.leave("incomplete", lost)
        raise HarnessError(incomplete(lost, len(rows), len(dataset.ids), run_dir))
    check_rows(rows, job.sizes)
    check_exact(rows, total, [i for i in dataset.ids if i not in lost])
    if lost:
        marks = skipped_marks(marks, len(rows), dataset.expected_images, len(lost))
    advice = None if job.model is not None and job.model.weights == "random" else diagnose(total)
    result = summarise(
        cfg, run_dir, dataset, rows, total, marks, job.protocol_changes,
        notes=(*predictor.notes(), *job.notes, *live.warnings.values(), *([advice] if advice else [])),
        seconds=time.monotonic() - start,
        images_per_second=(len(dataset.ids) - len(done)) / seconds,
        balance=balance,
        stages=stages,
    )  # fmt: skip
    write_result(result)
    record.finish(rows, result.timings(), marks, lost)
    return result, record
