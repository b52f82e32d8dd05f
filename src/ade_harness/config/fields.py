"""Fields of configuration dataclasses that carry the range or the form of their values, and the one check of all."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ade_harness.errors import require

MISSING: Any = "???"
"""OmegaConf's mark of a field without a default, so that commands can read choices without importing OmegaConf."""
MAX_SEED = 2**32 - 1
"""The largest seed that NumPy's and Lightning's generators take."""

PATHS = (
    "dataset.root", "dataset.image_dir", "dataset.label_dir", "dataset.classes", "model.checkpoint",
    "model.backbone_checkpoint", "model.path",
)  # fmt: skip
"""Keys that hold a path on this machine."""


@dataclass(frozen=True)
class Range:
    """Which values a number may have, or each number of a list."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    """Every value is larger than this."""
    below: float | None = None
    """Every value is smaller than this."""
    unit: str = ""
    """What is counted."""
    also: Any = None
    """One further value, beside the range."""
    meaning: str = ""
    """What that value says, where it does not say it itself; of a list, what its numbers are."""
    whole: bool = False
    """Whether only whole numbers are meant: of a field whose type does not say so."""
    length: int | None = None
    """How many numbers a list has; None leaves it open."""
    ascending: bool = False
    """Whether no number of a list is smaller than the one before it."""

    def holds(self, value: Any) -> bool:
        """Return whether one value is allowed."""
        if self.also is not None and value == self.also and type(value) is type(self.also):
            return True
        if not isinstance(value, int | float) or isinstance(value, bool) or (self.whole and not isinstance(value, int)):
            return False
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """Say what is expected: ``1,000 to 1,000,000, or 0 for no intervals``."""
        unit = f" {self.unit}" if self.unit else ""
        least, most = self._text(self.at_least), self._text(self.at_most)
        if least and most:
            text = f"{least} to {most}"
        else:
            ends = {"more than": self.above, "less than": self.below, "at most": self.at_most}
            parts = [f"{least} or more"] if least else []
            text = " and ".join(
                [*parts, *(f"{word} {self._text(end)}" for word, end in ends.items() if end is not None)]
            )
        also = "" if self.also is None else f", or {self.also}{f' for {self.meaning}' if self.meaning else ''}"
        return f"{text}{unit}{also}"

    @staticmethod
    def _text(number: float | None) -> str:
        return "" if number is None else f"{number:,}"

    def of_list(self) -> str:
        """Say what is expected of a whole list: ``2 numbers, each more than 0, the smaller first``."""
        number = "one number or more" if self.length is None else f"{self.length} numbers"
        named = f" ({self.meaning})" if self.meaning else ""
        each = str(self)
        return f"{number}{named}{f', each {each}' if each else ''}{', the smaller first' if self.ascending else ''}"


@dataclass(frozen=True)
class Pattern:
    """What a text looks like."""

    regex: str
    expected: str
    secret: bool = False
    """Whether what was typed by mistake may be a secret: it is not repeated."""


def bounded(
    default: Any,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    unit: str = "",
    also: Any = None,
    meaning: str = "",
    whole: bool = False,
) -> Any:
    """Return a dataclass field whose value, if there is one, lies in a range.

    Args:
        default: of the field; None allows null.
        at_least: smallest value.
        at_most: largest value.
        above: every value is larger than this.
        below: every value is smaller than this.
        unit: what is counted, for the message.
        also: one value that is allowed beside the range, such as ``auto``.
        meaning: what that value says, for the message.
        whole: whether only whole numbers are meant, where the field's type does not say so.
    """
    found = Range(at_least, at_most, above, below, unit, also, meaning, whole)
    return field(default=default, metadata={"range": found})


def bounded_list(
    default: list[Any] | None,
    length: int | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    ascending: bool = False,
    meaning: str = "",
) -> Any:
    """Return a dataclass field with a list of numbers, which is not empty, each in a range as `bounded` has it.

    Args:
        default: of the field; None allows null.
        length: how many numbers there are; None leaves it open.
        at_least: smallest number.
        at_most: largest number.
        above: every number is larger than this.
        below: every number is smaller than this.
        ascending: whether no number is smaller than the one before it.
        meaning: what the numbers are, for the message.
    """
    found = Range(at_least, at_most, above, below, meaning=meaning, length=length, ascending=ascending)
    metadata = {"range": found}
    if default is None:
        return field(default=None, metadata=metadata)
    return field(default_factory=lambda: list(default), metadata=metadata)


def written(regex: str, expected: str, secret: bool = False, is_place: bool = False) -> Any:
    """Return a dataclass field with a text that has a form, or null.

    Args:
        regex: what the whole text matches.
        expected: what it is, for the message.
        secret: whether what was typed by mistake may be a secret, and is not repeated.
        is_place: whether it is also taken as it is typed, as `place` says.
    """
    return field(
        default=None, metadata={"pattern": Pattern(regex, expected, secret), **({"place": True} if is_place else {})}
    )


def place(default: str | None = None) -> Any:
    """Return a dataclass field that holds a path, a URL or an id: on the command line it is taken as it is typed."""
    return field(default=default, metadata={"place": True})


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """Return the types of a configuration class's fields, which are texts in its source."""
    return get_type_hints(kind)


def place_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all such fields of a configuration class and of what is nested in it."""
    types = hints_of(kind)
    for one in fields(kind):
        if is_dataclass(types[one.name]):
            yield from place_keys(types[one.name], f"{prefix}{one.name}.")
        elif "place" in one.metadata:
            yield prefix + one.name


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check every field with a range or a form, of a configuration and of what is nested in it.

    Raises:
        HarnessError: names the dotted key, its value, and what was expected.
    """
    for one in fields(config):
        key, value = f"{prefix}{one.name}", getattr(config, one.name)
        limits, form = one.metadata.get("range"), one.metadata.get("pattern")
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif value is None:
            continue
        elif form is not None:
            shown = "" if form.secret else f"={value}"
            require(re.fullmatch(form.regex, str(value)) is not None, f"{key}{shown}: expected {form.expected}.")
        elif isinstance(value, list) and limits is not None:
            _check_list(key, value, limits)
        elif limits is not None:
            require(limits.holds(value), f"{key}={_shown(value)}: expected {str(limits) or 'a finite number'}.")


def _check_list(key: str, values: list[Any], limits: Range) -> None:
    fits = len(values) == limits.length if limits.length is not None else bool(values)
    in_order = not limits.ascending or values == sorted(values)
    require(fits and in_order, f"{key}={values}: expected {limits.of_list()}.")
    for index, value in enumerate(values):
        expected = str(limits) or "a finite number"
        require(value is None or limits.holds(value), f"{key}[{index}]={_shown(value)}: expected {expected}.")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_lists(config: Any, prefix: str = "") -> None:
    """Check what OmegaConf does not: the elements of every list, and what an interpolation puts in a node's place.

    Raises:
        HarnessError: names the dotted key, and the place in the list.
    """
    of_class: Any = type(config)
    hints = hints_of(of_class)
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
