"""The story: build, evaluate, check, record, report.

    evaluate = map(image -> integer confusion counts) + sum

Every rank runs this function. Ranks share nothing while they work but a queue and a few counters; each writes its
images' counts to its own ledger files. At the end the ranks' matrices are summed once, and rank 0 compares the sum
with the ledger on disk, image by image, before it says any number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from rich.console import Console

from ade_harness.config.composed import Composed
from ade_harness.config.schema import Config
from ade_harness.evaluation.data import Failure, make_data
from ade_harness.evaluation.job import Job, build_job, open_run
from ade_harness.evaluation.module import counted_before, make_module, sum_stages
from ade_harness.evaluation.score import Work, score
from ade_harness.inference.forward import short_memory_named
from ade_harness.inference.memory import gpu_shortages, shortage_note
from ade_harness.metrics.counts import Row, matrix_of
from ade_harness.runs.directory import wait_to_see
from ade_harness.runs.live_status import LiveStatus
from ade_harness.runs.record import RunRecord, holding_lock
from ade_harness.runs.result import Result
from ade_harness.runtime.balance import RankShare, measure_balance
from ade_harness.runtime.coordination import agreed, all_reduce_sum, broadcast, gather
from ade_harness.runtime.progress_bar import reporter_for
from ade_harness.runtime.ranks import RankCallback, Ranks, started_ranks


def evaluate(
    composed: Composed, console: Console, on_run_dir: Callable[[Path], None] = lambda _: None,
    on_record: Callable[[RunRecord], None] = lambda _: None,
) -> tuple[Result, RunRecord] | None:  # fmt: skip
    """Evaluate one model on one data set.

    Args:
        composed: the configuration: ``Composed.from_config(compose_config([...]))``.
        console: for progress.
        on_run_dir: called with the run directory as soon as it exists.
        on_record: called on rank 0 with the run's record, before the first image.

    Returns:
        The result and its record on rank 0, None on the other ranks.

    Raises:
        HarnessError: nothing was scored; what was counted is in the ledger, and the message says how to go on.
        StopRequestedError, RankLostError: the same, after a signal or the death of another rank.
    """
    start, cfg = time.monotonic(), composed.config
    seed_everything(cfg.runtime.seed, verbose=False)
    with started_ranks(cfg.runtime) as ranks:
        job = build_job(composed, ranks.coordinator, ranks.trainer.strategy.root_device.type)
        record = agreed(ranks.coordinator, "record", lambda: open_run(composed, job, ranks, console))
        with holding_lock(record):
            run_dir, marks = broadcast((record.path, record.manifest["marks"]) if record else None)
            on_run_dir(run_dir)
            if record is not None:
                on_record(record)
            ranks.watchdog.note(run=str(run_dir))
            agreed(ranks.coordinator, "seen", lambda: wait_to_see(run_dir))
            work = _work(cfg, console, ranks, job, record, run_dir, marks, start)
            return (score(cfg, job, record, marks, work), record) if record is not None else None


def _work(
    cfg: Config, console: Console, ranks: Ranks, job: Job, record: RunRecord | None, run_dir: Path,
    marks: Sequence[str], start: float,
) -> Work:  # fmt: skip
    """Evaluate what the ledger does not hold yet; return the work of all ranks."""
    coordinator, watchdog = ranks.coordinator, ranks.watchdog
    live = LiveStatus.of(record, len(job.dataset.ids), console, coordinator) if record else None
    watchdog.on_beats = live.on_beats if live else None
    # one rank reads the ledger: others may write soon
    before = agreed(coordinator, "past", lambda: counted_before(run_dir, job, console.print) if record else []) or []
    done: dict[str, Row] = broadcast({row.image_id: row for row in before})

    data = make_data(cfg, job, done, coordinator)
    module = make_module(cfg, job, done, coordinator, run_dir, marks)
    module.on_change = record.add_changes if record is not None else module.on_change
    reporter = reporter_for(coordinator.rank, console, len(job.dataset.ids), len(done))
    callback = RankCallback(ranks, data.costs, data.names, data.sampler, reporter)
    ranks.trainer.callbacks.append(callback)
    watchdog.on_loss = module.recorder.writer.flush
    begin = live.begin(len(done)) if live is not None else time.monotonic()
    with closing(callback):
        try:
            if data.costs:
                if module.network is None:  # before there are loaders, which ask servers too
                    module.compare_with_before(data.control, torch.device("cpu"))
                with short_memory_named("the network is brought to its GPU, or an image is evaluated"):
                    ranks.trainer.test(module, datamodule=data, verbose=False)
        finally:
            module.close(coordinator.rank)  # also after Ctrl-C: what was counted stays counted
        share = RankShare.of(watchdog.beat, time.monotonic() - begin)
        callback.wait_for_all()
    rate, stopped = (len(job.dataset.ids) - len(done)) / (time.monotonic() - begin), coordinator.stopped
    failures: list[Failure] = sum(gather(module.failures), [])
    counted = module.recorder.matrix
    total = all_reduce_sum(counted) + matrix_of(before, len(counted))
    changes = tuple(dict.fromkeys(sum(gather([*module.changes, *([] if stopped else job.predictor.changes())]), [])))
    notes = tuple(dict.fromkeys(sum(gather([*job.predictor.notes(), *module.remarks, *module.recorder.remarks]), [])))
    stages, balance = sum_stages(gather(module.stages)), measure_balance(gather(share))
    on_gpu = torch.cuda.is_available() and ranks.trainer.strategy.root_device.type == "cuda"
    notes += shortage_note(sum(gather(gpu_shortages() if on_gpu else 0)))
    peak = max(gather(torch.cuda.max_memory_allocated() if on_gpu else 0)) or None
    ranks.part()
    warnings = live.close() if live else ()
    return Work(total, failures, stopped, warnings, notes, start, rate, balance, stages, peak, changes)
