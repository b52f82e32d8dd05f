"""Import Lightning in a rank without what its import drags in and an evaluation never uses.

``import lightning`` brings the compiler (torch._dynamo, for one class and a decorator) and, by torchmetrics, of which
it needs two classes, all other metrics, transformers' models, SciPy's signal processing and matplotlib: most of its own
time, in each of a node's ranks. While it is imported here, stand-ins give those names.

torchmetrics stays one afterwards: any other name of it runs its ``__init__`` at that moment, as if nothing had been put
off (the lazy modules of PEP 562, applied from outside). The others are taken away again, and what has kept one of their
names finds the real thing behind it once that has been imported. `benchmarks/bench_start.py` measures it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import version
from types import ModuleType
from typing import Any

_METRICS, _PLOT, _COMPILER = "torchmetrics", "torchmetrics.utilities.plot", "torch._dynamo"
_LIGHT = {"Metric": "metric", "MetricCollection": "collections"}


class _LazyPackage(ModuleType):
    """A package whose ``__init__`` runs when a public name is asked for that is not in `_LIGHT`.

    Private names are what tools look for in any object (inspect, pytest, doctest): none of them wants a metric.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _LIGHT:
            importlib.import_module(f"{_METRICS}.utilities")  # first: the two import each other
            found = getattr(importlib.import_module(f"{_METRICS}.{_LIGHT[name]}"), name)
            setattr(self, name, found)
            return found
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None
        assert self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


class _Compiled(type):
    """The type of `OptimizedModule` as Lightning knows it: instances are those of the real class."""

    def __instancecheck__(cls, instance: Any) -> bool:
        real = sys.modules.get(_COMPILER)  # without it nothing can be compiled
        return real is not None and isinstance(instance, real.OptimizedModule)


def import_lightning() -> None:
    """Import ``lightning.pytorch`` without the compiler and torchmetrics' metrics; does nothing where it is imported.

    The stand-ins follow what Lightning 2.6 and torchmetrics 1.9 ask of these modules. Where another version asks for
    more, its import fails, and it is imported once more as it is.
    """
    if "lightning.pytorch" in sys.modules:
        return
    import torch

    before = set(sys.modules)
    try:
        with _stand_ins(torch):
            importlib.import_module("lightning.pytorch")
    except (ImportError, AttributeError):
        for name in set(sys.modules) - before:
            if name.startswith(("lightning", _METRICS)):
                del sys.modules[name]
        importlib.import_module("lightning.pytorch")


@contextmanager
def _stand_ins(torch: Any) -> Iterator[None]:
    _put_off_metrics()
    given: dict[str, ModuleType] = {}
    if _COMPILER not in sys.modules:
        given[_COMPILER] = ModuleType(_COMPILER)
        given[_COMPILER].OptimizedModule = _Compiled("OptimizedModule", (), {})  # type: ignore[attr-defined]
    if isinstance(sys.modules.get(_METRICS), _LazyPackage):
        given[_PLOT] = _Plots(_PLOT)
    disable = torch.compiler.disable
    if _COMPILER in given:
        torch.compiler.disable = _disabled
    sys.modules.update(given)
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name, module in given.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do what ``torch.compiler.disable`` does, from the moment on in which something can be compiled."""

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> Any:
        if _COMPILER not in sys.modules:
            return function(*arguments, **options)
        return sys.modules[_COMPILER].disable(function)(*arguments, **options)

    return called


class _Plots(ModuleType):
    """Stands in for torchmetrics' plots, which import matplotlib: its types are any, its functions the real ones."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name.startswith("_"):  # types of matplotlib, for annotations
            return Any

        def real(*arguments: Any, **options: Any) -> Any:
            return getattr(importlib.import_module(_PLOT), name)(*arguments, **options)

        return real


def _put_off_metrics() -> None:
    spec = importlib.util.find_spec(_METRICS) if _METRICS not in sys.modules else None
    if spec is None or spec.submodule_search_locations is None:
        return
    package: Any = _LazyPackage(_METRICS)
    package.__spec__, package.__file__, package.__loader__ = spec, spec.origin, spec.loader
    package.__path__ = list(spec.submodule_search_locations)
    package.__version__ = version(_METRICS)  # Lightning compares it
    package._logger = logging.getLogger(_METRICS)
    sys.modules[_METRICS] = package
