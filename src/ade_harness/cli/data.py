"""``data download`` and ``data verify``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ade_harness.cli.answer import Answer
from ade_harness.config.files import default_data_roots
from ade_harness.data.hub_copy import REPOSITORY, write_copy
from ade_harness.data.verify import VerifyReport, verify
from ade_harness.errors import HarnessError, require
from ade_harness.files.fetch import OFFICIAL_SHA1, OFFICIAL_URL, cache_dir, extract, fetch
from ade_harness.files.reading import expanded
from ade_harness.runtime.console import make_console, print_line
from ade_harness.runtime.progress_bar import ProgressReporter

_PROBLEMS_SHOWN = 50
_T = TypeVar("_T")

_MAX_ARCHIVE_BYTES = 4 << 30
"""The official archive has a quarter of that."""


def run_download(options: argparse.Namespace) -> Answer:
    """Fetch, check and extract the official archive.

    Raises:
        HarnessError: see :func:`ade_harness.files.fetch.fetch`.
    """
    console = make_console()
    folder = expanded(options.root) if options.root else cache_dir() / "data"
    if options.source == "hub":
        return _download_copy(console, folder, options)
    require(options.repository is None, "--repository: goes with --source hub.")
    url, sha1 = options.url or OFFICIAL_URL, options.sha1 or OFFICIAL_SHA1
    archive = folder / "ADEChallengeData2016.zip"
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=make_console(result=False)) as bar:
        task = bar.add_task("downloading", total=None)
        try:
            fetch(
                url,
                archive,
                algorithm="sha1",
                digest=sha1,
                max_bytes=_MAX_ARCHIVE_BYTES,
                on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
            )
        except HarnessError as error:
            if options.url:
                raise
            raise HarnessError(
                f"{error} `data download --source hub` fetches the hub's copy of the validation split instead."
            ) from error
        if not options.zip_only:
            task = bar.add_task("extracting", total=None)
            extract(archive, folder, lambda done, total: bar.update(task, completed=done, total=total))
    root = archive if options.zip_only else folder / "ADEChallengeData2016"
    print_line(console, f"{archive}: checked, sha1 {sha1}")
    print_line(console, f"use it with: dataset=ade20k dataset.root={root}")
    return Answer({"root": str(root), "archive": str(archive), "sha1": sha1})


def _download_copy(console: Console, folder: Path, options: argparse.Namespace) -> Answer:
    """Write the hub's copy of the validation split out, and check it as `data verify` does."""
    given = [name for name in ("url", "sha1", "zip_only") if getattr(options, name)]
    require(not given, f"--{', --'.join(given).replace('_', '-')}: of the archive: cannot be used with --source hub.")
    repository = options.repository or REPOSITORY
    root = _watched("writing", lambda on_pair: write_copy(folder, repository=repository, on_pair=on_pair))
    report = _watched("checking", lambda on_pair: verify(root, "validation", on_pair))
    _print_report(console, report)
    print_line(console, f"use it with: dataset=ade20k dataset.root={root}")
    content = {"root": str(root), "repository": repository, "intact": report.is_whole}
    return Answer(content, 0 if report.is_whole else 2)


def _watched(title: str, work: Callable[[Callable[[int, int], None]], _T]) -> _T:
    """Do something that reports pairs, under a progress bar."""
    reporter: ProgressReporter | None = None

    def on_pair(done: int, total: int) -> None:
        nonlocal reporter
        if reporter is None:
            reporter = ProgressReporter(make_console(result=False), total, unit="pairs", title=title)
            reporter.start()
        reporter.update(done)

    try:
        return work(on_pair)
    finally:
        if reporter is not None:
            reporter.close()


def run_verify(options: argparse.Namespace) -> Answer:
    """Check a copy of the data set; exit code 2 if it is not complete and intact.

    Raises:
        HarnessError: there is none.
    """
    console = make_console()
    given = options.root or os.environ.get("ADE20K_ROOT")
    places = default_data_roots()
    root = expanded(given) if given else next((p for p in places if p.exists()), places[0])
    report = _watched("checking", lambda on_pair: verify(root, options.split, on_pair))
    _print_report(console, report)
    content = {
        "root": str(report.root), "split": report.split, "pairs": report.pairs, "expected": report.expected,
        "intact": report.is_whole, "missing": list(report.missing), "problems": list(report.problems),
    }  # fmt: skip
    return Answer(content, 0 if report.is_whole else 2)


def _print_report(console: Console, report: VerifyReport) -> None:
    def say(text: str) -> None:
        print_line(console, text)

    pixels = int(report.class_pixels.sum())
    say(f"{report.root}: {report.pairs} of {report.expected} {report.split} pairs")
    say(
        f"{pixels:,} labelled and {report.ignored_pixels:,} unlabelled pixels,"
        f" {(report.class_pixels > 0).sum()} of {len(report.class_pixels)} classes occur"
    )
    if report.missing:
        shown = ", ".join(report.missing[:5])
        say(f"{len(report.missing)} official images are missing: {shown}{', ...' if len(report.missing) > 5 else ''}")
    for problem in report.problems[:_PROBLEMS_SHOWN]:
        say(f"problem: {problem}")
    if len(report.problems) > _PROBLEMS_SHOWN:
        say(f"... and {len(report.problems) - _PROBLEMS_SHOWN} more problems")
    say(
        "complete and intact"
        if report.is_whole
        else "NOT the whole official set: a score on it would be partial or wrong"
    )
