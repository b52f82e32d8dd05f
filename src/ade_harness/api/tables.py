"""Runs, read back and put beside each other: ``load_run``, ``compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ade_harness.api.result import Evaluation
from ade_harness.errors import HarnessError
from ade_harness.metrics import comparison
from ade_harness.metrics.bootstrap import LEVEL, RESAMPLES
from ade_harness.runs import finished

if TYPE_CHECKING:
    import pandas as pd


def load_run(path: str | Path) -> Evaluation:
    """Read a finished run, and check that its files are what the run wrote.

    Raises:
        HarnessError: no run, not finished, or damaged.
    """
    if not isinstance(path, str | Path):
        raise HarnessError(f"load_run: {type(path).__name__} given, expected the folder of a run.")
    return Evaluation.of_run(finished.load_run(Path(path).expanduser()))


def compare(
    evaluations: Sequence[Evaluation | str | Path], resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> pd.DataFrame:
    """Put evaluations of the same images into one table; the first is what the others are compared with.

    Args:
        evaluations: two or more, or the folders of runs.
        resamples: of the paired bootstrap, and as many exchanges of the permutation test.
        seed: of both.
        level: of the intervals.

    Returns:
        One row each: ``label``, ``images``, ``mIoU``, ``low``, ``high`` (its own interval), ``difference`` to the
        first with the ends of its paired interval, and ``p`` of a permutation test; fractions.

    Raises:
        HarnessError: fewer than two, or other images, another truth or other classes than the first's.
    """
    if isinstance(evaluations, Evaluation | str | Path):
        raise HarnessError("compare: one evaluation was given, expected a list of two or more.")
    if not 0 < level < 1 or resamples < 1 or seed < 0:
        raise HarnessError(
            f"compare: resamples={resamples}, seed={seed}, level={level}: expected 1 or more, 0 or more, and a number"
            " between 0 and 1."
        )
    found = [one if isinstance(one, Evaluation) else load_run(one) for one in evaluations]
    if len(found) < 2:
        raise HarnessError(f"compare: {len(found)} evaluations were given, expected two or more.")
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for number, one in enumerate(found):
        low, high = one.interval or (np.nan, np.nan)
        row = {"label": one.label, "images": one.images, "mIoU": one.mIoU, "low": low, "high": high}
        row |= dict.fromkeys(("difference", "difference_low", "difference_high", "p"), np.nan)
        if number:
            _check_comparable(found[0], one)
            difference = comparison.compare(found[0].areas, one.areas, resamples, seed, level).scores["mIoU"]
            row |= {"difference": difference.value, "p": difference.p_permutation}
            if difference.interval is not None:
                row |= {"difference_low": difference.interval.low, "difference_high": difference.interval.high}
        rows.append({**row, "marks": "; ".join(one.marks), "run": None if one.run_dir is None else str(one.run_dir)})
    return pd.DataFrame(rows)


def _check_comparable(first: Evaluation, other: Evaluation) -> None:
    names = f"{first.label} and {other.label}: not comparable"
    if first.classes.names != other.classes.names:
        raise HarnessError(f"{names}: their classes differ. Evaluate both on the same data set.")
    ones, twos = [row.image_id for row in first.rows], [row.image_id for row in other.rows]
    if ones != twos:
        alone = sorted(set(ones) ^ set(twos))
        raise HarnessError(
            f"{names}: {len(alone)} images were counted by one alone, such as {alone[0]}. Evaluate both on the same"
            " images."
        )
    for one, two in zip(first.rows, other.rows, strict=True):
        if one.files_hash != two.files_hash:
            raise HarnessError(
                f"{names}: the files of {one.image_id} differ (other pixels or another annotation). Evaluate both on"
                " the same data set."
            )
