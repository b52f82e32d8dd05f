"""progress.json is written by a job that may be of another version, or of somebody else: it is read or it is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ade_harness.runs.progress import read_progress

GOOD: dict[str, Any] = {
    "done": 1, "images": 4, "images_per_second": 0.5, "seconds_left": 6.0, "updated": "2026-11-30T10:00:00+00:00",
    "warnings": [], "ranks": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "is_read"),
    [
        ({}, True),
        ({"seconds_left": None}, True),
        ({"updated": "2026-11-30T10:00:00"}, False),  # no zone: nobody knows how old it is
        ({"updated": "yesterday"}, False),
        ({"done": "1"}, False),
        ({"ranks": [{"rank": 0}]}, False),
    ],
)
def test_what_says_how_far_a_run_is(tmp_path: Path, change: dict[str, Any], is_read: bool) -> None:
    (tmp_path / "progress.json").write_text(json.dumps({**GOOD, **change}))
    assert (read_progress(tmp_path) is not None) == is_read
