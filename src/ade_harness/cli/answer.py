"""The result of a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """The end of a command."""

    content: Mapping[str, Any] | None = None
    """What ``--json`` prints; None: the command has no such answer."""
    code: int = 0
    """Exit code of the process."""
