"""The commands `report` and `compare`: finished runs in, a table and a self-contained page out."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from ade_harness.cli.answer import Answer
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import with_folder
from ade_harness.files.reading import expanded
from ade_harness.metrics.bootstrap import LEVEL, MAX_RESAMPLES, RESAMPLES
from ade_harness.report.pages import COMPARISON_PAGE, PAGE, write_comparison_page, write_report
from ade_harness.report.ranking import MAX_RUNS, print_ranking, rank_runs, ranking_content
from ade_harness.runs.finished import load_run
from ade_harness.runtime.console import make_console, print_fact


def run_report(options: argparse.Namespace) -> Answer:
    """Write the page of one run.

    Raises:
        HarnessError: see :func:`ade_harness.runs.finished.load_run`; or the page cannot be written.
    """
    console = make_console()
    run = load_run(expanded(options.run))
    page = _page(options.output or run.path / PAGE)
    write_report(console, run, with_folder(page), options.scenes)
    _print_page(console, page)
    return Answer({"page": str(page)})


def run_compare(options: argparse.Namespace) -> Answer:
    """Print how runs compare, and write their page.

    Raises:
        HarnessError: fewer than two runs, or runs that cannot be compared.
    """
    if not 2 <= len(options.runs) <= MAX_RUNS:
        raise HarnessError(
            f"compare needs 2 to {MAX_RUNS} run directories, or wandb:entity/project/run; got {len(options.runs)}."
        )
    console = make_console()
    page = _page(options.output or COMPARISON_PAGE)
    runs = [load_run(path) for path in _distinct([_fetched(name) for name in options.runs])]
    resamples = RESAMPLES if options.resamples is None else options.resamples
    if not 100 <= resamples <= MAX_RESAMPLES:
        raise HarnessError(f"--resamples={resamples}: expected a number of at least 100 and at most {MAX_RESAMPLES:,}.")
    ranking = rank_runs(runs, resamples, 0, LEVEL)
    print_ranking(console, ranking, LEVEL)
    write_comparison_page(with_folder(page), ranking, LEVEL)
    _print_page(console, page)
    return Answer({"page": str(page), **ranking_content(ranking, LEVEL)})


def _distinct(paths: list[Path]) -> list[Path]:
    """Return run directories as they are; raises HarnessError where one stands twice, by whatever name."""
    for number, path in enumerate(paths):
        for other in paths[:number]:
            if path.resolve() == other.resolve():
                raise HarnessError(f"{path}: given twice ({other} is the same directory). Name each run once.")
    return paths


def _page(given: str | Path) -> Path:
    """Return where the page goes; raises HarnessError for the name of another kind of file."""
    path = expanded(given)
    if path.suffix.lower() not in (".html", ".htm"):
        raise HarnessError(f"--output {given}: the page is HTML, expected a name that ends in .html.")
    return path


def _fetched(name: str) -> Path:
    """Return a run's directory; wandb is imported only for runs that are there."""
    if not name.startswith("wandb:"):
        return expanded(name)
    from ade_harness.tracking.pull import pull_run

    return pull_run(name)


def _print_page(console: Console, page: Path) -> None:
    size = page.stat().st_size / 1e6
    print_fact(console, "page", f"{page} ({size:.1f} MB, opens in any browser, needs no network)")
