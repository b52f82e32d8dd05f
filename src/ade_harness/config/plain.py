"""Configurations as plain values: for files, and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

import yaml


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration, or a node of it, as nested dictionaries of plain values; Enums by their names."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def as_yaml(content: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_plain(below) for below in value]
    return str(value) if isinstance(value, StrEnum) else value
