"""The command `runs`: any number of runs as one table."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from operator import ge, gt, le, lt
from typing import Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from ade_harness.cli.answer import Answer
from ade_harness.errors import HarnessError, did_you_mean, require
from ade_harness.files.atomic import write_text
from ade_harness.files.escapes import markdown_cell, one_line
from ade_harness.files.reading import expanded
from ade_harness.runs.overview import COLUMNS, RunRow, list_runs
from ade_harness.runtime.console import make_console, print_fact, print_line

_ALIASES = {
    "model.name": "model", "model.label": "label", "inference.name": "protocol", "inference": "protocol",
    "dataset.name": "dataset", "dir": "run", "date": "started", "score": "mIoU",
}  # fmt: skip
_SCORES = ("mIoU", "low", "high", "pixel_accuracy", "mean_accuracy", "mean_dice")
_SHOWN = ("run", "label", "protocol", "dataset", "images", "mIoU", "interval", "status")


def run_runs(options: argparse.Namespace) -> Answer:
    """Print the runs in and below some folders, and write them as CSV, JSON or Markdown.

    Raises:
        HarnessError: no run, an unknown column, or a file that cannot be written.
    """
    rows = list_runs([expanded(folder) for folder in options.folders or ["runs"]])
    for condition in options.where:
        rows = [row for row in rows if _matches(row, condition)]
    if options.sort is not None:
        column = _column(options.sort)
        known = [row for row in rows if getattr(row, column) is not None]
        best_first = column in _SCORES  # as in every table of scores
        known.sort(key=lambda row: getattr(row, column), reverse=options.reverse != best_first)
        rows = known + [row for row in rows if getattr(row, column) is None]
    console = make_console()
    if rows:
        console.print(_table(rows))
    else:
        print_line(console, "no run matches --where")
    for name in options.output:
        path = expanded(name)
        write = _WRITERS.get(path.suffix.lower())
        require(write is not None, f"--output {name}: expected a name that ends in {', '.join(_WRITERS)}.")
        assert write is not None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, write(rows))
        except OSError as error:
            raise HarnessError(f"{path}: cannot be written ({error.strerror or error}).") from error
        print_fact(console, "written", str(path))
    return Answer({"runs": [asdict(row) for row in rows]})


def _column(name: str) -> str:
    found = _ALIASES.get(name, {column.lower(): column for column in COLUMNS}.get(name.lower(), name))
    require(
        found in COLUMNS,
        f"{name}: no such column.{did_you_mean(name, COLUMNS)} Columns: {', '.join(COLUMNS)}.",
    )
    return found


def _matches(row: RunRow, condition: str) -> bool:
    """Whether a run fits ``column=value``, where a value may hold ``*``, or a comparison; what is unknown fits none.

    Raises:
        HarnessError: another form of condition, no such column, or text and number compared in order.
    """
    parts = _CONDITION.fullmatch(condition)
    if parts is None:
        raise HarnessError(f"--where {condition}: expected COLUMN=VALUE, such as model=segformer_b0, or mIoU>0.4.")
    name, operator, value = parts.groups()
    found = getattr(row, _column(name.strip()))
    score = _column(name.strip()) in _FRACTIONS
    if score and _is_number(value) and float(value) > 1:
        raise HarnessError(
            f"--where {condition}: scores are fractions: {name.strip()}{operator}{float(value) / 100:g}."
        )
    if operator in ("=", "!=") and isinstance(found, int | float) and _is_number(value):
        return (found == float(value)) == (operator == "=")
    if operator in ("=", "!="):
        return fnmatchcase("" if found is None else str(found), value.strip()) == (operator == "=")
    if found is None:
        return False
    if isinstance(found, str):
        return _ORDERS[operator](found, value.strip())  # dates are in ISO 8601, whose order is that of text
    try:
        return _ORDERS[operator](found, float(value))
    except ValueError as error:
        problem = f"{name.strip()} is a number, and {value.strip()!r} is none."
        raise HarnessError(f"--where {condition}: {problem}") from error


_FRACTIONS = ("mIoU", "low", "high", "pixel_accuracy", "mean_accuracy", "mean_dice")
"""Columns of scores, which tables show as percent."""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_CONDITION = re.compile(r"([^=!<>]+)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge}


def _cells(row: RunRow) -> dict[str, str]:
    interval = "" if row.low is None or row.high is None else f"{100 * row.low:.2f} to {100 * row.high:.2f}"
    known = row.images is not None and row.expected_images is not None
    images = f"{row.images:,} of {row.expected_images:,}" if known else ""
    return {
        "run": row.run,
        "label": row.label or "",
        "protocol": row.protocol or "",
        "dataset": row.dataset or "",
        "images": images,
        "mIoU": "" if row.mIoU is None else f"{100 * row.mIoU:.2f}",
        "interval": interval,
        "status": ", ".join([row.status, *(mark.partition(":")[0] for mark in row.marks.split("; ") if mark)]),
    }


def _table(rows: Sequence[RunRow]) -> Table:
    table = Table(title="runs (percent)", box=HORIZONTALS, pad_edge=False, title_justify="left")
    for name in _SHOWN:
        table.add_column(name, justify="right" if name in ("images", "mIoU") else "left", overflow="fold")
    for row in rows:
        cells = _cells(row)
        style = "" if row.status == "finished" and not row.marks else "yellow"
        table.add_row(*(Text(one_line(cells[name]), style=style if name == "status" else "") for name in _SHOWN))
    return table


def _csv(rows: Sequence[RunRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def _json(rows: Sequence[RunRow]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2) + "\n"


def _markdown(rows: Sequence[RunRow]) -> str:
    lines = [f"| {' | '.join(_SHOWN)} |", "|" + "---|" * len(_SHOWN)]
    for row in rows:
        cells = _cells(row)
        lines.append(f"| {' | '.join(markdown_cell(cells[name]) for name in _SHOWN)} |")
    return "\n".join(lines) + "\n"


_WRITERS: dict[str, Callable[[Sequence[RunRow]], str]] = {".csv": _csv, ".json": _json, ".md": _markdown}
"""By the ending of a file."""
