"""Report a run that ended without a score to W&B: after the message, once, by the process that reports for the run."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from ade_harness.config.schema import Config, TrackingKind
from ade_harness.errors import HarnessError, text_of
from ade_harness.runtime.cluster import is_reporting_process
from ade_harness.runtime.notes import EXIT_MESSAGE, EXIT_RANK_LOST

_LOG_TAIL_BYTES = 8192


def report_failure(cfg: Config, run_dir: Path | None, why: str, say: Callable[[str], None]) -> None:
    """Log a failed run, with an alert; never raises.

    Args:
        cfg: the configuration.
        run_dir: None if there was none yet: then there is nothing to be found in W&B either.
        why: the message that the user saw; empty takes the last error in the logs of the ranks.
        say: prints a line.
    """
    if cfg.tracking.kind != TrackingKind.wandb or run_dir is None:
        return
    from ade_harness.tracking.run import log_failure

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        where = log_failure(cfg.tracking, run_dir, why or last_error(run_dir) or "no message")
    for warning in caught:
        if str(warning.message).startswith("W&B"):
            say(str(warning.message))
    if where is not None:
        say(f"W&B: marked as failed: {where}")


def run_and_report(cfg: Config, runs: list[Path], work: Callable[[], int], say: Callable[[str], None]) -> int:
    """Do a rank's work; if it fails, report why, to tracking too, unless a supervisor or rank 0 does that.

    Args:
        cfg: the configuration.
        runs: where `work` adds its run directory.
        work: returns an exit code.
        say: prints a line.

    Raises:
        HarnessError: only with ADE_HARNESS_TRACEBACK.
    """
    if not is_reporting_process():
        return work()
    known = len(runs)

    def run_dir() -> Path | None:
        return runs[-1] if len(runs) > known else None

    try:
        code = work()
    except HarnessError as error:
        if os.environ.get("ADE_HARNESS_TRACEBACK"):
            raise
        say(f"error: {error}")
        report_failure(cfg, run_dir(), str(error), say)
        return EXIT_MESSAGE
    except Exception as error:  # a fault of a model or of this package; its traceback follows
        report_failure(cfg, run_dir(), f"{type(error).__name__}: {text_of(error)}", say)
        raise
    if code == EXIT_RANK_LOST:
        report_failure(cfg, run_dir(), "another rank was lost", say)
    return code


def last_error(run_dir: Path) -> str:
    """Return the last message that begins with "error:" in the logs of the ranks, or nothing."""
    for log in sorted((run_dir / "logs").glob("rank*.log")):
        try:
            text = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            continue
        found = re.findall(r"^error: (.*(?:\n(?!error: ).+)*)", text, re.MULTILINE)
        if found:
            return str(found[-1]).strip()
    return ""
