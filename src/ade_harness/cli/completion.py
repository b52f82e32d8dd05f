"""What a shell asks while a command line is typed: commands, options and files, and of overrides Hydra's own answer.

Hydra completes the line of an application that takes overrides alone: words that are not its own are taken out first.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ade_harness.cli.commands import COMMAND_NAMES, COMMANDS, EVERYWHERE, Argument
from ade_harness.config.arguments import place_fields
from ade_harness.config.files import choices
from ade_harness.errors import HarnessError

_LINE = "COMP_LINE"
_OF_OVERRIDES = (None, "evaluate", "probe", "predict", "serve")
"""Commands whose words are overrides; None is a line without a command yet."""
_FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")
_NO_CHOICE = "=schema"
"""Ends a choice that each group has for files of the user's to name, and that is none."""
_TWO_WORDS = [one.name.split(" ") for one in COMMANDS if " " in one.name]
_SECOND: dict[str | None, Sequence[str]] = {
    first: [second for other, second in _TWO_WORDS if other == first] for first, _ in _TWO_WORDS
}
"""Commands of two words: the second words by the first."""


@dataclass(frozen=True)
class _Line:
    """A command line up to its last word, which is being typed."""

    command: str | None
    """As tables call it: of two words with both, as far as they are there."""
    overrides: tuple[str, ...]
    folder: str | None
    """``--config-dir``."""
    option: str
    """That the last word is the value of; empty if it is none's."""
    last: str


def complete(query: str, ask_hydra: Callable[[str | None], None]) -> None:
    """Print what a shell is to propose for the last word of ``COMP_LINE``; a mistake in the line proposes nothing.

    Args:
        query: ``query=bash``, ``query=zsh`` or ``query=fish``.
        ask_hydra: prints what Hydra proposes, for the line in the environment; called with the user's folder.
    """
    words = os.environ.get(_LINE, "").split(" ")
    app = 3 if Path(words[0]).name.startswith("python") else 1  # python -m ade_harness
    line = _read(words[app:] or [""])
    found = _proposed(line)
    is_place = line.last.partition("=")[0] in place_fields() and "=" in line.last
    if line.command in _OF_OVERRIDES and not (line.option or line.last.startswith("-") or is_place):
        found += _of_hydra(line, ask_hydra)
    print("\n".join(found) if query.endswith("fish") else " ".join(found))


def _read(words: Sequence[str]) -> _Line:
    *before, last = words
    overrides, command, folder, option = [], None, None, ""
    for word in before:
        name, equals, value = word.partition("=")
        if option:
            folder, option = word if option in _FOLDERS else folder, ""
        elif word.startswith("-"):
            folder = value if name in _FOLDERS and equals else folder
            option = name if not equals and _takes_a_value(command, name) else ""
        elif equals:
            overrides.append(word)
        elif command is None and word in COMMAND_NAMES:
            command = word
        elif command in _SECOND and word in _SECOND[command]:
            command = f"{command} {word}"
    return _Line(command, tuple(overrides), folder, option, last)


def _proposed(line: _Line) -> list[str]:
    """Return what the tables of this package and the file system propose."""
    last, command = line.last, line.command
    key, equals, value = last.partition("=")
    if line.option:
        known = next((a.settings.get("choices") for a in _arguments(command) if line.option in a.names), None)
        return _files(last) if known is None else _beginning(map(str, known), last)
    if last.startswith("-"):
        return _beginning((name for a in _arguments(command) for name in a.names if name.startswith("--")), last)
    if command in _OF_OVERRIDES and equals:
        return [f"{key}={name}" for name in _files(value)] if key in place_fields() else []
    words: dict[str | None, Sequence[str]] = {**_SECOND, None: COMMAND_NAMES, "models": choices("model")}
    words |= dict.fromkeys(("evaluate", "probe", "serve"), ())
    return _beginning(words[command], last) if command in words else _files(last)


def _beginning(known: Iterator[str] | Sequence[str], begin: str) -> list[str]:
    return [name for name in known if name.startswith(begin)]


def _files(begin: str) -> list[str]:
    """Return the files and folders whose paths begin so."""
    folder, _, name = begin.rpartition("/")
    there = sorted(Path(f"{folder}/" if "/" in begin else ".").glob(f"{glob.escape(name)}*"))
    return [f"{path}/" if path.is_dir() else str(path) for path in there]


def _arguments(command: str | None) -> Iterator[Argument]:
    """Yield the arguments of a command: of ``evaluate`` if none is named, of all ``data`` commands for ``data``."""
    for one in COMMANDS:
        if one.name == (command or "evaluate") or one.name.split(" ")[0] == command:
            yield from one.arguments
    yield from EVERYWHERE


def _takes_a_value(command: str | None, name: str) -> bool:
    return any(
        name in a.names and "action" not in a.settings and a.settings.get("nargs") != "?" for a in _arguments(command)
    )


def _of_hydra(line: _Line, ask_hydra: Callable[[str | None], None]) -> list[str]:
    """Return what Hydra proposes for an override."""
    printed = StringIO()
    with (
        _line_of(" ".join(["ade-harness", *line.overrides, line.last])), suppress(HarnessError, SystemExit),
        redirect_stderr(StringIO()), redirect_stdout(printed),
    ):  # fmt: skip
        ask_hydra(line.folder)
    return [word for word in printed.getvalue().split() if not word.endswith(_NO_CHOICE)]


@contextmanager
def _line_of(text: str) -> Iterator[None]:
    before = os.environ.get(_LINE)
    os.environ[_LINE] = text
    try:
        yield
    finally:
        os.environ.pop(_LINE)
        if before is not None:
            os.environ[_LINE] = before
