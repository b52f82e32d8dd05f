"""May two runs be compared? What must be equal, and what the reader must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ade_harness.config.plain import flatten
from ade_harness.data.labels import Classes
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
    one_areas, two_areas = match_rows(first.rows, second.rows, (first.classes, second.classes), names)
    remarks = []
    if len(one_areas.ids) < max(len(first.rows), len(second.rows)):
        remarks.append(
            f"compared on the {len(one_areas.ids):,} images common to both runs ({first.name}: {len(first.rows):,},"
            f" {second.name}: {len(second.rows):,}); each run's own score covers all its images"
        )
    for run in (first, second):
        remarks += [f"{run.name}: {mark}" for mark in run.marks]
    for what, one, two in (
        ("protocols", *(run.protocol for run in (first, second))),
        ("conventions", *(run.metrics.get("convention") for run in (first, second))),
        ("versions of this package", *(run.manifest["code"]["version"] for run in (first, second))),
    ):
        if one != two:
            shown = f": {one} and {two}" if what != "conventions" else "; mIoU here is computed alike for both"
            remarks.append(f"different {what}{shown}")
    names_alike = first.protocol == second.protocol
    changed = different_fields(first.config["inference"], second.config["inference"])
    if names_alike and changed:
        remarks.append(f"different protocols of one name, {first.protocol}: {', '.join(changed)}")
    return Matched(one_areas, two_areas, tuple(remarks))


_OF_PROTOCOL = ("exif", "resize", "mode", "window", "tta", "masks", "output")
"""What decides what is computed, beside batches and precision."""


def different_fields(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Return the fields of two protocols that differ, by dotted keys."""
    first, second = ({key: node[key] for key in _OF_PROTOCOL if key in node} for node in (one, two))
    flat, other = flatten(first), flatten(second)
    return sorted(key for key in flat.keys() & other.keys() if flat[key] != other[key])


def match_rows(
    first: Sequence[Row], second: Sequence[Row], classes: tuple[Classes, Classes], names: str
) -> tuple[ImageAreas, ImageAreas]:
    """Return the areas of two evaluations in the images that both have, in the order of the first.

    Args:
        first: its ledger.
        second: the other's.
        classes: of each.
        names: of both, for messages.

    Raises:
        HarnessError: they are not comparable: other classes, no common images, other files, or other sizes.
    """
    if classes[0].names != classes[1].names:
        raise HarnessError(
            f"{names}: not comparable: their classes differ. Evaluate both on the same data set, with the same"
            " dataset.classes."
        )
    ones, twos = ({row.image_id: row for row in rows} for rows in (first, second))
    common = [image_id for image_id in ones if image_id in twos]
    if not common:
        raise HarnessError(
            f"{names}: not comparable: they share no images (the first images are {first[0].image_id} and"
            f" {second[0].image_id})."
        )
    for image_id in common:
        _check_same(ones[image_id], twos[image_id], names)
    one_areas, two_areas = (image_areas([rows[i] for i in common], len(classes[0])) for rows in (ones, twos))
    if not (one_areas.truth == two_areas.truth).all():
        raise HarnessError(
            f"{names}: not comparable: their ground truths differ. Evaluate both on the same annotations."
        )
    return one_areas, two_areas


def _check_same(one: Row, two: Row, names: str) -> None:
    if (one.height, one.width) != (two.height, two.width):
        raise HarnessError(
            f"{names}: not comparable: {one.image_id} is {one.width}x{one.height} (width x height) in the first,"
            f" {two.width}x{two.height} in the second. Evaluate both on the same images."
        )
    if one.content_hash != two.content_hash:
        raise HarnessError(
            f"{names}: not comparable: the files of {one.image_id} differ (other pixels or another annotation)."
            " Evaluate both on the same data set."
        )
