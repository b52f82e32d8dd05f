"""What a process shows its user: lines that are neither marked up nor cut, and have no control codes in a log."""

from __future__ import annotations

import sys

from rich.console import Console

_LOG_WIDTH = 120


def make_console() -> Console:
    """Return a console for stdout: a log gets lines of a fixed width, and no control codes."""
    return Console() if sys.stdout.isatty() else Console(width=_LOG_WIDTH)


def print_fact(console: Console, name: str, value: str) -> None:
    """Print one of the lines below the table."""
    print_line(console, f"{name + ':':15}{value}")


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: no markup, no colours of its own, never wrapped."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
