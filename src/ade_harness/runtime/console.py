"""What a process shows its user: lines that are neither marked up nor cut, and have no control codes in a log."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ade_harness.files.escapes import escaped, one_line, without_long_words

OUTPUT = "ADE_HARNESS_OUTPUT"
"""Environment variable by which a command says to the ranks it starts how much to print, and where."""
_LOG_WIDTH = 120


class Output(StrEnum):
    """How much the process and the ranks that it starts print."""

    stdout = "stdout"
    stderr = "stderr"  # stdout is for one JSON object
    quiet = "quiet"  # results and errors only
    errors = "errors"  # stdout is for one JSON object, and stderr for errors


def output() -> Output:
    """Return what was asked for."""
    return Output(os.environ.get(OUTPUT, Output.stdout))


class _Console(Console):
    """Goes on where nobody reads any more, as of `... | head`: rich would end the process, and lose an evaluation."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Show control characters as escapes, in whatever is printed: rich takes out few of them."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else escaped(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


@contextmanager
def debug_messages() -> Iterator[None]:
    """Print what libraries log, down to debug messages, on stderr: ``--verbose``. The log is as before afterwards."""
    root = logging.getLogger()
    handler, level = logging.StreamHandler(), root.level
    handler.setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def make_console(*, result: bool = True) -> Console:
    """Return a console: a log gets lines of a fixed width, and no control codes.

    Args:
        result: whether what is printed is a result, which ``--quiet`` prints too.
    """
    quiet = output() == Output.errors or (output() == Output.quiet and not result)
    stderr = output() == Output.stderr
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _LOG_WIDTH
    return _Console(stderr=stderr, quiet=quiet, width=width, markup=False, emoji=False)  # `wandb:zzz:` is no picture


def print_fact(console: Console, name: str, value: str) -> None:
    """Print one of the lines below the table."""
    print_line(console, f"{name + ':':16}{one_line(value)}")


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: no markup, no colours of its own, never wrapped; control characters as escapes."""
    console.print(escaped(text), style=style, markup=False, highlight=False, soft_wrap=True)


def print_error(text: str) -> None:
    """Print a line to stderr."""
    print_line(_Console(stderr=True, emoji=False), without_long_words(text))


def percent(fraction: float | None) -> str:
    """Return a fraction as percent with two decimals."""
    return "-" if fraction is None else f"{100 * fraction:.2f}"
