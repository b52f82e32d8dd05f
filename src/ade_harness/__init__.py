"""Exact, distributed evaluation of ADE20K scene parsing.

::

    import ade_harness as ade

    result = ade.evaluate(net, root="data/ADEChallengeData2016", protocol="mmseg_slide_512")
    result.mIoU, result.interval, result.per_class

Everything is imported when it is asked for; ``docs/python.md`` has the rest.
"""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ade_harness import errors as errors
    from ade_harness import metrics as metrics
    from ade_harness.api import Evaluation, Segmenter, compare, evaluate, load_model, load_run
    from ade_harness.api.callback import ADE20KEvaluation
    from ade_harness.errors import HarnessError
    from ade_harness.runs.overview import runs

_FROM = {
    **dict.fromkeys(("Evaluation", "Segmenter", "compare", "evaluate", "load_model", "load_run"), "api"),
    "ADE20KEvaluation": "api.callback",
    "HarnessError": "errors",
}
_MODULES = ("errors", "metrics", "runs")

__all__ = [
    "ADE20KEvaluation", "Evaluation", "HarnessError", "Segmenter", "__version__", "compare", "errors", "evaluate",
    "load_model", "load_run", "metrics", "runs",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name in _FROM:
        drawn = random.getstate()  # some libraries draw random numbers when they are imported
        found = getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
        random.setstate(drawn)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
