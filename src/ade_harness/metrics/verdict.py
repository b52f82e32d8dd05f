"""Is a published score reproduced? Yes, within the interval, or no, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from ade_harness.metrics.bootstrap import Interval


@dataclass(frozen=True)
class Verdict:
    """What a run says about a published mIoU."""

    answer: str
    """yes, within the interval, no, or not comparable."""
    sentence: str


def judge(measured: float, interval: Interval | None, published: float, marks: Sequence[str] = ()) -> Verdict:
    """Compare a measured mIoU with a published one.

    Args:
        measured: fraction 0..1.
        interval: of `measured`.
        published: percent, with the digits of the source: 57.3 is anything that rounds to it.
        marks: what the run's score is not; a run that has any cannot be compared.
    """
    if marks:
        return Verdict("not comparable", f"not comparable with the published {published}: {marks[0]}")
    digits = max(0, -int(Decimal(str(published)).as_tuple().exponent))
    half, away = 0.5 * 10**-digits, 100 * measured - published
    shown = f"{100 * measured:.2f}"
    if abs(away) <= half + 1e-9:
        return Verdict("yes", f"reproduced: {shown} rounds to the published {published:.{digits}f}")
    if interval is not None:
        low, high = 100 * interval.low, 100 * interval.high
        inside = low - half <= published <= high + half
        sentence = f"{shown} is {away:+z.2f} from the published {published:.{digits}f}, which is"
        where = f"the {interval.level:.0%} interval {low:.2f} to {high:.2f}"
        if inside:
            return Verdict(
                "within the interval", f"within the interval, not reproduced to its digits: {sentence} in {where}"
            )
        return Verdict("no", f"not reproduced: {sentence} outside of {where}")
    return Verdict("no", f"not reproduced: {shown} is {away:+z.2f} from the published {published:.{digits}f}")
