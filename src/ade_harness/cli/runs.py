"""The command `runs`: any number of runs as one table."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
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
    conditions = [_parsed(condition) for condition in options.where]
    for name in options.output:
        require(
            expanded(name).suffix.lower() in _WRITERS,
            f"--output {name}: expected a name that ends in {', '.join(_WRITERS)}.",
        )
    rows = list_runs([expanded(folder) for folder in options.folders or ["runs"]])
    rows = [row for row in rows if all(_matches(row, *condition) for condition in conditions)]
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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, _WRITERS[path.suffix.lower()](rows))
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


def _parsed(condition: str) -> tuple[str, str, str]:
    """Return column, operator and value of a ``--where``: ``column=value`` or a comparison.

    Raises:
        HarnessError: another form of condition, no such column, or no number for a column of numbers.
    """
    parts = _CONDITION.fullmatch(condition)
    if parts is None or parts[2] in ("=<", "=>"):
        raise HarnessError(f"--where {condition}: expected COLUMN=VALUE, such as model=segformer_b0, or mIoU>=0.4.")
    name, operator, value = parts[1].strip(), parts[2].replace("==", "="), parts[3].strip()
    column = _column(name)
    number = _number(value)
    require(
        column not in _NUMBERS or number is not None or ((not value or "*" in value) and operator in ("=", "!=")),
        f"--where {condition}: {name} is a number, and {value!r} is none.",
    )
    require(
        column not in _FRACTIONS or number is None or number <= 1,
        f"--where {condition}: scores are fractions: {name}{operator}{(number or 0) / 100:g}.",
    )
    return column, operator, value


def _matches(row: RunRow, column: str, operator: str, value: str) -> bool:
    """Whether a run fits a condition; what is unknown fits no comparison.

    A text may hold ``*``, in any case of letters. `status` and `marks` have several: any of them may fit.
    """
    found = getattr(row, column)
    if operator in _ORDERS:
        if found is None:
            return False
        # dates are in ISO 8601, whose order is that of text
        return bool(_ORDERS[operator](found, value if isinstance(found, str) else float(value)))
    if column in _NUMBERS and "*" not in value:
        return bool((found == _number(value)) == (operator == "="))
    if column in _NUMBERS and found is None:  # `images=*`: whose number is known
        return operator == "!="
    texts = ["" if found is None else str(found)]
    if column in ("status", "marks"):
        marks = [mark for mark in row.marks.split("; ") if mark]
        texts += [*(marks if column == "marks" else ()), *(mark.partition(":")[0] for mark in marks)]
    return any(fnmatchcase(text.lower(), value.lower()) for text in texts) == (operator == "=")


_NUMBERS = tuple(field.name for field in fields(RunRow) if "int" in str(field.type) or "float" in str(field.type))
"""Columns of numbers."""
_FRACTIONS = ("mIoU", "low", "high", "pixel_accuracy", "mean_accuracy", "mean_dice")
"""Columns of scores, which tables show as percent."""


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


_CONDITION = re.compile(r"([^=!<>]+)(==|=<|=>|!=|<=|>=|=|<|>)(.*)", re.DOTALL)
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
