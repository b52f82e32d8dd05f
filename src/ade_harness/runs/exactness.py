"""The end check of every run: each image counted exactly once (invariant 1 of the design)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ade_harness.errors import HarnessError
from ade_harness.runs.ledger import Row, matrix_of


def check_exact(rows: Sequence[Row], total: npt.NDArray[np.int64], image_ids: Sequence[str]) -> None:
    """Compare the ledger with the data set's ids, and its sum with the sum of the ranks.

    Raises:
        HarnessError: the ledger lacks images, has others, or does not sum to the ranks' matrix.
    """
    recorded, expected = {row.image_id for row in rows}, set(image_ids)
    for what, ids in (("lacks", expected - recorded), ("has unknown", recorded - expected)):
        if ids:
            shown = ", ".join(sorted(ids)[:10])
            raise HarnessError(
                f"The ledger {what} {len(ids)} images ({shown}{', ...' if len(ids) > 10 else ''}): no score."
            )
    from_ledger = matrix_of(rows)
    if not np.array_equal(from_ledger, total):
        wrong = int(np.abs(from_ledger - total).sum())
        raise HarnessError(
            f"The ranks' sum and the ledger differ by {wrong} pixels: no score."
            " An image was counted twice or not at all. Start a new run, and please report this."
        )
