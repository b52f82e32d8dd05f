"""What Hydra does again for every command of one process is done once for all tests of it: most of a composition.

1. Hydra's own main composes twice: in `Hydra.get_mode`, and for the job. The mode is null unless an override or a file
   of the user's sets it, so only with those is it read here.
2. Each composition copies the store of all structured configurations, and from that copy each one that it takes.
   Nothing changes the store itself, so the first copy is left out.
3. The same choices of groups from the same files compose the same tree, to which the other overrides are applied: the
   tree is kept by choices and files (name, time, size), and copied.
4. A file that has not changed is parsed once, and what it holds copied.

`tests/cli/test_hydra.py` reads the mode always, and shows that what is composed is the same.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

_get_mode = Hydra.get_mode
_create_defaults_list = config_loader_impl.create_defaults_list
_compose_defaults = ConfigLoaderImpl._compose_config_from_defaults_list
_load_file = FileConfigSource.load_config


def get_mode(self: Hydra, config_name: str | None, overrides: Sequence[str]) -> Any:
    """Ask Hydra only where the answer may be another than null."""
    own = [e for e in self.config_loader.get_search_path().get_path() if e.provider == "command-line"]
    if own or config_name != "config" or any("hydra" in override for override in overrides):
        return _get_mode(self, config_name, list(overrides))
    return None


def _stamp(folder: str) -> list[tuple[str, int, int]]:
    """Return names, times and sizes of all files of a folder."""
    files = (Path(place, name) for place, _, names in os.walk(folder) for name in names)
    found = ((str(file), file.lstat()) for file in files)
    return sorted((name, status.st_mtime_ns, status.st_size) for name, status in found)


def _nodes(repo: dict[str, Any]) -> list[int]:
    """Return what the store of structured configurations holds."""
    return [n for v in repo.values() for n in (_nodes(v) if isinstance(v, dict) else [id(v)])]


@dataclass
class _Kept:
    defaults: list[Any]
    tree: Any
    overrides: Overrides
    composed: DictConfig | None = None


class _Defaults(list[Any]):
    """A defaults list that knows where its tree is kept."""

    kept: _Kept


_KEPT: dict[Any, _Kept] = {}
_MAX_KEPT = 64
"""A tree takes half a megabyte."""


def create_defaults_list(
    repo: Any, config_name: str | None, overrides_list: list[Any], prepend_hydra: bool, skip_missing: bool
) -> DefaultsList:
    """Return the defaults list of choices, from earlier where nothing has changed."""
    asked = Overrides(repo, overrides_list)
    others = {id(override) for override in asked.config_overrides}
    files = tuple((s.scheme(), s.path, *(_stamp(s.path) if s.scheme() == "file" else ())) for s in repo.get_sources())
    choices = tuple(o.input_line for o in overrides_list if id(o) not in others and not o.is_sweep_override())
    key = (config_name, choices, prepend_hydra, skip_missing, files, tuple(_nodes(ConfigStore.instance().repo)))
    if key not in _KEPT:
        made = _create_defaults_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
        while len(_KEPT) >= _MAX_KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = _Kept(made.defaults, made.defaults_tree, made.overrides)
    kept = _KEPT[key]
    defaults = _Defaults(kept.defaults)
    defaults.kept = kept
    return DefaultsList(
        defaults=defaults, config_overrides=asked.config_overrides, defaults_tree=kept.tree, overrides=kept.overrides
    )


def load_file(self: FileConfigSource, config_path: str) -> ConfigResult:
    """Return what a file holds, from earlier where it has not changed."""
    path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))  # noqa: PTH118
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return _load_file(self, config_path)
    key = (self.path, self.provider, path, status.st_ino, status.st_mtime_ns, status.st_size)
    if key not in _FILES:
        _FILES[key] = _load_file(self, config_path)
    return replace(_FILES[key], config=copy.deepcopy(_FILES[key].config))


_FILES: dict[Any, ConfigResult] = {}


def compose_defaults(self: ConfigLoaderImpl, defaults: list[Any], repo: Any) -> DictConfig:
    """Return a copy of the tree that a defaults list composes."""
    if not isinstance(defaults, _Defaults):
        return _compose_defaults(self, defaults, repo)
    if defaults.kept.composed is None:
        defaults.kept.composed = _compose_defaults(self, defaults, repo)
    return copy.deepcopy(defaults.kept.composed)


def faster() -> None:
    """Do so in this process."""
    leave_out_modes()
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    config_loader_impl.create_defaults_list = create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_defaults  # type: ignore[assignment,method-assign]
    FileConfigSource.load_config = load_file  # type: ignore[method-assign]


def leave_out_modes() -> None:
    """Do the first of the three."""
    Hydra.get_mode = get_mode  # type: ignore[method-assign]


def read_modes() -> None:
    """Let Hydra compose twice again."""
    Hydra.get_mode = _get_mode  # type: ignore[method-assign]


def as_released() -> None:
    """Let Hydra do it all again."""
    read_modes()
    if "__deepcopy__" in vars(ConfigStore):
        del ConfigStore.__deepcopy__  # type: ignore[attr-defined]
    config_loader_impl.create_defaults_list = _create_defaults_list
    ConfigLoaderImpl._compose_config_from_defaults_list = _compose_defaults  # type: ignore[method-assign]
    FileConfigSource.load_config = _load_file  # type: ignore[method-assign]
