"""The leaderboard's rows, as published; none of these numbers is ours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml


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


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """Return the 21 rows in the leaderboard's order: by score, ties by date, the two metrics apart."""
    text = files("ade_harness.leaderboard").joinpath("published.yaml").read_text(encoding="utf-8")
    return tuple(PublishedRow(**row) for row in yaml.safe_load(text))
