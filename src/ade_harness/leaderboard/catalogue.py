"""The leaderboard's rows, as published; none of these numbers is ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

import yaml
from rich.console import Console
from rich.table import Table

_WEIGHTS = {
    "official": "public",
    "official sibling": "sibling public",
    "third party": "third party",
    "head to be trained": "no head public",
    "never published": "never published",
}
"""How the table says whether weights for a row are public."""


@dataclass(frozen=True)
class PublishedRow:
    """One row of the public leaderboard, and what its source says."""

    metric: str
    """The leaderboard's metric name: mIoU or miou."""
    system: str
    org: str
    date: str
    """YYYY-MM."""
    score: float
    """Percent, what the leaderboard prints."""
    paper: str
    config: str
    """Name of the model configuration."""
    source: str
    source_score: float | None
    """Percent, what the source says about this system, if it has such a number."""
    source_note: str
    checkpoint_status: str
    """official, official sibling, third party, head to be trained, or never published."""


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return the 21 rows in the leaderboard's order: by score, ties by date, the two metrics apart."""
    text = files("ade_harness.leaderboard").joinpath("published.yaml").read_text(encoding="utf-8")
    return tuple(PublishedRow(**row) for row in yaml.safe_load(text))


def print_catalogue(console: Console, ready: Sequence[str]) -> None:
    """Print the leaderboard with what can be run, then the other configurations.

    Args:
        console: where to.
        ready: names of the model configurations that there are.
    """
    table = Table(title="ADE20K leaderboard, as published by others: percent, nothing here was measured by this tool")
    for name in ("system", "label", "source says", "source", "weights", "model=", "ready"):
        justify: Literal["left", "right"] = "right" if name in ("label", "source says") else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name != "system")
    for row in published_rows():
        source = "-" if row.source_score is None else f"{row.source_score:.1f}"
        is_ready = "yes" if row.config in ready else "not yet"
        weights = _WEIGHTS[row.checkpoint_status]
        label = f"{row.score:.1f} {row.metric}"
        table.add_row(row.system, label, source, row.paper, weights, row.config, is_ready)
    console.print(table)
    others = [name for name in ready if name not in {r.config for r in published_rows()}]
    console.print(f"\nOther models: {', '.join(others)}", highlight=False, markup=False)
