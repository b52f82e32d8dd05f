"""What a shell asks while a command line is typed: commands, options and files, and of overrides Hydra's own answer.

Hydra completes the line of an application that takes overrides alone: words that are not its own are taken out first.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path

from ade_harness.cli.commands import COMMAND_NAMES, COMMANDS, EVERYWHERE
from ade_harness.errors import HarnessError

_LINE = "COMP_LINE"
_OF_OVERRIDES = ("evaluate", "probe", "predict", "serve")
"""Commands whose words are overrides."""
_FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")
_NO_CHOICE = "=schema"
"""Ends a choice that each group has for files of the user's to name, and that is none."""


def complete(query: str, ask_hydra: Callable[[str | None], None]) -> None:
    """Print what a shell is to propose for the last word of ``COMP_LINE``; a mistake in the line proposes nothing.

    Args:
        query: ``query=bash``, ``query=zsh`` or ``query=fish``.
        ask_hydra: prints what Hydra proposes, for the line in the environment; called with the user's folder.
    """
    words = os.environ.get(_LINE, "").split(" ")
    app = 3 if Path(words[0]).name.startswith("python") else 1  # python -m ade_harness
    *before, last = words[app:] or [""]
    overrides, command, folder, value_of = [], None, None, ""
    for word in before:
        name, equals, value = word.partition("=")
        if value_of in _FOLDERS:
            folder = word
        elif name in _FOLDERS and equals:
            folder = value
        elif "=" in word and not word.startswith("-"):
            overrides.append(word)
        elif command is None and word in COMMAND_NAMES:
            command = word
        value_of = word if word in _FOLDERS else ""
    found: list[str] = []
    if last.startswith("-"):
        found = [flag for flag in _flags(command) if flag.startswith(last)]
    elif command is None and "=" not in last:
        found = [name for name in COMMAND_NAMES if name.startswith(last)]
    elif command is not None and command not in _OF_OVERRIDES:
        folder_of, _, begin = last.rpartition("/")
        there = sorted(Path(f"{folder_of}/" if "/" in last else ".").glob(f"{glob.escape(begin)}*"))
        found = [f"{path}/" if path.is_dir() else str(path) for path in there]
    if command in (None, *_OF_OVERRIDES) and not last.startswith("-") and not value_of:
        printed = StringIO()
        silent = suppress(HarnessError, SystemExit), redirect_stderr(StringIO()), redirect_stdout(printed)
        with _line(" ".join(["ade-harness", *overrides, last])), silent[0], silent[1], silent[2]:
            ask_hydra(folder)
        found += [word for word in printed.getvalue().split() if not word.endswith(_NO_CHOICE)]
    print("\n".join(found) if query.endswith("fish") else " ".join(found))


def _flags(command: str | None) -> Iterator[str]:
    """Yield the options of a command: of ``evaluate`` if none is named."""
    for one in COMMANDS:
        if one.name.partition(" ")[0] == (command or "evaluate"):
            yield from (name for a in one.arguments for name in a.names if name.startswith("--"))
    yield from (name for argument in EVERYWHERE for name in argument.names if name.startswith("--"))


@contextmanager
def _line(text: str) -> Iterator[None]:
    before = os.environ.get(_LINE)
    os.environ[_LINE] = text
    try:
        yield
    finally:
        os.environ.pop(_LINE)
        if before is not None:
            os.environ[_LINE] = before
