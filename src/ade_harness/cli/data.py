"""``data download`` and ``data verify``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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

from ade_harness.data.verify import VerifyReport, verify
from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.files.fetch import OFFICIAL_SHA1, OFFICIAL_URL, cache_dir, extract, fetch
from ade_harness.runtime.console import print_line
from ade_harness.runtime.progress import ProgressReporter

_PROBLEMS_SHOWN = 50


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise HarnessError(f"data: {message}. See `python -m ade_harness --help`.")


def run_data(console: Console, words: Sequence[str]) -> int:
    """Run a data command; returns the exit code."""
    commands = {"download": _download, "verify": _verify}
    if not words or words[0] not in commands:
        given = words[0] if words else ""
        raise HarnessError(f"data {given}: expected `data download` or `data verify`.{did_you_mean(given, commands)}")
    return commands[words[0]](console, words[1:])


def _download(console: Console, words: Sequence[str]) -> int:
    parser = _Parser(prog="data download", add_help=False)
    parser.add_argument("--root", type=Path, default=cache_dir() / "data")
    parser.add_argument("--url", default=OFFICIAL_URL)
    parser.add_argument("--sha1", default=OFFICIAL_SHA1)
    parser.add_argument("--zip-only", action="store_true")
    options = parser.parse_args(list(words))
    archive = options.root / "ADEChallengeData2016.zip"
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), DownloadColumn(),
        TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("downloading", total=None)
        fetch(
            options.url,
            archive,
            algorithm="sha1",
            digest=options.sha1,
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )
        if not options.zip_only:
            task = bar.add_task("extracting", total=None)
            extract(archive, options.root, lambda done, total: bar.update(task, completed=done, total=total))
    root = archive if options.zip_only else options.root / "ADEChallengeData2016"
    print_line(console, f"{archive}: checked, sha1 {options.sha1}")
    print_line(console, f"use it with: dataset=ade20k dataset.root={root}")
    return 0


def _verify(console: Console, words: Sequence[str]) -> int:
    parser = _Parser(prog="data verify", add_help=False)
    parser.add_argument("root", type=Path, nargs="?", default=cache_dir() / "data" / "ADEChallengeData2016")
    parser.add_argument("--split", default="validation", choices=("validation", "training"))
    options = parser.parse_args(list(words))
    console = Console()
    reporter: ProgressReporter | None = None

    def on_pair(done: int, total: int) -> None:
        nonlocal reporter
        if reporter is None:
            reporter = ProgressReporter(console, total, unit="pairs", title="checking")
            reporter.start()
        reporter.update(done)

    report = verify(options.root.expanduser(), options.split, on_pair)
    if reporter is not None:
        reporter.close()
    _print_report(console, report)
    return 0 if report.is_whole else 2


def _print_report(console: Console, report: VerifyReport) -> None:
    def say(text: str) -> None:
        print_line(console, text)

    pixels = int(report.class_pixels.sum())
    say(f"{report.root}: {report.pairs} of {report.expected} {report.split} pairs")
    say(
        f"{pixels:,} labelled and {report.ignored_pixels:,} unlabelled pixels,"
        f" {(report.class_pixels > 0).sum()} of 150 classes occur"
    )
    if report.missing:
        shown = ", ".join(report.missing[:5])
        say(f"{len(report.missing)} official images are missing: {shown}{', ...' if len(report.missing) > 5 else ''}")
    for problem in report.problems[:_PROBLEMS_SHOWN]:
        say(f"problem: {problem}")
    if len(report.problems) > _PROBLEMS_SHOWN:
        say(f"... and {len(report.problems) - _PROBLEMS_SHOWN} more problems")
    say(
        "whole and undamaged"
        if report.is_whole
        else "NOT the whole official set: a score on it would be partial or wrong"
    )
