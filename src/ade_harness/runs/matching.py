"""May two runs be compared? What must be equal, and what the reader must know."""

from __future__ import annotations

from dataclasses import dataclass

from ade_harness.errors import HarnessError
from ade_harness.metrics.areas import ImageAreas, image_areas
from ade_harness.metrics.counts import Row
from ade_harness.runs.finished import FinishedRun


@dataclass(frozen=True)
class Matched:
    """Two runs, cut to the images that both have."""

    first: ImageAreas
    second: ImageAreas
    remarks: tuple[str, ...]
    """What makes the comparison less than one of two complete, equal evaluations."""


def match_runs(first: FinishedRun, second: FinishedRun) -> Matched:
    """Find the images of both runs, and check that they are the same files with the same truth.

    Raises:
        HarnessError: the runs are not comparable: no common images, other files, or other sizes.
    """
    names = f"{first.path} and {second.path}"
    ones, twos = ({row.image_id: row for row in run.rows} for run in (first, second))
    common = [image_id for image_id in ones if image_id in twos]
    if not common:
        raise HarnessError(
            f"{names}: not comparable: they have no image in common (the first images are"
            f" {first.rows[0].image_id} and {second.rows[0].image_id})."
        )
    for image_id in common:
        _check_same(ones[image_id], twos[image_id], names)
    remarks = []
    if len(common) < max(len(ones), len(twos)):
        remarks.append(
            f"compared on the {len(common):,} images that both have: {first.name} has {len(ones):,}, {second.name}"
            f" {len(twos):,}; their own scores are of all of theirs"
        )
    for run in (first, second):
        remarks += [f"{run.name}: {mark}" for mark in run.marks]
    for what, one, two in (
        ("protocols", *(run.config["inference"]["name"] for run in (first, second))),
        ("conventions", *(run.metrics.get("convention") for run in (first, second))),
        ("versions of this package", *(run.manifest["code"]["version"] for run in (first, second))),
    ):
        if one != two:
            shown = f": {one} and {two}" if what != "conventions" else "; mIoU here is computed alike for both"
            remarks.append(f"different {what}{shown}")
    if first.classes.names != second.classes.names:
        raise HarnessError(
            f"{names}: not comparable: their classes differ. Evaluate both with the same dataset.classes."
        )
    classes = len(first.classes)
    one_areas, two_areas = (image_areas([rows[i] for i in common], classes) for rows in (ones, twos))
    if not (one_areas.truth == two_areas.truth).all():
        raise HarnessError(
            f"{names}: not comparable: their ground truths differ. Evaluate both on the same annotations."
        )
    return Matched(one_areas, two_areas, tuple(remarks))


def _check_same(one: Row, two: Row, names: str) -> None:
    if (one.height, one.width) != (two.height, two.width):
        raise HarnessError(
            f"{names}: not comparable: {one.image_id} is {one.width}x{one.height} (width x height) in the first,"
            f" {two.width}x{two.height} in the second. Evaluate both on the same images."
        )
    if one.files_hash != two.files_hash:
        raise HarnessError(
            f"{names}: not comparable: the files of {one.image_id} differ (other pixels or another annotation)."
            " Evaluate both on the same data set."
        )
