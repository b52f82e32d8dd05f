"""Did a second run give the same? Label hashes and counts, image by image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ade_harness.config.fields import PATHS
from ade_harness.data.labels import MAX_CLASSES
from ade_harness.errors import HarnessError
from ade_harness.metrics.counts import Row, matrix_of
from ade_harness.runs.directory import differences
from ade_harness.runs.finished import FinishedRun
from ade_harness.runs.record import decided_counts

_ELSEWHERE = (
    *PATHS, "model.id", "model.url", "model.official", "model.hub", "model.backbone", "model.source",
    "model.http.token_env",
)  # fmt: skip
"""Where things lie; their hashes are compared instead."""


@dataclass(frozen=True)
class ImageDifference:
    """One image whose labels are not the same in both runs."""

    image_id: str
    pixels: int
    """Counted pixels with another label: at least so many (labels that swap places within a class do not show)."""
    of: int
    """Counted pixels."""


@dataclass(frozen=True)
class LabelComparison:
    """What a second run says about the first."""

    images: int
    same_labels: int
    """Images whose label maps are equal in every pixel."""
    same_counts: int
    other_files: tuple[str, ...]
    """Images whose own files differ: another data set."""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    different: tuple[ImageDifference, ...]
    """Worst first."""
    first_mIoU: float
    second_mIoU: float
    """Fractions, the runs' own."""

    @property
    def bit_identical(self) -> bool:
        """Whether every label of every image is the same."""
        return self.same_labels == self.same_counts == self.images and not self.only_first and not self.only_second

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.bit_identical:
            return (
                f"bit-identical: the label maps and counts of all {self.images:,} images are equal, and mIoU"
                f" {100 * self.first_mIoU:.2f} in all its digits"
            )
        parts = []
        for missing, which in ((self.only_first, "the first"), (self.only_second, "the second")):
            if missing:
                parts.append(f"{len(missing):,} images are in {which} run alone, such as {missing[0]}")
        if self.other_files:
            parts.append(
                f"{len(self.other_files):,} images are other files (pixels or annotation), such as"
                f" {self.other_files[0]}: not the same data set"
            )
        if self.different:
            pixels, of = sum(d.pixels for d in self.different), sum(d.of for d in self.different)
            worst = self.different[0]
            parts.append(
                f"{len(self.different):,} of {self.images:,} label maps differ, in at least {pixels:,} of their {of:,}"
                f" pixels; most in {worst.image_id} ({worst.pixels:,} of {worst.of:,})"
            )
        away = 100 * (self.second_mIoU - self.first_mIoU)
        return (
            f"not identical: {'; '.join(parts)}; mIoU {100 * self.second_mIoU:.4f} instead of"
            f" {100 * self.first_mIoU:.4f} ({away:+z.4f})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything for a JSON file."""
        return {"bit_identical": self.bit_identical, "verdict": self.verdict, **asdict(self)}


def compare_runs(first: FinishedRun, second: FinishedRun) -> LabelComparison:
    """Compare two runs that should be the same, image by image.

    Raises:
        HarnessError: they share no images.
    """
    ones, twos = ({row.image_id: row for row in run.rows} for run in (first, second))
    common = sorted(ones.keys() & twos.keys())
    if not common:
        raise HarnessError(f"{first.path} and {second.path}: share no images.")
    different = [_difference(ones[i], twos[i]) for i in common if ones[i].label_hash != twos[i].label_hash]
    return LabelComparison(
        images=len(common),
        same_labels=len(common) - len(different),
        same_counts=sum(_same_counts(ones[i], twos[i]) for i in common),
        other_files=tuple(i for i in common if ones[i].content_hash != twos[i].content_hash),
        only_first=tuple(sorted(ones.keys() - twos.keys())),
        only_second=tuple(sorted(twos.keys() - ones.keys())),
        different=tuple(sorted(different, key=lambda d: (-d.pixels, d.image_id))),
        first_mIoU=float(first.metrics["mIoU"]),
        second_mIoU=float(second.metrics["mIoU"]),
    )


def _same_counts(one: Row, two: Row) -> bool:
    return np.array_equal(matrix_of([one], MAX_CLASSES), matrix_of([two], MAX_CLASSES))


def _difference(one: Row, two: Row) -> ImageDifference:
    """Count what must have moved: half of what the confusion matrices differ by."""
    if (one.height, one.width) != (two.height, two.width):
        return ImageDifference(one.image_id, max(one.valid_pixels, two.valid_pixels), one.valid_pixels)
    moved = int(np.abs(matrix_of([one], MAX_CLASSES) - matrix_of([two], MAX_CLASSES)).sum())
    return ImageDifference(one.image_id, (moved + 1) // 2, one.valid_pixels)


def list_differences(one: FinishedRun, two: FinishedRun) -> list[str]:
    """Return what differs between two runs and can change bits: options, code, hashes, software.

    Args:
        one: the earlier run.
        two: the later run.
    """
    identities = [
        {k: v for k, v in {**decided_counts(run.config), **run.manifest["identity"]}.items() if not _is_place(k)}
        for run in (one, two)
    ]
    first, second = one.manifest, two.manifest
    if identities[0].get("checkpoint.sha256") == identities[1].get("checkpoint.sha256") is not None:
        for identity in identities:
            identity.pop("checkpoint.origin", None)  # the same bytes from elsewhere
    for identity, other in (identities, identities[::-1]):  # versions that one of them did not keep yet
        for key in [k for k in identity if k.startswith("environment.") and k not in other]:
            del identity[key]
    found = differences(*identities)
    found += differences(*(_machine(m["environment"]) for m in (first, second)))
    packages = [m["environment"].get("distributions", {}) for m in (first, second)]
    for name in sorted(packages[0].keys() | packages[1].keys()):
        old, new = (p.get(name) or {"version": None, "sha256": None} for p in packages)
        if old["version"] != new["version"]:
            found.append(f"package {name}: was {old['version'] or 'absent'}, is {new['version'] or 'absent'}")
        elif old["sha256"] != new["sha256"]:
            found.append(f"package {name} {old['version']}: other files of the same version")
    return found


def _is_place(key: str) -> bool:
    return any(key == place or key.startswith(f"{place}.") for place in _ELSEWHERE)


def _machine(environment: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("python", "cpu", "cpu_capability", "gpus", "cuda", "driver")
    return {key: environment.get(key) for key in keys}
