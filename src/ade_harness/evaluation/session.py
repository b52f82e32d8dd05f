"""One evaluation with everything around it: tracking and the final table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ade_harness.config.composed import Composed
from ade_harness.config.schema import Config, TrackingKind
from ade_harness.errors import HarnessError
from ade_harness.evaluation.story import evaluate
from ade_harness.report.terminal import print_result
from ade_harness.runs.finished import load_run
from ade_harness.runs.result import Result
from ade_harness.runtime.console import Output, make_console, output, percent, print_fact, print_line
from ade_harness.tracking.lifecycle import tracked


def run_session(
    composed: Composed, on_run_dir: Callable[[Path], None] = lambda _: None, console: Console | None = None
) -> Result | None:
    """Evaluate, track, and print; returns the result on rank 0.

    Args:
        composed: the configuration.
        on_run_dir: called with the run directory as soon as it exists.
        console: where to print; None is stdout.

    Raises:
        HarnessError: see :func:`ade_harness.evaluation.story.evaluate`.
    """
    console = console or make_console(result=False)
    cfg = composed.config
    with tracked(cfg, console) as tracking:
        finished = evaluate(composed, console, on_run_dir, lambda record: tracking.begin(record.path, record.manifest))
        if finished is None:
            return None
        result, record = finished
        _show(cfg, console, result)
        if cfg.tracking.kind == TrackingKind.wandb:
            with warn_on_error(console, "W&B: not logged"):
                tracking.finish(result, record.manifest)
    return result


def _show(cfg: Config, console: Console, result: Result) -> None:
    with warn_on_error(console, "the result is not shown"):
        print_result(console, result)
    if output() in (Output.quiet, Output.errors):
        shown = make_console()
        print_fact(shown, "mIoU", percent(result.scores.mIoU))
        print_fact(shown, "run directory", str(result.run_dir))
    if cfg.run.report or (cfg.run.report is None and cfg.tracking.kind == TrackingKind.wandb):
        with warn_on_error(console, "no page"):
            _write_page(console, result.run_dir)


@contextmanager
def warn_on_error(console: Console, what: str) -> Iterator[None]:
    """Turn what fails into a remark: the result is on disk already, and neither it nor the exit code depend on this."""
    try:
        yield
    except Exception as error:  # whatever it is: a page's template, a full disk, a library that tracks
        if os.environ.get("ADE_HARNESS_TRACEBACK"):
            raise
        reason = str(error) if isinstance(error, HarnessError) else f"{type(error).__name__}: {error}"
        print_line(console, f"{what}: {' '.join(reason.split())[:400]}", style="yellow")


def _write_page(console: Console, run_dir: Path) -> None:
    from ade_harness.report.pages import PAGE, write_report

    write_report(console, load_run(run_dir), run_dir / PAGE, boundaries=False)
    print_fact(console, "page", str(run_dir / PAGE))
