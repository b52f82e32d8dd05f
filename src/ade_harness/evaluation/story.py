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
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import seed_everything
from rich.console import Console

from ade_harness.config.composed import Composed
from ade_harness.config.schema import Config
from ade_harness.evaluation.data import make_data
from ade_harness.evaluation.job import Job, build_job, open_run
from ade_harness.evaluation.module import counted_before, make_module
from ade_harness.evaluation.reduction import Work, reduce_work
from ade_harness.evaluation.score import score
from ade_harness.inference.forward import short_memory_named
from ade_harness.metrics.counts import Row
from ade_harness.runs.directory import wait_to_see
from ade_harness.runs.live_status import LiveStatus
from ade_harness.runs.record import RunRecord, holding_lock
from ade_harness.runs.result import Result
from ade_harness.runtime.balance import RankShare
from ade_harness.runtime.coordination import agreed, broadcast
from ade_harness.runtime.progress_bar import reporter_for
from ade_harness.runtime.ranks import RankCallback, Ranks, started_ranks


def evaluate(
    composed: Composed, console: Console, on_run_dir: Callable[[Path], None] = lambda _: None,
    on_record: Callable[[RunRecord], None] = lambda _: None,
) -> tuple[Result, RunRecord] | None:  # fmt: skip
    """Evaluate one model on one data set; return the result and its record on rank 0, None on the other ranks.

    Args:
        composed: the configuration: ``Composed.from_config(compose_config([...]))``.
        console: for progress.
        on_run_dir: called with the run directory as soon as it exists.
        on_record: called on rank 0 with the run's record, before the first image.

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
    watchdog.note(run=str(run_dir))
    watchdog.on_beats = live.on_beats if live else None
    # one rank reads the ledger: others may write soon
    before = agreed(coordinator, "past", lambda: counted_before(run_dir, job, console.print) if record else []) or []
    done: dict[str, Row] = broadcast({row.image_id: row for row in before})
    data = make_data(cfg, job, done, coordinator)
    module = make_module(cfg, job, done, coordinator, run_dir, marks, record)
    watchdog.on_loss = module.recorder.writer.flush
    reporter = reporter_for(coordinator.rank, console, len(job.dataset.ids), len(done))
    callback = RankCallback(ranks, data.costs, data.names, data.sampler, reporter)
    ranks.trainer.callbacks.append(callback)
    begin = live.begin(len(done)) if live is not None else time.monotonic()
    with closing(callback), short_memory_named("the network is brought to its GPU, or an image is evaluated"):
        try:
            if data.costs:
                ranks.trainer.test(module, datamodule=data, verbose=False)
        finally:
            module.close(coordinator.rank)  # also after Ctrl-C: what was counted stays counted
        share = RankShare.of(watchdog.beat, time.monotonic() - begin)
        callback.wait_for_all()
    work = reduce_work(ranks, job, module, before, share, begin, start)
    ranks.part()
    return replace(work, warnings=live.close()) if live is not None else work
