"""The commands `report` and `compare`: finished runs in, a table and a self-contained page out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ade_harness.cli.flags import last_values, split_words
from ade_harness.errors import HarnessError
from ade_harness.metrics.bootstrap import LEVEL, RESAMPLES
from ade_harness.report.pages import COMPARISON_PAGE, PAGE, write_comparison_page, write_report
from ade_harness.report.ranking import MOST_RUNS, print_ranking, rank_runs
from ade_harness.runs.finished import load_run
from ade_harness.runtime.console import print_fact


def run_report(console: Console, words: Sequence[str]) -> int:
    """Write the page of one run; returns 0.

    Raises:
        HarnessError: see :func:`ade_harness.runs.finished.load_run`; or the page cannot be written.
    """
    folders, given = split_words(words, ("--output", "--scenes"))
    options = last_values(given)
    if len(folders) != 1:
        raise HarnessError("report needs one run directory, such as `report runs/20260102-030405_demo_a1b2c3`.")
    run = load_run(Path(folders[0]).expanduser())
    page = Path(options.get("--output", run.path / PAGE)).expanduser()
    write_report(console, run, page, options.get("--scenes"))
    _tell(console, page)
    return 0


def run_compare(console: Console, words: Sequence[str], pull: Callable[[str], Path]) -> int:
    """Print how runs compare, and write their page; returns 0.

    Args:
        console: where to print.
        words: run directories, or ``wandb:entity/project/run``.
        pull: fetches the latter.

    Raises:
        HarnessError: fewer than two runs, or runs that cannot be compared.
    """
    folders, given = split_words(words, ("--output", "--resamples"))
    options = last_values(given)
    if not 2 <= len(folders) <= MOST_RUNS:
        raise HarnessError(
            f"compare needs 2 to {MOST_RUNS} run directories, or wandb:entity/project/run; got {len(folders)}."
        )
    runs = [load_run(pull(f) if f.startswith("wandb:") else Path(f).expanduser()) for f in folders]
    try:
        resamples = int(options.get("--resamples", RESAMPLES))
    except ValueError:
        resamples = 0
    if resamples < 100:
        raise HarnessError(f"--resamples={options['--resamples']}: expected a number from 100 up.")
    ranking = rank_runs(runs, resamples, 0, LEVEL)
    print_ranking(console, ranking, LEVEL)
    page = Path(options.get("--output", COMPARISON_PAGE)).expanduser()
    write_comparison_page(page, ranking, LEVEL)
    _tell(console, page)
    return 0


def _tell(console: Console, page: Path) -> None:
    print_fact(console, "page", f"{page} ({page.stat().st_size / 1e6:.1f} MB, opens in any browser, needs no network)")
