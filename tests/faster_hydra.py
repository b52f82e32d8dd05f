"""What Hydra does again for every command of one process is done once for all tests of it: half of a composition.

1. Hydra's own main composes twice: in `Hydra.get_mode`, and for the job. The mode is null unless an override or a file
   of the user's sets it, so only with those is it read here.
2. Each composition copies the store of all structured configurations, and from that copy each one that it takes.
   Nothing changes the store itself, so the first copy is left out.
3. Each parses the same packaged YAML files by PyYAML's Python code: what a text holds is kept.

`tests/cli/test_hydra.py` reads the mode always, and shows that what is composed is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import omegaconf.omegaconf
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore

_get_mode = Hydra.get_mode


def get_mode(self: Hydra, config_name: str | None, overrides: Sequence[str]) -> Any:
    """Ask Hydra only where the answer may be another than null."""
    own = [e for e in self.config_loader.get_search_path().get_path() if e.provider == "command-line"]
    if own or config_name != "config" or any("hydra" in override for override in overrides):
        return _get_mode(self, config_name, list(overrides))
    return None


@cache
def _parsed(text: str, loader: Any) -> Any:
    return yaml.load(text, loader)


_LOADERS: dict[tuple[Any, ...], Any] = {}


def load(stream: Any, Loader: Any) -> Any:
    """`yaml.load`, whose result is kept by the text; errors name the stream."""
    text = stream if isinstance(stream, str) else stream.read()
    # OmegaConf makes a class of each call, all of them alike
    loader = _LOADERS.setdefault((Loader.__name__, Loader.__mro__[1:]), Loader)
    try:
        parsed = _parsed(text, loader)
    except yaml.YAMLError:
        if stream is not text:
            stream.seek(0)
        return yaml.load(stream, Loader)
    return copy.deepcopy(parsed)


def faster() -> None:
    """Do so in this process."""
    leave_out_modes()
    ConfigStore.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    omegaconf.omegaconf.yaml = SimpleNamespace(**vars(yaml) | {"load": load})  # type: ignore[assignment]


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
    omegaconf.omegaconf.yaml = yaml
