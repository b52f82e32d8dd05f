"""Read JSON and YAML that somebody else may have written: bounded in size and depth, of the shape that is expected.

One way for every text file of a run directory and of a submission. What is wrong is one message: the file, the field,
what was expected. Texts come back without control characters, which could change what a terminal shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ade_harness.errors import HarnessError
from ade_harness.files.escapes import escaped
from ade_harness.files.reading import read_regular

MAX_TEXT_BYTES = 2**24
_MAX_DEPTH = 40
_MAX_NODES = 100_000
"""Values of a YAML text, which take a second to read: the ids of all of ADE20K's images are a quarter of them."""
_MAX_DIGITS = 70
"""Digits of a whole number: 64 binary ones, and their sign and underscores."""
_MAX_FLOAT = 1e300

Shape = Any
"""What a value may be: a type, a tuple of types, ``[shape]`` for a list, a mapping of keys to shapes, or an
:class:`OrNull` of one of these. A key that ends with "?" may be missing, and null if it is no list or mapping; the
key "*" stands for all others. Other keys may have any value."""


@dataclass(frozen=True)
class OrNull:
    """A shape, or null."""

    shape: Shape


class Moment:
    """A date, with or without a time, as ISO 8601 writes it."""


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`; whole, if `low` is."""

    low: float
    high: float


def read_json(path: Path, shape: Shape = dict, maximum: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        shape: what is expected.
        maximum: bytes that it may have.

    Raises:
        HarnessError: it cannot be read, or is damaged.
    """
    return checked(parse_json(_text(path, maximum), str(path)), shape, str(path))


def read_yaml(path: Path, shape: Shape = dict, maximum: int = MAX_TEXT_BYTES) -> Any:
    """Read a YAML file of plain values: no aliases, which can stand for billions of entries, and no objects.

    Args and errors as :func:`read_json`.
    """
    return checked(parse_yaml(_text(path, maximum), str(path)), shape, str(path))


def parse_json(text: str, where: str) -> Any:
    """Return the content of a JSON text; raises HarnessError."""
    try:
        return _plain(json.loads(text), 0)
    except (ValueError, RecursionError) as error:
        raise damaged(where, _reason(error)) from error


def parse_yaml(text: str, where: str) -> Any:
    """Return the content of a YAML text of plain values; raises HarnessError."""
    try:
        return _plain(yaml.load(text, PlainLoader), 0)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, OverflowError) as error:
        raise damaged(where, _reason(error)) from error


def checked(content: Any, shape: Shape, where: str) -> Any:
    """Return the content if it is of a shape; raises HarnessError that names the first field that is not."""
    problem = _problem(content, shape, "")
    if problem is not None:
        field, expected = problem
        raise damaged(where, f"{field or 'the whole file'}: expected {expected}")
    return content


def damaged(where: str, what: str) -> HarnessError:
    """Return the error of a file of a run or a submission that is not what this package wrote."""
    return HarnessError(f"{escaped(where)}: damaged: {escaped(what)}. Restore it, or remove this directory.")


if TYPE_CHECKING:
    _SafeLoader = yaml.SafeLoader
elif yaml.__with_libyaml__:

    class _SafeLoader(yaml.composer.Composer, yaml.CSafeLoader):
        """PyYAML's loader of plain values over libyaml's parser, five times as fast, with Python's composer."""

        def __init__(self, stream: str) -> None:
            yaml.CSafeLoader.__init__(self, stream)
            yaml.composer.Composer.__init__(self)
else:
    _SafeLoader = yaml.SafeLoader


class PlainLoader(_SafeLoader):
    """Loads plain values, not too many; refuses aliases, and whole numbers beyond 64 bits or in base 60."""

    _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse an alias; compose anything else."""
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise yaml.YAMLError(f"more than {_MAX_NODES:,} values")
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that stands twice: of its two values one would be taken in silence."""
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ValueError(f"the key {key.value[:60]!r} stands twice (line {key.start_mark.line + 1})")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Refuse texts whose conversion takes time that grows with their square: ``1:1:1:...``, thousands of digits."""
        text = str(self.construct_scalar(node))
        if ":" in text or len(text) > _MAX_DIGITS:
            raise ValueError(f"{text[:20]}{'...' * (len(text) > 20)}: a whole number in base 60, or of too many digits")
        return int(super().construct_yaml_int(node))


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def yaml_text(content: Any, allow_unicode: bool = False) -> str:
    """Return plain values as YAML in their order, repeated ones written out: the readers here accept no aliases."""
    return str(yaml.dump(content, Dumper=_NoAliases, sort_keys=False, allow_unicode=allow_unicode))


def _text(path: Path, maximum: int) -> str:
    try:
        return read_regular(path, maximum).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(str(path), "expected UTF-8") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested more than {_MAX_DEPTH} deep"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _plain(value: Any, depth: int) -> Any:
    """Return plain values with their texts escaped; raises ValueError for anything else, or nested too deep."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if isinstance(value, str):
        return escaped(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {
            escaped(key) if isinstance(key, str) else _key(key): _plain(item, depth + 1) for key, item in value.items()
        }
    raise ValueError(f"a value of type {type(value).__name__}")


def _key(key: Any) -> Any:
    if key is None or isinstance(key, bool | int | float):
        return key
    raise ValueError(f"a key of type {type(key).__name__}")


def _problem(content: Any, shape: Shape, field: str) -> tuple[str, str] | None:
    """Return the first field that is not as expected, and what was expected."""
    if isinstance(shape, OrNull):
        return None if content is None else _problem(content, shape.shape, field)
    if isinstance(shape, Between):
        return _range_problem(content, shape, field)
    if isinstance(shape, list):
        return _list_problem(content, shape[0], field)
    if isinstance(shape, Mapping):
        return _mapping_problem(content, shape, field)
    return _scalar_problem(content, shape if isinstance(shape, tuple) else (shape,), field)


def _list_problem(content: Any, shape: Shape, field: str) -> tuple[str, str] | None:
    if not isinstance(content, list):
        return field, "a list"
    found = (_problem(item, shape, f"{field}[{index}]") for index, item in enumerate(content))
    return next((problem for problem in found if problem), None)


def _is_moment(content: Any) -> bool:
    try:
        return isinstance(content, str) and datetime.fromisoformat(content).year >= 1
    except ValueError:
        return False


def _range_problem(content: Any, shape: Between, field: str) -> tuple[str, str] | None:
    whole = isinstance(shape.low, int)
    problem = _scalar_problem(content, (int,) if whole else (float,), field)
    if problem is None and not shape.low <= content <= shape.high:
        return field, f"{'a whole number' if whole else 'a number'} from {shape.low:g} to {shape.high:g}"
    return problem


def _scalar_problem(content: Any, types: tuple[type, ...], field: str) -> tuple[str, str] | None:
    if Moment in types:
        return None if _is_moment(content) else (field, "a date and time such as 2026-11-30T18:07:02+00:00")
    numbers = isinstance(content, int | float) and not isinstance(content, bool)
    # Python's whole numbers have no end, and their division or formatting as a float raises OverflowError
    if numbers and not (math.isfinite(content) if isinstance(content, float) else abs(content) < _MAX_FLOAT):
        return field, "a finite number"
    if numbers and float in types:
        return None
    if isinstance(content, types) and (bool in types or not isinstance(content, bool)):
        return None
    return field, " or ".join(_NAMES.get(t, t.__name__) for t in types)


def _mapping_problem(content: Any, shape: Mapping[str, Shape], field: str) -> tuple[str, str] | None:
    if not isinstance(content, dict):
        return field, "a mapping"
    named = set()
    for key, expected in shape.items():
        if key == "*":
            continue
        name = key.removesuffix("?")
        named.add(name)
        value = content.get(name)
        if key.endswith("?") and value is None and (name not in content or not isinstance(expected, list | Mapping)):
            continue
        if name not in content:
            return f"{field}.{name}".lstrip("."), "this field"
        problem = _problem(value, expected, f"{field}.{name}".lstrip("."))
        if problem:
            return problem
    if "*" in shape:
        for key, value in content.items():
            problem = None if key in named else _problem(value, shape["*"], f"{field}.{key}".lstrip("."))
            if problem:
                return problem
    return None


_NAMES = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a mapping",
    type(None): "null",
}  # fmt: skip
