"""Be a rank, or start and watch this node's ranks."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ade_harness.cli.failures import report_failure, run_and_report
from ade_harness.config.composed import Composed
from ade_harness.runtime.cluster import (
    check_variables,
    find_node,
    is_rank,
    is_reporting_process,
    requeue_slurm_job,
    resolve_devices,
)
from ade_harness.runtime.console import print_error
from ade_harness.runtime.lazy_imports import import_lightning
from ade_harness.runtime.lifetime import importing
from ade_harness.runtime.notes import EXIT_MESSAGE, EXIT_RANK_LOST, EXIT_STOPPED, resume_command
from ade_harness.runtime.supervisor import Supervisor
from ade_harness.tracking.attaching import require_attachable

if TYPE_CHECKING:
    from ade_harness.config.schema import Config

_REQUEUE_WAIT_S = 120.0
"""For SLURM to end a job that it has taken back."""
_current_run: list[Path] = []
"""The run directory in use, for the message after Ctrl-C."""


def print_resume_hint(why: str) -> None:
    """Print what to do after an end from outside; of several ranks the first speaks, or their supervisor."""
    if not is_reporting_process():
        return
    if not _current_run:
        print_error(f"\n{why}: no image was evaluated.")
    else:
        print_error(f"\n{why}. Completed work is saved; to resume:\n  {resume_command(_current_run[-1])}")


def launch(
    config: Config,
    in_this_process: bool,
    work: Callable[[Callable[[Path], None]], Any],
    handed_over: Mapping[str, Any],
) -> tuple[int, Path | None]:
    """Be a rank, or start and watch this node's ranks.

    Args:
        config: what to run.
        in_this_process: never start others.
        work: of a rank; it reports the run directory as soon as it is there.
        handed_over: to :mod:`ade_harness.cli.rank`, beside the configuration.

    Returns:
        The exit code, and the run directory if there is one.

    Raises:
        HarnessError: a score that is to be added to a run of W&B's cannot be.
    """
    known = len(_current_run)
    check_variables()
    require_attachable(config.tracking, ask=is_reporting_process())
    if in_this_process or is_rank() or not config.runtime.supervise:
        if not in_this_process:  # the process is ours alone: nobody else's imports are changed
            with importing():
                import_lightning()
        code = be_rank(config, work)
    else:
        code = _supervise(config, handed_over)
    return code, _current_run[-1] if len(_current_run) > known else None


def be_rank(config: Config, work: Callable[[Callable[[Path], None]], Any]) -> int:
    """Do a rank's work; what goes wrong is reported to the user, and to W&B."""
    return run_and_report(config, _current_run, lambda: _rank(work), print_error)


def _rank(work: Callable[[Callable[[Path], None]], Any]) -> int:
    from ade_harness.runtime.coordination import RankLostError, StopRequestedError

    try:
        work(_current_run.append)
    except StopRequestedError as stop:
        print_resume_hint(str(stop).capitalize())
        return EXIT_MESSAGE if str(stop) == "interrupted" else EXIT_STOPPED
    except RankLostError as lost:
        print_error(f"error: {lost}; completed images of this rank are saved.")
        return EXIT_RANK_LOST
    return 0


def _supervise(config: Config, handed_over: Mapping[str, Any]) -> int:
    _, ranks = resolve_devices(config.runtime)
    node = find_node(config.runtime)
    composed: list[Composed] = []

    def handover(run_dir: str | None) -> str:
        """Return what ranks need; while it is made, they import."""
        if not composed:
            composed.append(Composed.from_config(config))
        config.run.dir = run_dir or config.run.dir
        return composed[0].as_json(**handed_over)

    messages: list[str] = []

    def report(text: str) -> None:
        messages.append(text)
        print_error(text)

    command = [sys.executable, "-P", "-m", "ade_harness.cli.rank"]  # -P: nothing is imported from the directory
    supervisor = Supervisor(command, handover, ranks, node, config.runtime.max_restarts, report)
    code = supervisor.run()
    if supervisor.run_dir is not None:
        _current_run.append(Path(supervisor.run_dir))
    if code in (EXIT_MESSAGE, EXIT_STOPPED) and supervisor.received is not None and node.rank == 0:
        print_resume_hint("Interrupted" if supervisor.received == signal.SIGINT else "Stopped")
    if code not in (0, EXIT_STOPPED) and supervisor.received is None and node.rank == 0:
        report_failure(config, _current_run[-1] if supervisor.run_dir else None, "\n".join(messages), print_error)
    if code == EXIT_STOPPED and config.runtime.requeue and supervisor.received == signal.SIGUSR1:
        if node.rank != 0:
            return 0  # a failure here would make srun kill node 0 before it has requeued the job
        if requeue_slurm_job(config.runtime.slurm.most_requeues, print_error):
            time.sleep(_REQUEUE_WAIT_S)
    return code
