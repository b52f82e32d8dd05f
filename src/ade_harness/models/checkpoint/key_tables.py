"""Names of weights: tables that turn the names of one code base into those of another, every key accounted for.

A table is a sequence of rows (name there, name here) or (name there, name here, change):

- ``{N}`` stands for a number; ``{N-1}`` and ``{N+1}`` on the right for that number less or more one.
- ``*`` at the end stands for the rest of the name, and is kept.
- ``{query|key|value}`` on the right cuts the tensor into as many equal parts along its first dimension.
- ``None`` on the right: this weight takes no part in the forward, or is computed here.
- ``change`` is applied to the tensor before it is cut.

Names that no row knows are kept as they are, so that strict loading refuses them by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from torch import Tensor

Change = Callable[[Tensor], Tensor]
Row = tuple[str, str | None] | tuple[str, str | None, Change]
Table = Sequence[Row]


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    target: str | None
    change: Change | None

    def names(self, found: re.Match[str]) -> list[str]:
        """Return the new names of a key that matched."""
        assert self.target is not None
        numbers = {k: int(v) for k, v in found.groupdict().items() if k != "rest"}
        text = re.sub(r"\{(\w)([+-]\d)?\}", lambda m: str(numbers[m[1]] + int(m[2] or 0)), self.target)
        text = text.replace("*", found.groupdict().get("rest", ""))
        parts = re.search(r"\{([\w|]+)\}", text)
        if parts is None:
            return [text]
        return [text[: parts.start()] + part + text[parts.end() :] for part in parts[1].split("|")]


@cache
def _rule(name: str, target: str | None, change: Change | None) -> _Rule:
    pattern = re.escape(name)
    pattern = re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", pattern)
    pattern = pattern.replace(r"\*", "(?P<rest>.*)")
    return _Rule(re.compile(pattern + r"\Z"), target, change)


def _rules(table: Table) -> list[_Rule]:
    return [_rule(row[0], row[1], row[2] if len(row) == 3 else None) for row in table]


def _match(rules: Sequence[_Rule], key: str) -> tuple[_Rule, re.Match[str]] | None:
    for rule in rules:
        found = rule.pattern.match(key)
        if found:
            return rule, found
    return None


def known_keys(state: Iterable[str], table: Table) -> int:
    """Return how many keys some row of the table knows on its left."""
    rules = _rules(table)
    return sum(_match(rules, key) is not None for key in state)


@cache
def _named_here(target: str) -> re.Pattern[str]:
    """Return what the names on the right of a row look like; the numbers of the left are groups."""
    pattern, seen = "", set()
    for part in re.split(r"(\{\w(?:[+-]\d)?\}|\{[\w|]+\}|\*)", target):
        number = re.fullmatch(r"\{(\w)([+-]\d)?\}", part)
        if number is not None:
            pattern += f"(?P={number[1]})" if number[1] in seen else f"(?P<{number[1]}>\\d+)"
            seen.add(number[1])
        elif part == "*":
            pattern += "(?P<rest>.*)"
        elif part.startswith("{"):
            pattern += f"(?:{part[1:-1]})"
        else:
            pattern += re.escape(part)
    return re.compile(pattern + r"\Z")


def count_mapped_keys(state: Iterable[str], table: Table) -> int:
    """Return how many keys have a name of the table's right."""
    patterns = [_named_here(row[1]) for row in table if row[1] is not None]
    return sum(any(p.match(key) for p in patterns) for key in state)


def name_there(key: str, table: Table) -> str:
    """Return the name that a weight has on the table's left, from its name here; as it is if no row has it."""
    for row in table:
        found = None if row[1] is None else _named_here(row[1]).match(key)
        if found is not None:
            name = row[0]
            for number, more in re.findall(r"\{(\w)([+-]\d)?\}", row[1] or ""):
                name = name.replace(f"{{{number}}}", str(int(found[number]) - int(more or 0)))
            return name.replace("*", found.groupdict().get("rest", ""))
    return key


def rename(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Return the state_dict in the names on the table's right; the first row that matches a key decides."""
    rules, renamed = _rules(table), {}
    for key, value in state.items():
        match = _match(rules, key)
        if match is None:
            renamed[key] = value
            continue
        rule, found = match
        if rule.target is None:
            continue
        names = rule.names(found)
        tensor = rule.change(value) if rule.change is not None else value
        for name, part in zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True):
            renamed[name] = part
    return renamed


def to_hub_names(state: Mapping[str, Tensor], layouts: Mapping[str, Table]) -> tuple[dict[str, Tensor], str]:
    """Rename by the layout that knows most of the keys; returns the new state_dict and the layout's name.

    A state_dict of which no layout knows half the keys is taken to have the hub's names already.
    """
    known = {name: known_keys(state, table) for name, table in layouts.items()}
    best = max(known, key=lambda name: known[name], default=None)
    if best is None or known[best] * 2 < len(state):
        return dict(state), "hub"
    return rename(state, layouts[best]), best
