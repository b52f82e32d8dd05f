"""Leave out the composition that Hydra makes of every command only to read ``hydra.mode`` (a quarter of a short command).

Hydra's own main composes twice: in `Hydra.get_mode`, and for the job. The mode is null unless an override or a file of the
user's sets it, so only with those is it read here. `tests/cli/test_hydra.py` asks Hydra itself, always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.hydra import Hydra

_get_mode = Hydra.get_mode


def leave_out_modes() -> None:
    """Do so in this process."""

    def get_mode(self: Hydra, config_name: str | None, overrides: Sequence[str]) -> Any:
        own = [e for e in self.config_loader.get_search_path().get_path() if e.provider == "command-line"]
        if own or config_name != "config" or any("hydra" in override for override in overrides):
            return _get_mode(self, config_name, list(overrides))
        return None

    Hydra.get_mode = get_mode  # type: ignore[method-assign]


def read_modes() -> None:
    """Let Hydra compose twice again."""
    Hydra.get_mode = _get_mode  # type: ignore[method-assign]
