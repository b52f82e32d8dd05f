"""How evenly the ranks were busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ade_harness.runtime.watchdog import Beat


@dataclass(frozen=True)
class RankShare:
    """What one rank did."""

    rank: int
    host: str
    done: int
    """Progress, such as images."""
    busy_seconds: float
    """Spent on items."""
    active_seconds: float
    """From the start until this rank had nothing to do any more."""

    @staticmethod
    def of(beat: Beat, active_seconds: float) -> RankShare:
        """Return the share of the rank that reported `beat`."""
        return RankShare(beat.rank, beat.host, beat.done, beat.busy_seconds, active_seconds)


@dataclass(frozen=True)
class Balance:
    """All ranks' shares."""

    shares: tuple[RankShare, ...]

    @property
    def efficiency(self) -> float:
        """Mean over maximum of the ranks' active time: 1 if all end together."""
        max_active_seconds = max(share.active_seconds for share in self.shares)
        return fmean(share.active_seconds for share in self.shares) / max_active_seconds if max_active_seconds else 1.0

    @property
    def idle_seconds(self) -> float:
        """How long a rank waited for the last one, on average."""
        max_active_seconds = max(share.active_seconds for share in self.shares)
        return fmean(max_active_seconds - share.active_seconds for share in self.shares)


def measure_balance(shares: Sequence[RankShare]) -> Balance:
    """Collect the ranks' shares, in the order of ranks."""
    return Balance(tuple(shares))
