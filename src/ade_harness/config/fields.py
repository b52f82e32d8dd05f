"""Fields of configuration dataclasses that carry the range of their values, and the one check of all ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ade_harness.errors import require

MAX_SEED = 2**32 - 1
"""The largest seed that NumPy's and Lightning's generators take."""


def bounded(
    default: Any,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    unit: str = "",
) -> Any:
    """Return a dataclass field whose value, if there is one, lies in a range.

    Args:
        default: of the field; None allows null.
        at_least: smallest value.
        at_most: largest value.
        above: every value is larger than this.
        unit: what is counted, for the message.
    """
    return field(default=default, metadata={"at_least": at_least, "at_most": at_most, "above": above, "unit": unit})


def place(default: str | None = None) -> Any:
    """Return a dataclass field that holds a path, a URL or an id: on the command line it is taken as it is typed."""
    return field(default=default, metadata={"place": True})


def place_keys(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all such fields of a configuration class and of what is nested in it."""
    types = get_type_hints(kind)
    for one in fields(kind):
        if is_dataclass(types[one.name]):
            yield from place_keys(types[one.name], f"{prefix}{one.name}.")
        elif "place" in one.metadata:
            yield prefix + one.name


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every bounded field of a configuration and of what is nested in it.

    Raises:
        HarnessError: names the dotted key, its value, and what was expected.
    """
    for key, value, limits in _bounded_values(config, prefix):
        least, maximum, above = limits["at_least"], limits["at_most"], limits["above"]
        inside = (
            (least is None or value >= least)
            and (maximum is None or value <= maximum)
            and (above is None or value > above)
        )
        require(inside, f"{key}={value:{'g' if isinstance(value, float) else ''}}: expected {_range_text(limits)}.")


def check_lists(config: Any, prefix: str = "") -> None:
    """Check what OmegaConf does not: the elements of every list, and what an interpolation puts in a node's place.

    Raises:
        HarnessError: names the dotted key, and the place in the list.
    """
    hints = get_type_hints(type(config))
    for one in fields(config):
        key, value = f"{prefix}{one.name}", getattr(config, one.name)
        kinds = (hints[one.name], *get_args(hints[one.name]))
        node, listed = any(map(is_dataclass, kinds)), any(get_origin(kind) is list for kind in kinds)
        fits = value is None or (is_dataclass(value) if node else isinstance(value, list) if listed else True)
        wanted = f"fields are expected: {key}.NAME=VALUE" if node else "a list is expected"
        require(fits, f"{key}={str(value)[:80]}: is a {type(value).__name__}, where {wanted}.")
        if is_dataclass(value):
            check_lists(value, f"{key}.")
        elif isinstance(value, list):
            _check_elements(hints[one.name], value, key)


def _check_elements(hint: Any, values: list[Any], key: str) -> None:
    lists = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is list]
    [element] = get_args(lists[0]) if lists else [Any]
    if element is Any:
        return
    allowed = tuple(get_args(element)) or (element,)
    for index, value in enumerate(values):
        fits = isinstance(value, allowed) or (float in allowed and isinstance(value, int))
        names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
        require(fits, f"{key}[{index}]: {str(value)[:80]!r} is a {type(value).__name__}, expected {names}.")


def _bounded_values(config: Any, prefix: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for one in fields(config):
        key, value = f"{prefix}{one.name}", getattr(config, one.name)
        if is_dataclass(value):
            yield from _bounded_values(value, f"{key}.")
        elif "at_least" in one.metadata and value is not None:
            yield key, value, dict(one.metadata)


def _range_text(limits: dict[str, Any]) -> str:
    least, maximum, above = (None if limits[k] is None else f"{limits[k]:,}" for k in ("at_least", "at_most", "above"))
    unit = f" {limits['unit']}" if limits["unit"] else ""
    if above is not None:
        return f"more than {above}{unit}"
    if maximum is None:
        return f"{least}{unit} or more"
    return f"at most {maximum}{unit}" if least is None else f"{least} to {maximum}{unit}"
