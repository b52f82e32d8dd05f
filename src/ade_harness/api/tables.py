"""Runs, read back and put beside each other: ``load_run``, ``compare``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ade_harness.api.arguments import whole_number
from ade_harness.api.result import Evaluation
from ade_harness.errors import ArgumentError, HarnessError
from ade_harness.files.reading import expanded
from ade_harness.metrics import comparison
from ade_harness.metrics.bootstrap import LEVEL, MAX_RESAMPLES, RESAMPLES
from ade_harness.runs import finished
from ade_harness.runs.matching import match_rows

if TYPE_CHECKING:
    import pandas as pd


def load_run(path: str | Path) -> Evaluation:
    """Read a finished run, and check that its files are what the run wrote.

    Raises:
        HarnessError: no run, not finished, or damaged.
    """
    if not isinstance(path, str | Path):
        raise HarnessError(f"load_run: {type(path).__name__} given, expected the folder of a run.")
    return Evaluation.of_run(finished.load_run(expanded(path)))


def compare(
    evaluations: Sequence[Evaluation | str | Path], resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> pd.DataFrame:
    """Put evaluations into one table; the others are compared with the first on the images that both have.

    Args:
        evaluations: two or more, or the folders of runs.
        resamples: of the paired bootstrap, and as many exchanges of the permutation test.
        seed: of both.
        level: of the intervals.

    Returns:
        One row each: ``label``, ``dataset``, ``protocol``, ``precision``, ``images``,
        ``common`` (of them, those that the first has too), ``mIoU``, ``low``,
        ``high`` (its own interval), ``difference`` to the first on the common images with the ends of its paired
        interval, and ``p`` of a permutation test; fractions.

    Raises:
        HarnessError: fewer than two; or no image of the first's, another truth or other classes.
    """
    if isinstance(evaluations, Evaluation | str | Path) or not isinstance(evaluations, Iterable):
        raise HarnessError("compare: one evaluation was given, expected a list of two or more.")
    whole_number("compare: resamples", resamples, 1)
    if resamples > MAX_RESAMPLES:
        raise ArgumentError(f"compare: resamples={resamples}: expected {MAX_RESAMPLES:,} at most.")
    whole_number("compare: seed", seed, 0)
    if not isinstance(level, float) or not 0 < level < 1:
        raise HarnessError(f"compare: level={level!r}: expected a number between 0 and 1, such as 0.95.")
    found = [one if isinstance(one, Evaluation) else load_run(one) for one in evaluations]
    if len(found) < 2:
        raise HarnessError(f"compare: {len(found)} evaluations were given, expected two or more.")
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for number, one in enumerate(found):
        low, high = one.interval or (np.nan, np.nan)
        row = {
            "label": one.label,
            "dataset": one.dataset,
            "protocol": one.protocol,
            "precision": one.precision,
            "images": one.images,
            "common": one.images,
            "mIoU": one.mIoU,
        }
        row |= {"low": low, "high": high}
        row |= dict.fromkeys(("difference", "difference_low", "difference_high", "p"), np.nan)
        if number:
            names = f"{found[0].label} and {one.label}"
            areas = match_rows(found[0].rows, one.rows, (found[0].classes, one.classes), names)
            difference = comparison.compare(*areas, resamples, seed, level).scores["mIoU"]
            row |= {"common": len(areas[0].ids), "difference": difference.value, "p": difference.p_permutation}
            if difference.interval is not None:
                row |= {"difference_low": difference.interval.low, "difference_high": difference.interval.high}
        rows.append({**row, "marks": "; ".join(one.marks), "run": None if one.run_dir is None else str(one.run_dir)})
    return pd.DataFrame(rows)
