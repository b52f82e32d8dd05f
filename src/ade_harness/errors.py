"""The error type that a user is meant to see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HarnessError(Exception):
    """Something that the user can act on.

    The command line prints its message without a traceback and exits with code 2, so a message names the
    file, key or image, says what was expected, and what to do.
    """

    exit_code: int | None = None
    """Exit code of the process that the error is about, such as a sweep's job."""


class ArgumentError(HarnessError, ValueError):
    """An argument from Python that makes no sense; also a ValueError, as Python's and torchmetrics' callers expect."""


class ShortMemoryError(HarnessError):
    """Memory is too short for a batch, however it was divided: fewer images at a time may fit."""


class EveryImageError(HarnessError):
    """What failed for one image and would fail for every other one: a server that is gone."""


def text_of(error: BaseException) -> str:
    """Return the message of an error; empty if its class, which may be anybody's, cannot give it."""
    try:
        return str(error)
    except Exception:
        return ""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of `choices`, or an empty string.

    A dotted key that ends like a choice counts as near (``devices`` -> ``runtime.devices``).
    """
    known = list(choices)
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    near += [c for c in known if c.rpartition(".")[2] == word and c not in near][:1]
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def nearest(word: str, choices: Iterable[str], number: int = 5) -> str:
    """Return the choices that are nearest to a word, as text: of many, which nobody wants to see all."""
    ratios = {choice: difflib.SequenceMatcher(None, choice, word).ratio() for choice in choices}
    return ", ".join(sorted(ratios, key=lambda choice: (-ratios[choice], choice))[:number])


def require(condition: bool, message: str) -> None:
    """Raise HarnessError with `message` unless the condition holds."""
    if not condition:
        raise HarnessError(message)
