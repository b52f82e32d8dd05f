"""The leaderboard with one's own complete runs merged in, as a table, Markdown, CSV and a chart over time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib.dates as mdates
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from ade_harness.data.ade20k import validation_sizes
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import replaced, write_text
from ade_harness.files.documents import damaged
from ade_harness.files.escapes import markdown_cell, one_line
from ade_harness.leaderboard.published import published_rows
from ade_harness.metrics.bootstrap import bootstrap
from ade_harness.runs.directory import MANIFEST
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runs.record import is_own, is_own_result

METRICS = ("mIoU", "miou")
"""The leaderboard's two names for one number; a submission has a row for each."""
OTHER_DATASET = "evaluated on"
"""How :func:`why_not_ranked` begins for a run of other images than ADE20K's."""
NOT_SIGNED = "changed since it was made, or made by an earlier version: `reproduce` checks it"
NOT_OWN = "not made by you on this machine: `reproduce` checks it"
"""Note of a run that carries no signature of this user's."""
MEASURED, PUBLISHED = "measured", "published"
_COLUMNS = ("metric", "place", "system", "org", "date", "score", "interval", "kind", "note")
_FORMATS = {".md": "markdown", ".csv": "csv", ".png": "chart", ".svg": "chart", ".pdf": "chart"}


@dataclass(frozen=True)
class Entry:
    """One row."""

    metric: str
    system: str
    org: str
    date: str
    """YYYY-MM."""
    score: float
    """Percent."""
    kind: str
    """`MEASURED` here, or `PUBLISHED` by others."""
    note: str
    interval: tuple[float, float] | None = None
    """Percent; of measured scores."""


def published_entries() -> list[Entry]:
    """Return the leaderboard's 21 rows."""
    entries = []
    for row in published_rows():
        source = "" if row.source_score == row.score else f"source: {row.source_note}"
        entries.append(Entry(row.metric, row.system, row.org, row.date, row.score, PUBLISHED, source))
    return entries


def measured_entries(run: FinishedRun) -> list[Entry]:
    """Return a run's two rows; the date is that of the run.

    A ledger that sums to its score may be somebody's invention: what this user has not made says so, and its interval
    is computed from its ledger.

    Raises:
        HarnessError: metrics.json has another interval than the ledger.
    """
    own = is_own_result(run.path, run.manifest)
    interval = _interval(run, own)
    others = None if own else NOT_SIGNED if is_own(run.path, run.manifest) else NOT_OWN
    verdict = run.verdict if own else None  # as metrics.json has it
    note = "; ".join(filter(None, [others, f"{run.name}, inference={run.protocol}", _given_weights(run), verdict]))
    month, score = str(run.manifest["finished"])[:7], 100 * float(run.metrics["mIoU"])
    return [Entry(metric, run.label, "", month, score, MEASURED, note, interval) for metric in METRICS]


def _interval(run: FinishedRun, own: bool) -> tuple[float, float] | None:
    """Return the ends of mIoU's interval in percent; raises HarnessError where it is not the ledger's."""
    found, wanted = run.metrics["intervals"].get("mIoU"), run.config["metrics"]
    if found is None:
        return None
    ends = found["low"], found["high"]
    if not own:
        resamples = min(int(wanted["resamples"]), _MAX_RESAMPLES)
        made = bootstrap(run.areas, resamples, wanted["seed"]).intervals(wanted["level"])["mIoU"] if resamples else None
        same = made is not None and np.allclose(ends, (made.low, made.high), rtol=0, atol=1e-9)
        if made is None or not (same or resamples < int(wanted["resamples"])):
            raise damaged(str(run.path / "metrics.json"), "intervals.mIoU: is not that of the ledger")
        ends = made.low, made.high
    return 100 * ends[0], 100 * ends[1]


_MAX_RESAMPLES = 100_000
"""Resamples computed for somebody else's run: more take minutes."""


def _given_weights(run: FinishedRun) -> str | None:
    """Return which file of weights was given on the command line; None where the configuration names them."""
    given = run.config["model"].get("checkpoint")
    return f"weights given as {one_line(Path(str(given)).name)}" if given else None


def why_not_ranked(run: FinishedRun) -> str | None:
    """Return why a run is not comparable with published scores; None if it has."""
    if run.marks:
        return one_line(run.marks[0])
    if run.config["dataset"]["kind"] != "ade20k" or run.manifest["dataset"]["name"] != "ade20k":
        return f"{OTHER_DATASET} {run.manifest['dataset']['name']}: the leaderboard covers ADE20K validation only"
    if not run.complete:
        return "not all images of ADE20K validation"
    official = validation_sizes()
    foreign = next((row.image_id for row in run.rows if official.get(row.image_id) != (row.height, row.width)), None)
    if foreign is not None or len(run.rows) != len(official):
        return f"not the official images of ADE20K validation, such as {foreign}"
    if run.manifest["model"].get("weights") == "random":
        return "random weights"
    return None


def ranked(entries: Iterable[Entry], metric: str) -> list[Entry]:
    """Return the rows of one metric by score; ties by date, as the site does, then by system."""
    return sorted((e for e in entries if e.metric == metric), key=lambda e: (-e.score, e.date, e.system))


def find_runs(root: Path) -> tuple[list[FinishedRun], list[str]]:
    """Read all finished runs below a folder; as :func:`ranked_runs`."""
    return ranked_runs([manifest.parent for manifest in sorted(root.glob(f"*/{MANIFEST}"))])


def ranked_runs(folders: Iterable[Path]) -> tuple[list[FinishedRun], list[str]]:
    """Read finished runs.

    Returns:
        Those that can be ranked, and why others cannot.
    """
    runs: list[FinishedRun] = []
    left_out: list[str] = []
    for folder in folders:
        try:
            run = load_run(folder)
        except HarnessError as error:
            left_out.append(str(error))
            continue
        why = why_not_ranked(run)
        if why is None:
            runs.append(run)
        else:
            left_out.append(f"{folder}: is not comparable with published scores: {why}.")
    return runs, left_out


def write_output(path: Path, entries: Sequence[Entry]) -> None:
    """Write rows as Markdown, CSV, or a chart, by the file's ending.

    Raises:
        HarnessError: another ending, or the file cannot be written.
    """
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise HarnessError(f"--output {path}: expected a file that ends in {', '.join(_FORMATS)}.")
    if form == "chart":
        save_chart(path, entries)
    else:
        write_text(path, as_markdown(entries) if form == "markdown" else as_csv(entries))


def _rows(entries: Iterable[Entry], metric: str) -> list[tuple[str, ...]]:
    """Return the cells of `_COLUMNS`."""
    return [
        (
            metric, str(place), e.system, e.org, e.date, f"{e.score:.2f}",
            f"{e.interval[0]:.2f} to {e.interval[1]:.2f}" if e.interval else "", e.kind, e.note,
        )
        for place, e in enumerate(ranked(entries, metric), 1)
    ]  # fmt: skip


def ranking_table(entries: Sequence[Entry], metric: str) -> Table:
    """Return the ranking of one metric for the terminal; `entries` in their order."""
    table = Table(
        title=f"{metric}, percent: published by others, and measured here",
        box=HORIZONTALS, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for name in _COLUMNS[1:]:
        table.add_column(name, justify="right" if name in ("place", "score") else "left", overflow="fold")
    for row, entry in zip(_rows(entries, metric), entries, strict=True):
        style = "bold" if entry.kind == MEASURED else ""
        table.add_row(*(Text(cell, style=style) for cell in row[1:]))
    return table


def as_markdown(entries: Sequence[Entry]) -> str:
    """Return both rankings as Markdown."""
    lines = []
    for metric in METRICS:
        lines += [f"## {metric}", "", "| " + " | ".join(_COLUMNS[1:]) + " |", "|" + "---|" * (len(_COLUMNS) - 1)]
        for row in _rows(entries, metric):
            cells = [markdown_cell(c) for c in row[1:]]
            lines.append("| " + " | ".join(f"**{c}**" if c == MEASURED else c for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def as_csv(entries: Sequence[Entry]) -> str:
    """Return both rankings as CSV with a header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for metric in METRICS:
        writer.writerows(_rows(entries, metric))
    return text.getvalue()


def state_of_the_art(entries: Iterable[Entry], metric: str) -> list[Entry]:
    """Return the published rows that were the best when they came, oldest first."""
    best: list[Entry] = []
    dated = sorted((e for e in entries if e.metric == metric and e.kind == PUBLISHED), key=lambda e: (e.date, -e.score))
    for entry in dated:
        if not best or entry.score > best[-1].score:
            best.append(entry)
    return best


def save_chart(path: Path, entries: Sequence[Entry]) -> None:
    """Draw scores over time, with a line through the best so far; measured ones as stars with their intervals.

    Raises:
        HarnessError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    last = max(_day(e.date) for e in entries)
    for metric, color, marker in zip(METRICS, ("#0072b2", "#d55e00"), ("o", "s"), strict=True):
        rows = [e for e in entries if e.metric == metric]
        published = [e for e in rows if e.kind == PUBLISHED]
        days, values = [_day(e.date) for e in published], [e.score for e in published]
        axes.scatter(days, values, color=color, marker=marker, label=f"{metric}, published", zorder=3)
        best = state_of_the_art(rows, metric)
        axes.step(
            [*(_day(e.date) for e in best), last], [*(e.score for e in best), best[-1].score],
            where="post", color=color, linestyle="-" if metric == "mIoU" else "--", label=f"{metric}, best so far",
        )  # fmt: skip
        for entry in best:  # names of the last year would leave the figure on the right
            side, shift, above = ("right", -7, -4) if _day(entry.date) > last - 365 else ("left", 5, -14)
            above = 7 if metric == METRICS[0] else above  # the two lines come near each other at the end
            axes.annotate(
                entry.system, (_day(entry.date), entry.score), (shift, above),
                textcoords="offset points", fontsize=8, ha=side,
            )  # fmt: skip
    mine = [e for e in entries if e.kind == MEASURED and e.metric == METRICS[0]]
    for number, entry in enumerate(mine):
        low, high = entry.interval or (entry.score, entry.score)
        axes.errorbar(
            [_day(entry.date)], [entry.score], [[max(0.0, entry.score - low)], [max(0.0, high - entry.score)]],
            fmt="*", markersize=14, color="#009e73", zorder=4, label=None if number else "measured here, with interval",
        )  # fmt: skip
    axes.xaxis_date()
    axes.xaxis.set_major_locator(mdates.YearLocator())
    axes.set(ylabel="mIoU, percent", title="ADE20K scene parsing, 2,000 validation images: scores over time")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with replaced(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix.lower().lstrip("."))


def _day(month: str) -> float:
    """Return the first day of YYYY-MM in matplotlib's units."""
    year, number = month.split("-")[:2]
    return float(mdates.date2num(date(int(year), int(number), 1)))
