"""The commands `leaderboard`, `submit` and `reproduce`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ade_harness.cli.answer import Answer
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import json_safe, with_folder
from ade_harness.files.reading import expanded
from ade_harness.leaderboard.table import (
    METRICS,
    find_runs,
    measured_entries,
    published_entries,
    ranked,
    ranked_runs,
    ranking_table,
    write_output,
)
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runtime.console import make_console, print_fact, print_line


def run_leaderboard(options: argparse.Namespace) -> Answer:
    """Print the leaderboard with local runs merged in, and write what is asked for.

    Raises:
        HarnessError: a run that cannot be read or is not comparable, or a file that cannot be written.
    """
    console = make_console()
    root = expanded(options.root or "runs")
    if options.root and not root.is_dir():
        raise HarnessError(f"--root {root}: no such folder.")
    runs: list[FinishedRun] = []
    excluded: list[str] = []
    if options.runs:
        runs, excluded = ranked_runs([expanded(folder) for folder in options.runs])
        if not runs:  # all that was named; else the others are ranked, and these are lines below the table
            raise HarnessError("\n".join(excluded))
    elif root.is_dir():
        runs, excluded = find_runs(root)
    entries = published_entries()
    for run in runs[:]:
        try:
            entries += measured_entries(run)
        except HarnessError as error:  # a line below the table, as every run that is left out
            runs.remove(run)
            excluded.append(str(error))
    for metric in METRICS:
        console.print(ranking_table(ranked(entries, metric), metric))
    print_fact(console, "measured", f"{len(runs)} complete runs; {len(excluded)} others excluded")
    for why in excluded if options.runs else excluded[:5]:
        print_line(console, f"  {why}", style="dim")
    for output in options.output:
        write_output(with_folder(expanded(output)), entries)
        print_fact(console, "written", output)
    return Answer({"rows": [asdict(e) for metric in METRICS for e in ranked(entries, metric)], "excluded": excluded})


def run_submit(options: argparse.Namespace) -> Answer:
    """Build a submission, or check one (``--check DIR``).

    Raises:
        HarnessError: everything that stands in the way of a submission, each with what to do; nothing was written.
    """
    from ade_harness.leaderboard.submission.scripts import SCRIPT
    from ade_harness.leaderboard.submission.submit import build, look_up, prepare

    console = make_console()
    if options.check:
        if options.run:
            raise HarnessError("submit --check takes one folder, the submission's.")
        return _check(console, expanded(options.check))
    if not options.run:
        raise HarnessError("submit needs one run directory and --contact, or --check DIR.")
    run = load_run(expanded(options.run))
    output = expanded(options.output or f"submission-{run.name}")
    if output.exists():
        raise HarnessError(f"{output}: exists already. Choose another folder: --output DIR.")
    given = {f"--{k.replace('_', '-')}": v for k, v in vars(options).items() if isinstance(v, str) and k != "run"}
    declaration, texts = prepare(run, given, lambda reference: reference if options.no_network else look_up(reference))
    build(run, output, declaration, texts)
    for reference in declaration["references"]:
        print_fact(console, reference["role"], f"{reference['address']} ({reference['checked']})")
    for row in declaration["results"]:
        print_fact(console, row["metric"], f"{row['value']:.2f}")
    if run.verdict:
        print_fact(console, "published", run.verdict)
    print_fact(console, "submission", f"{output} (its check passed)")
    print_fact(console, "try it", f"ADE20K_ROOT=... {output / SCRIPT}")
    return Answer({"submission": str(output), "claim": json_safe(declaration)})


def _check(console: Console, folder: Path) -> Answer:
    from ade_harness.leaderboard.submission.bundle import bundle_problems, read_declaration
    from ade_harness.leaderboard.submission.submit import listed

    problems = bundle_problems(folder)
    if problems:
        raise HarnessError(f"{folder}: not a valid submission:\n" + listed(problems))
    declaration = read_declaration(folder)
    print_fact(console, "submission", f"{folder}: valid; no code was executed")
    print_fact(console, "system", json.dumps(declaration["system"]))
    print_fact(console, "rows", ", ".join(f"{r['metric']} {r['value']:.2f}" for r in declaration["results"]))
    print_fact(console, "ledger", f"2,000 images sum to this score; sha256 {declaration['ledger_sha256']}")
    for reference in declaration["references"]:
        print_fact(console, reference["role"], f"{reference['address']} ({json.dumps(reference['checked'])})")
    print_fact(console, "next", f"python -m ade_harness reproduce {folder} dataset.root=... runs it again")
    return Answer({"submission": str(folder), "valid": True, "claim": json_safe(declaration)})


def run_reproduce(options: argparse.Namespace) -> Answer:
    """Repeat a run or a submission; the exit code is :func:`ade_harness.leaderboard.reproduce.rerun.reproduce`'s.

    Raises:
        HarnessError: it cannot be repeated: see the message.
    """
    from ade_harness.leaderboard.reproduce.rerun import reproduce

    output = expanded(options.output) if options.output else None
    source = expanded(options.source)
    code, content = reproduce(make_console(), source, output, options.overrides, options.trust)
    return Answer(content, code)
