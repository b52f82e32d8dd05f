"""Start a rank without what Lightning's import drags in and an evaluation never uses.

``import lightning`` needs two classes of torchmetrics. torchmetrics' own ``__init__`` imports all its metrics, and with
them transformers' models and SciPy's signal processing: half of the time that Lightning takes, in each of a node's
ranks. Here the package stands in ``sys.modules`` before its ``__init__`` has run, and gives those names from its
submodules; any other name runs the ``__init__`` at that moment, as if nothing had been put off (the lazy modules of
PEP 562, applied from outside). `benchmarks/bench_start.py` measures it. The compiler, torch._dynamo, is most of the
rest of Lightning's import; Lightning uses it as a decorator, so that it cannot be put off.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

_PACKAGE = "torchmetrics"
_LIGHT = {"Metric": "metric", "MetricCollection": "collections"}


class _LazyPackage(ModuleType):
    """A package whose ``__init__`` runs when a name is asked for that is not in `_LIGHT`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _LIGHT:
            importlib.import_module(f"{_PACKAGE}.utilities")  # first: the two import each other
            found = getattr(importlib.import_module(f"{_PACKAGE}.{_LIGHT[name]}"), name)
            setattr(self, name, found)
            return found
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def put_off_metrics() -> None:
    """Let the next ``import lightning`` leave out the metrics of torchmetrics; does nothing where it is imported."""
    spec = importlib.util.find_spec(_PACKAGE) if _PACKAGE not in sys.modules else None
    if spec is None or spec.submodule_search_locations is None:
        return
    package: Any = _LazyPackage(_PACKAGE)
    package.__spec__, package.__file__, package.__loader__ = spec, spec.origin, spec.loader
    package.__path__ = list(spec.submodule_search_locations)
    package.__version__ = version(_PACKAGE)  # Lightning compares it
    package._logger = logging.getLogger(_PACKAGE)
    sys.modules[_PACKAGE] = package
