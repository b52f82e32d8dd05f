"""The run directory: what is in it, who may write to it, and how it is read again.

The package can be called: ``ade_harness.runs("runs")`` is the table of all runs below a folder. It is the module itself
that is called, because a function of this name in ``ade_harness`` would hide the package, or be hidden by it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


class _Runs(ModuleType):
    def __call__(self, *folders: str | Path) -> pd.DataFrame:
        """Return the table of runs: see :func:`ade_harness.runs.overview.runs`."""
        from ade_harness.runs.overview import runs

        return runs(*folders)


sys.modules[__name__].__class__ = _Runs
