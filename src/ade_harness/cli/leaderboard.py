"""The commands `leaderboard`, `submit` and `reproduce`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ade_harness.cli.flags import last_values, split_words
from ade_harness.errors import HarnessError
from ade_harness.leaderboard.reproduce.rerun import reproduce
from ade_harness.leaderboard.submission.bundle import bundle_problems, read_claim
from ade_harness.leaderboard.submission.recipe import SCRIPT
from ade_harness.leaderboard.submission.submit import build, listed, look_up, prepare
from ade_harness.leaderboard.table import (
    METRICS,
    find_runs,
    measured_entries,
    published_entries,
    ranked,
    ranking_table,
    why_not_ranked,
    write_output,
)
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runtime.console import print_fact, print_line


def run_leaderboard(console: Console, words: Sequence[str]) -> int:
    """Print the leaderboard with local runs merged in, and write what is asked for; returns 0.

    Args:
        console: where to print.
        words: run directories; ``--root DIR`` for all runs below a folder (default runs); ``--output FILE``, by its
            ending Markdown, CSV, or the chart as PNG, SVG or PDF; may be given several times.

    Raises:
        HarnessError: a run that cannot be read or has no place here, or a file that cannot be written.
    """
    folders, outputs, root = _split(words)
    runs: list[FinishedRun] = []
    left_out: list[str] = []
    if folders:
        for folder in folders:
            run = load_run(Path(folder).expanduser())
            why = why_not_ranked(run)
            if why is not None:
                raise HarnessError(f"{folder}: has no place beside published scores: {why}.")
            runs.append(run)
    elif root.is_dir():
        runs, left_out = find_runs(root)
    entries = [*published_entries(), *(entry for run in runs for entry in measured_entries(run))]
    for metric in METRICS:
        console.print(ranking_table(ranked(entries, metric), metric))
    print_fact(console, "measured", f"{len(runs)} complete runs; {len(left_out)} others are left out")
    for why in left_out[:5]:
        print_line(console, f"  {why}", style="dim")
    for output in outputs:
        write_output(output, entries)
        print_fact(console, "written", str(output))
    return 0


def _split(words: Sequence[str]) -> tuple[list[str], list[Path], Path]:
    folders, options = split_words(words, ("--output", "--root"))
    outputs = [Path(output).expanduser() for output in options.get("--output", ())]
    root = Path(last_values(options).get("--root", "runs")).expanduser()
    if "--root" in options and not root.is_dir():
        raise HarnessError(f"--root {root}: no such folder.")
    return folders, outputs, root


_FLAGS = (
    "--contact", "--output", "--checkpoint", "--backbone", "--repository", "--system", "--organization", "--paper",
    "--model-code", "--check",
)  # fmt: skip

_NO_NETWORK = "--no-network"


def run_submit(console: Console, words: Sequence[str]) -> int:
    """Build a submission, or check one (``--check DIR``); returns 0.

    Raises:
        HarnessError: everything that stands in the way of a submission, each with what to do; nothing was written.
    """
    folders, given = split_words(words, _FLAGS, (_NO_NETWORK,))
    options = last_values(given)
    if "--check" in options:
        if folders:
            raise HarnessError("submit --check takes one folder, the submission's.")
        return _check(console, Path(options["--check"]).expanduser())
    if len(folders) != 1:
        raise HarnessError("submit needs one run directory and --contact, or --check DIR.")
    path = Path(folders[0]).expanduser()
    run = load_run(path)
    output = Path(options.get("--output", f"submission-{run.name}")).expanduser()
    if output.exists():
        raise HarnessError(f"{output}: is there already. Name another folder: --output DIR.")
    claim, texts = prepare(
        run, options, lambda reference: reference if _NO_NETWORK in given else look_up(console, reference)
    )
    build(run, output, claim, texts)
    for reference in claim["references"]:
        print_fact(console, reference["role"], f"{reference['address']} ({reference['checked']})")
    for row in claim["results"]:
        print_fact(console, row["metric"], f"{row['value']:.2f}")
    if run.verdict:
        print_fact(console, "published", run.verdict)
    print_fact(console, "submission", f"{output} (its check passed)")
    print_fact(console, "try it", f"ADE20K_ROOT=... {output / SCRIPT}")
    return 0


def _check(console: Console, folder: Path) -> int:
    problems = bundle_problems(folder)
    if problems:
        raise HarnessError(f"{folder}: not a valid submission:\n" + listed(problems))
    claim = read_claim(folder)
    print_fact(console, "submission", f"{folder}: valid; nothing in it was run")
    print_fact(console, "system", json.dumps(claim["system"]))
    print_fact(console, "rows", ", ".join(f"{r['metric']} {r['value']:.2f}" for r in claim["results"]))
    print_fact(console, "ledger", f"2,000 images sum to this score; sha256 {claim['ledger_sha256']}")
    for reference in claim["references"]:
        print_fact(console, reference["role"], f"{reference['address']} ({json.dumps(reference['checked'])})")
    print_fact(console, "next", f"python -m ade_harness reproduce {folder} dataset.root=... runs it again")
    return 0


def run_reproduce(console: Console, words: Sequence[str]) -> int:
    """Repeat a run or a submission; returns the exit code of :func:`ade_harness.leaderboard.reproduce.rerun.reproduce`.

    Args:
        console: where to print.
        words: a run directory or a submission; options of where things are on this machine; ``--output DIR``;
            ``--trust``.

    Raises:
        HarnessError: it cannot be repeated: see the message.
    """
    names, options = split_words(words, ("--output",), ("--trust",))
    folders = [name for name in names if "=" not in name]
    overrides = [name for name in names if "=" in name]
    if len(folders) != 1:
        raise HarnessError("reproduce needs one run directory, or the folder of a submission.")
    output = last_values(options).get("--output")
    chosen = Path(output).expanduser() if output else None
    return reproduce(console, Path(folders[0]).expanduser(), chosen, overrides, "--trust" in options)
