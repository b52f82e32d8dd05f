"""The story: build, evaluate, check, record, report.

    evaluate = map(image -> integer confusion counts) + sum

Every rank runs this function. Ranks share nothing while they work but a counter; each writes its images' counts
to its own ledger files. At the end the ranks' matrices are summed once, and rank 0 compares the sum with the
ledger on disk, image by image, before it says any number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from ade_harness.build import build_dataset, build_predictor, describe_facts, describe_marks
from ade_harness.counting import Failure, ImageCounter, ImageItems, check_unchanged, group_images, sum_stages
from ade_harness.errors import HarnessError
from ade_harness.metrics.confusion import scores
from ade_harness.metrics.diagnosis import diagnose
from ade_harness.report.result import Published, Result, write_result
from ade_harness.runs.directory import LEDGER
from ade_harness.runs.exactness import check_exact
from ade_harness.runs.ledger import LedgerWriter, matrix_of, read_rows
from ade_harness.runs.record import RunRecord, start_record
from ade_harness.runtime.coordination import Coordinator, all_reduce_sum, broadcast, gather
from ade_harness.runtime.progress import reporter_for
from ade_harness.runtime.trainer import WorkItems, WorkLoop, is_main_process, started_ranks


def evaluate(
    cfg: DictConfig, console: Console, on_run_dir: Callable[[Path], None] = lambda _: None
) -> tuple[Result, RunRecord] | None:
    """Evaluate one model on one data set.

    Args:
        cfg: a configuration from :func:`ade_harness.config.compose_config`.
        console: for progress.
        on_run_dir: told the run directory as soon as it is there.

    Returns:
        The result and its record on rank 0, None on the other ranks.

    Raises:
        HarnessError: nothing was scored; what was counted is in the ledger, and the message says how to go on.
    """
    start = time.monotonic()
    seed_everything(cfg.runtime.seed, verbose=False)
    dataset = build_dataset(cfg.dataset, cfg.inference.exif)
    sizes: list[tuple[int, int]] = []
    if is_main_process():  # one rank looks at the files for all
        sizes = dataset.check_headers() if cfg.dataset.check_headers else dataset.sizes()
    predictor, model = build_predictor(cfg, dataset, sizes)
    marks = describe_marks(cfg, dataset, model, sizes)

    with started_ranks(cfg.runtime) as trainer:
        record = None
        if trainer.is_global_zero:
            config: Any = OmegaConf.to_container(cfg, resolve=True)
            seeds = {"runtime.seed": cfg.runtime.seed, "model.seed": cfg.model.seed}
            record = start_record(
                config, describe_facts(dataset, model, cfg, trainer.strategy.root_device.type), marks, seeds
            )
            for line in (*marks, f"run directory: {record.path}"):
                console.print(line, markup=False, highlight=False, soft_wrap=True)
        run_dir: Path
        run_dir, sizes, marks = broadcast((record.path if record else None, sizes, marks))
        on_run_dir(run_dir)

        before, damaged = read_rows(run_dir / LEDGER) if record else ([], [])
        if before or damaged:
            check_unchanged(before, dataset, predictor)
            console.print(f"continuing: {len(before)} images are done, {len(damaged)} ledger files are damaged")
        done: set[str] = broadcast({row.image_id for row in before})  # one rank reads: others may write soon
        groups = group_images(sizes, predictor, cfg.inference.images)  # of all images: batches never depend on the past
        todo = [group for group in groups if not done.issuperset(dataset.ids[i] for i in group)]

        coordinator = Coordinator()
        drawn = np.linspace(0, len(dataset.ids) - 1, min(cfg.run.overlays, len(dataset.ids))).astype(int)
        items = ImageItems(dataset, todo, predictor, {dataset.ids[i] for i in drawn})
        writer, overlays, choice = LedgerWriter(run_dir / LEDGER, marks), run_dir / "overlays", cfg.runtime.kernels
        counter = ImageCounter(predictor, writer, coordinator, overlays, marks, choice, done)
        costs = [sum(predictor.cost(sizes[i]) for i in group) for group in todo]
        work = WorkItems(items, costs, cfg.runtime.workers, coordinator)
        reporter = reporter_for(trainer.global_rank, console, len(dataset.ids), len(done))
        loop = WorkLoop(counter.process, model.module if model else None, coordinator, reporter)
        begin = time.monotonic()
        try:
            if todo:
                trainer.test(loop, work, verbose=False)
        finally:
            try:
                counter.close(trainer.global_rank)  # also after Ctrl-C: what was counted stays counted
            finally:
                loop.close(len(dataset.ids) - len(done))
        failures: list[Failure] = sum(gather(counter.failures), [])
        total = all_reduce_sum(counter.matrix, trainer.strategy.root_device) + matrix_of(before)
        rate = (len(dataset.ids) - len(done)) / (time.monotonic() - begin)
        stages = sum_stages(gather(counter.stages))
        world_size = trainer.world_size

    if record is None:
        return None
    rows, _ = read_rows(run_dir / LEDGER)
    if failures:
        raise HarnessError(_failure_message(failures, len(rows), len(dataset.ids), run_dir))
    check_exact(rows, total, dataset.ids)
    advice = None if model is not None and model.weights == "random" else diagnose(total)
    published = cfg.model.published
    result = Result(
        run_dir=run_dir,
        label=cfg.model.label or cfg.model.name,
        dataset=dataset.name,
        matrix=total,
        scores=scores(total),
        images=len(rows),
        expected_images=dataset.expected_images,
        marks=tuple(marks),
        notes=(*predictor.notes(), *([advice] if advice else [])),
        published=None
        if published.mIoU is None or dataset.is_demo
        else Published(published.mIoU, published.protocol, published.source),
        seconds=time.monotonic() - start,
        images_per_second=rate,
        world_size=world_size,
        stages=stages,
    )
    write_result(result)
    record.finish(rows, result.seconds, rate, world_size, stages)
    return result, record


def _failure_message(failures: Sequence[Failure], counted: int, images: int, run_dir: Path) -> str:
    unique = {f.message: f for f in failures}
    shown = [m if f.image_id in m else f"{f.image_id}: {m}" for m, f in list(unique.items())[:5]]
    more = f"\n... and {len(unique) - 5} more" if len(unique) > 5 else ""
    return (
        "\n".join(shown)
        + more
        + f"\nNo score: {counted} of {images} images are counted. They are kept: after mending this, the same command"
        f" with run.dir={run_dir} does the rest."
    )
