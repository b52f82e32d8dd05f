"""Texts from untrusted files, made safe for terminals and messages."""

from __future__ import annotations

import re

from ade_harness.errors import HarnessError

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_LINES = re.compile(r"[\t\n]")


def escaped(text: str) -> str:
    """Return a text in which control characters, and marks that turn the direction of writing, are shown as escapes."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(text: str) -> str:
    """Return a text as :func:`escaped`, with new lines and tabs shown too: it cannot look like another line of ours.

    For what is shown: a text that is used, compared or signed may have lines.
    """
    return _LINES.sub(lambda found: found[0].encode("unicode_escape").decode(), escaped(text))


_MARKDOWN = re.compile(r"[\\`*\[\]|&<]")


def markdown_cell(text: str) -> str:
    """Return a text for a cell of a Markdown table that means itself: no picture that a viewer would load, no link."""
    return _MARKDOWN.sub(lambda found: {"&": "&amp;", "<": "&lt;"}.get(found[0], "\\" + found[0]), one_line(text))


def require_utf8(text: str, what: str) -> None:
    """Refuse what came from names of files whose bytes are not UTF-8: no file of a run could hold it.

    Raises:
        HarnessError: begins with `what`.
    """
    if re.search("[\ud800-\udfff]", text):
        raise HarnessError(
            f"{escaped(what)}: its name is not UTF-8. Rename it, or reach it by a link whose name is UTF-8."
        )


def without_long_words(text: str, maximum: int = 2_000) -> str:
    """Return a text in which no word has more than `maximum` characters: what is left out is counted."""
    return re.sub(rf"\S{{{maximum + 1},}}", lambda found: shortened(found[0], maximum), text)


def shortened(text: str, maximum: int = 200) -> str:
    """Return a text of at most `maximum` characters, and how many are left out."""
    return text if len(text) <= maximum else f"{text[:maximum]}... ({len(text) - maximum:,} more characters)"
