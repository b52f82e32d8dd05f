"""A composed configuration with what else can be known of it: made once, handed to every rank."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ade_harness.config.plain import as_dict, typed
from ade_harness.config.schema import Config


@dataclass(frozen=True)
class Composed:
    """What a run is made from."""

    config: Config
    repeat: list[str] | None
    """Overrides that compose it again: :func:`ade_harness.config.overrides.overrides_of`."""
    changes: list[str]
    """Fields of its protocol that were changed: :func:`ade_harness.config.compose.protocol_changes`."""

    @staticmethod
    def from_config(config: Config) -> Composed:
        """Return a configuration with all that; composes its packaged files once more."""
        # here: ranks take what is composed, and need not import Hydra
        from ade_harness.config.compose import protocol_changes
        from ade_harness.config.overrides import overrides_of

        return Composed(config, overrides_of(config), protocol_changes(config))

    def as_json(self, **more: Any) -> str:
        """Return it for :meth:`from_json`, with `more` keys of the caller's."""
        return json.dumps({"config": as_dict(self.config), "repeat": self.repeat, "changes": self.changes, **more})

    @staticmethod
    def from_json(content: dict[str, Any]) -> Composed:
        """Return what :meth:`as_json` wrote; the configuration was checked before."""
        return Composed(typed(Config, content["config"]), content["repeat"], content["changes"])
