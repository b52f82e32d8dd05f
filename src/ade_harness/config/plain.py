"""Configurations as plain values: for files, and for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import Enum, StrEnum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from ade_harness.config.fields import hints_of


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration, or a node of it, as nested dictionaries of plain values; Enums by their names."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_plain(below) for below in value]
    return str(value) if isinstance(value, StrEnum) else value


def typed(kind: Any, value: Any) -> Any:
    """Return what :func:`as_dict` made plain, as it was.

    Args:
        kind: a dataclass, or the type of one of its fields.
        value: plain values of it; of a dataclass every field.
    """
    if value is None or kind is Any:
        return value
    if get_origin(kind) in (Union, UnionType):
        [inner] = [k for k in get_args(kind) if k is not NoneType]
        return typed(inner, value)
    if get_origin(kind) is list:
        return [typed(get_args(kind)[0], below) for below in value]
    if is_dataclass(kind):
        made: Any = kind
        hints = hints_of(made)
        return made(**{f.name: typed(hints[f.name], value[f.name]) for f in fields(kind)})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    return float(value) if kind is float else value


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}.{key}" if prefix else key
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat
