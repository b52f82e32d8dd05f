"""Notes when the first rank passes each part of its start; bench_start.py puts this folder on PYTHONPATH.

Python imports it before anything else. Two functions of the package are wrapped as soon as their modules have been
executed, before others import them by name; nothing of the package is imported earlier for it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_BEGUN = time.time()


def _note(moment: str, when: float | None = None) -> None:
    with Path(os.environ["BENCH_START_MOMENTS"]).open("a") as file:
        file.write(f"{moment}\t{when or time.time()}\n")


def _noted_ranks(started: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*arguments: Any, **options: Any) -> Any:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _note("process", _BEGUN)
            _note("imports")
        return started(*arguments, **options)

    return noted


def _noted_work(agreed: Callable[..., Any]) -> Callable[..., Any]:
    def noted(coordinator: Any, place: str, work: Callable[[], Any]) -> Any:
        if coordinator.rank == 0:
            _note(f"before {place}")
        result = agreed(coordinator, place, work)
        if coordinator.rank == 0:
            _note(place)
        return result

    return noted


_WRAPPED = {
    "ade_harness.runtime.ranks": ("started_ranks", _noted_ranks),
    "ade_harness.runtime.coordination": ("agreed", _noted_work),
}


class _Finder:
    """Wraps a function of a module once that has been executed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find as Python does, of the modules that are wrapped."""
        if name not in _WRAPPED:
            return None
        function, wrap = _WRAPPED.pop(name)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: Any) -> None:
            execute(module)
            setattr(module, function, wrap(getattr(module, function)))

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


if "BENCH_START_MOMENTS" in os.environ:
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]
