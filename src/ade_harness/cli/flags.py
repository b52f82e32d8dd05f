"""The words of a verb: names, and flags with their values."""

from __future__ import annotations

from collections.abc import Sequence

from ade_harness.errors import HarnessError, did_you_mean


def split_words(
    words: Sequence[str], flags: Sequence[str], switches: Sequence[str] = ()
) -> tuple[list[str], dict[str, list[str]]]:
    """Separate names from flags, which may be given as ``--flag VALUE`` or ``--flag=VALUE``, several times.

    Args:
        words: of the command, after the verb.
        flags: that take a value.
        switches: that take none; they have an empty list.

    Returns:
        The names, and the values of each flag that was given.

    Raises:
        HarnessError: another flag, or one without its value.
    """
    names: list[str] = []
    options: dict[str, list[str]] = {}
    rest = iter(words)
    for word in rest:
        flag, given, value = word.partition("=")
        if not word.startswith("-"):
            names.append(word)
        elif word in switches:
            options[word] = []
        elif flag in flags:
            value = value if given else next(rest, "")
            if not value:
                raise HarnessError(f"{flag} needs a value.")
            options.setdefault(flag, []).append(value)
        else:
            known = (*flags, *switches)
            raise HarnessError(f"{flag}: no such flag.{did_you_mean(flag, known)} Known: {', '.join(known)}.")
    return names, options


def last_values(options: dict[str, list[str]]) -> dict[str, str]:
    """Return each flag with the value that was given last; nothing for switches."""
    return {flag: values[-1] for flag, values in options.items() if values}
