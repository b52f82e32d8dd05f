"""Texts from untrusted files, made safe for terminals and messages."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escaped(text: str) -> str:
    """Return a text in which control characters, and marks that turn the direction of writing, are shown as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def without_long_words(text: str, most: int = 400) -> str:
    """Return a text in which no word has more than `most` characters: what is left out is counted."""
    return re.sub(rf"\S{{{most + 1},}}", lambda found: shortened(found[0], most), text)


def shortened(text: str, most: int = 200) -> str:
    """Return a text of at most `most` characters, and how many are left out."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text) - most:,} more characters)"
