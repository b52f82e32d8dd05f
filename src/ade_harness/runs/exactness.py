"""The end checks of every run: each image counted exactly once, with all its pixels (invariant 1 of the design)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ade_harness.errors import HarnessError
from ade_harness.metrics.counts import Row, matrix_of
from ade_harness.runtime.notes import resume_command


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
    from_ledger = matrix_of(rows, len(total))
    if not np.array_equal(from_ledger, total):
        wrong = int(np.abs(from_ledger - total).sum())
        raise HarnessError(
            f"The ranks' sum and the ledger differ by {wrong} pixels: no score."
            " An image was counted twice or not at all. Start a new run, and please report this."
        )


def check_rows(rows: Sequence[Row], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Compare each row with itself and with its image: all pixels are counted or ignored.

    Raises:
        HarnessError: names the first row whose counts are not those of an image of its size.
    """
    for row in rows:
        counted = int(row.pixels.sum())
        size = sizes.get(row.image_id, (row.height, row.width))
        if (row.height, row.width) != tuple(size):
            found, expected = f"{row.width}x{row.height}", f"{size[1]}x{size[0]}"
            raise HarnessError(f"{row.image_id}: the ledger has it as {found}, the file is {expected}: no score.")
        if counted != row.valid_pixels or counted + row.ignored_pixels != row.height * row.width:
            raise HarnessError(
                f"{row.image_id}: {counted} pixels are counted, {row.valid_pixels} are valid and {row.ignored_pixels}"
                f" ignored, of {row.height * row.width}: no score. Start a new run, and please report this."
            )


def incomplete(failures: Mapping[str, str], counted: int, images: int, run_dir: Path) -> str:
    """Return the message of a run that has no score because images failed.

    Args:
        failures: why, by image id.
        counted: images in the ledger.
        images: of the data set.
        run_dir: of the run.
    """
    unique = {message: image_id for image_id, message in sorted(failures.items())}
    shown = [m if i in m else f"{i}: {m}" for m, i in list(unique.items())[:5]]
    more = f"\n... and {len(failures) - 5} more" if len(unique) > 5 else ""
    return (
        "\n".join(shown)
        + more
        + f"\nNo score: {counted} of {images} images are counted. They are kept: after fixing this,"
        f" `{resume_command(run_dir)}` evaluates the others; run.on_error=skip would leave out images that fail."
    )
