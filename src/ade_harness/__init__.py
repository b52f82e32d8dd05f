"""Exact, distributed evaluation of semantic segmentation on ADE20K.

::

    import ade_harness as ade

    result = ade.evaluate(net, root="data/ADEChallengeData2016", protocol="mmseg_slide_512")
    result.mIoU, result.interval, result.per_class

Everything is imported when it is asked for; ``docs/python.md`` has the rest.
"""

# `python -m ade_harness` puts the working directory first, where an untrusted submission may have a yaml.py or a
# random.py: it is taken away before anything is imported that is not loaded already. A model's own module is looked for
# there when it is asked for (models/formats/python.py). `python -P` does so before Python itself has imported anything.
import os
import sys

# While Python looks for the module to run, sys.argv is ["-m"], whatever options stand before it.
_ours = sys.argv[:1] == ["-m"] and any("ade_harness" in word for word in sys.orig_argv)
try:
    _place = os.getcwd()  # noqa: PTH109
    _here = os.path.realpath(os.path.join("ade_harness", "__init__.py")) == os.path.realpath(__file__)  # noqa: PTH118
except OSError:  # the working directory was deleted, and holds nothing
    _place, _here = "", False
if _ours and sys.path[:1] in ([""], [_place]) and not _here:
    del sys.path[0]
del _here, _ours, _place

import random  # noqa: E402
from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

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
