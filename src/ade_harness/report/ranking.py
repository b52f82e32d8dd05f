"""Several runs beside each other: ranking, and every pair tested."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ade_harness.files.escapes import one_line
from ade_harness.metrics.bootstrap import Interval, bootstrap
from ade_harness.metrics.comparison import Comparison, Difference, compare, holm
from ade_harness.metrics.confusion import Scores, scores
from ade_harness.runs.finished import FinishedRun
from ade_harness.runs.matching import match_runs
from ade_harness.runtime.console import percent, print_line

MAX_RUNS = 8
_SHOWN = 5


@dataclass(frozen=True)
class Ranked:
    """One of the runs."""

    run: FinishedRun
    name: str
    """Unlike any other's."""
    scores: Scores
    interval: Interval | None
    """The interval of mIoU."""


@dataclass(frozen=True)
class Pair:
    """Two of them, better first; `comparison` is second minus first."""

    first: int
    second: int
    comparison: Comparison
    remarks: tuple[str, ...]

    @property
    def headline(self) -> Difference:
        """The difference of mIoU; corrected for the number of pairs."""
        return self.comparison.scores["mIoU"]

    def changed_images(self, maximum: int) -> list[tuple[str, float]]:
        """Return the images that move the mIoU's difference most, either way, with their influence."""
        influence = self.comparison.influence
        order = np.argsort(-np.abs(influence), kind="stable")[:maximum]
        return [(self.comparison.ids[i], float(influence[i])) for i in order if influence[i] != 0]

    def changed_classes(self) -> list[tuple[int, Difference]]:
        """Return the classes by how much they differ, the most first."""
        return sorted(self.comparison.classes.items(), key=lambda item: (-abs(item[1].value), item[0]))


@dataclass(frozen=True)
class Ranking:
    """Runs from the best to the worst, and all pairs of them."""

    runs: tuple[Ranked, ...]
    pairs: tuple[Pair, ...]


def rank_runs(runs: Sequence[FinishedRun], resamples: int, seed: int, level: float) -> Ranking:
    """Rank runs by mIoU and test every pair.

    Args:
        runs: two or more.
        resamples: of each bootstrap and test.
        seed: of both.
        level: of the intervals.

    Raises:
        HarnessError: two of them are not comparable.
    """
    names = _names(runs)
    ranked = []
    for run, name in zip(runs, names, strict=True):
        intervals = bootstrap(run.areas, resamples, seed).intervals(level) if len(run.rows) > 1 else {}
        ranked.append(Ranked(run, name, scores(run.matrix), intervals.get("mIoU")))
    ranked.sort(key=lambda r: -r.scores.mIoU)
    pairs = []
    for first, second in combinations(range(len(ranked)), 2):
        matched = match_runs(ranked[first].run, ranked[second].run)
        found = compare(matched.first, matched.second, resamples, seed, level)
        pairs.append(Pair(first, second, found, matched.remarks))
    corrected = holm([pair.headline.p_permutation for pair in pairs])
    return Ranking(tuple(ranked), tuple(_corrected(pair, p) for pair, p in zip(pairs, corrected, strict=True)))


def _corrected(pair: Pair, p: float) -> Pair:
    """Put in the p-value of mIoU that holds for all pairs together."""
    table = {**pair.comparison.scores, "mIoU": replace(pair.headline, p_corrected=p)}
    return replace(pair, comparison=replace(pair.comparison, scores=table))


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the models' labels, with the directories' names where labels are equal, numbered if those are too."""
    labels = [run.label for run in runs]
    names = [run.label if labels.count(run.label) == 1 else run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def format_difference(difference: Difference) -> str:
    """Return a difference in points with interval and p-value."""
    interval = difference.interval
    within = f" [{100 * interval.low:+z.2f}, {100 * interval.high:+z.2f}]" if interval else ""
    return f"{100 * difference.value:+z.2f}{within}, p = {format_p_value(difference.p_corrected)}"


def format_p_value(p: float) -> str:
    """Return a p-value for people."""
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"


def print_ranking(console: Console, ranking: Ranking, level: float) -> None:
    """Print the ranking, the pairs, and what differs most."""
    for run in ranking.runs:
        for mark in run.run.marks:
            console.print(Text(f" {one_line(run.name)}: {one_line(mark)} ", style="bold black on yellow"))
    table = Table(title="Runs, best first (percent)", box=None, header_style="bold", pad_edge=False)
    for name in ("", "run", "mIoU", f"{level:.0%} interval", "pixel accuracy", "images", "protocol"):
        table.add_column(name, justify="right" if name in ("mIoU", "pixel accuracy", "images") else "left")
    for place, ranked in enumerate(ranking.runs, 1):
        interval = ranked.interval
        table.add_row(
            str(place), Text(ranked.name), percent(ranked.scores.mIoU),
            f"{percent(interval.low)} to {percent(interval.high)}" if interval else "-",
            percent(ranked.scores.pixel_accuracy), f"{len(ranked.run.rows):,}",
            Text(ranked.run.protocol),
        )  # fmt: skip
    console.print(table)
    for ranked in ranking.runs:
        if ranked.run.verdict:
            print_line(console, f"{ranked.name}: {ranked.run.verdict}")
    for pair in ranking.pairs:
        console.print()
        _print_pair(console, ranking, pair, level)


def _print_pair(console: Console, ranking: Ranking, pair: Pair, level: float) -> None:
    one, two = ranking.runs[pair.first].name, ranking.runs[pair.second].name
    console.print(Text(one_line(f"{two} minus {one}"), style="bold"))
    differs = "they differ" if pair.headline.significant(level) else "no significant difference"
    print_line(console, f"  mIoU {format_difference(pair.headline)}: {differs}")
    accuracy = pair.comparison.scores["pixel_accuracy"]
    print_line(console, f"  pixel accuracy {format_difference(accuracy)}")
    names = ranking.runs[0].run.classes.names
    claimed = [(c, d) for c, d in pair.changed_classes() if d.significant(level)]
    shown = claimed[:_SHOWN] or pair.changed_classes()[:_SHOWN]
    differ = "1 class differs" if len(claimed) == 1 else f"{len(claimed)} classes differ"
    what = f"{differ} (corrected for {len(pair.comparison.classes)} tests)"
    listed = ", ".join(f"{names[c]} {100 * d.value:+z.1f}" for c, d in shown)
    print_line(console, f"  {what}; largest: {listed}")
    images = ", ".join(f"{i} {100 * v:+z.3f}" for i, v in pair.changed_images(_SHOWN))
    print_line(console, f"  images with the largest contribution to the difference: {images or 'none'}")
    for remark in pair.remarks:
        print_line(console, f"  note: {one_line(remark)}", style="yellow")


def ranking_content(ranking: Ranking, level: float) -> dict[str, Any]:
    """Return runs and pairs as plain values, for ``--json``; scores as fractions."""
    runs = [
        {
            "run": str(r.run.path),
            "name": r.name,
            "mIoU": r.scores.mIoU,
            "interval": asdict(r.interval) if r.interval else None,
        }
        for r in ranking.runs
    ]
    pairs = [
        {
            "first": ranking.runs[p.first].name,
            "second": ranking.runs[p.second].name,
            "difference": p.headline.value,
            "interval": asdict(p.headline.interval) if p.headline.interval else None,
            "p_permutation": p.headline.p_permutation,
            "p_corrected": p.headline.p_corrected,
            "differ": p.headline.significant(level),
        }
        for p in ranking.pairs
    ]
    return {"runs": runs, "pairs": pairs}
