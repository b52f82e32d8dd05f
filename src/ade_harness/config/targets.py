"""Whether a ``_target_`` can be imported, found without running anybody's code."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ade_harness.errors import HarnessError

_MAKES_NAMES = re.compile(r"import\s+\*|__getattr__|globals\(|setattr\(|sys\.modules|\bexec\(|\bvars\(")
"""A file with one of these may have more names than its text shows."""


def require_target(target: str) -> None:
    """Refuse an import path that leads nowhere, as far as files show: a module of a sweep's last job is looked for now.

    Args:
        target: ``package.module.Name``.

    Raises:
        HarnessError: no such module, or its file nowhere has the name.
    """
    top, *others = target.split(".")
    spec = _top(top)
    if spec is None:
        raise HarnessError(
            f"model._target_={target}: there is no module {top!r}. Expected package.module.Name, importable from"
            f" {Path.cwd()} or installed."
        )
    place = top
    for name in others:
        below = _below(spec, f"{place}.{name}")
        if below is None:
            if not _has_name(spec, name):
                raise HarnessError(f"model._target_={target}: {spec.origin} defines no {name!r}.")
            return
        spec, place = below, f"{place}.{name}"


def _top(name: str) -> ModuleSpec | None:
    if name in sys.modules:
        return sys.modules[name].__spec__ or importlib.util.spec_from_loader(name, None)
    # as Python looks: a package that is installed takes precedence over a plain folder in the working directory
    with suppress(ValueError, ImportError):
        return PathFinder.find_spec(name, [str(Path.cwd()), *sys.path]) or importlib.util.find_spec(name)
    return None


def _below(spec: ModuleSpec, name: str) -> ModuleSpec | None:
    places: Sequence[str] | None = spec.submodule_search_locations
    return None if places is None else PathFinder.find_spec(name, list(places))


def _has_name(spec: ModuleSpec, name: str) -> bool:
    """Whether a module may have a name: what is no Python file, or makes names as it is imported, may have any."""
    if spec.origin is None or not spec.origin.endswith(".py"):
        return True
    try:
        text = Path(spec.origin).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return True
    return bool(re.search(rf"\b{re.escape(name)}\b", text) or _MAKES_NAMES.search(text))
