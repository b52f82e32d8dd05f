"""A client for one endpoint: retries where that can help, reports what is wrong, and keeps its token to itself."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ade_harness.endpoint.http import NoReplyError, Reply, exchange
from ade_harness.errors import EveryImageError, HarnessError

_FIRST_WAIT_S, _MAX_WAIT_S, _MAX_RETRY_AFTER_S = 0.5, 30.0, 300.0
_ALIVE_WITHIN_S = 10.0
_QUOTED_CHARACTERS, _QUOTED_BYTES = 200, 4096
_MAX_INFO_BYTES = 1 << 20
_NO_INFO = (404, 405, 501)
_FATAL_STATUSES = (401, 403, 404, 405, 407, 410)
_TEXT = ("text/", "application/json", "application/problem+json", "application/xml")
_ADVICE = {
    401: "model.http.token_env names the environment variable that holds the token.",
    403: "model.http.token_env names the environment variable that holds the token.",
    404: "model.url is the address before /predict.",
    406: "model.http.returns chooses labels or scores.",
    413: "model.http.send=jpeg sends less.",
    415: "model.http.send chooses png or jpeg.",
}
_jitter = random.SystemRandom()  # the ranks' and loaders' own generators are all seeded alike


_TEXTS = ("name", "version", "inference", "sha256")
"""What a server may say of itself as text."""


def read_token(variable: str | None, option: str = "model.http.token_env") -> str | None:
    """Return the token that an environment variable holds; None if no variable is named.

    Args:
        variable: its name.
        option: that names it, for messages.

    Raises:
        HarnessError: it is not set, or cannot be sent in a header; the message shows neither name nor value, because
            people put the token where its variable's name belongs.
    """
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise HarnessError(
            f"{option}: no environment variable of that name is set. Give the name of the variable, not the"
            " token, and set the variable before the command."
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise HarnessError(
            f"{option}: the variable's value cannot be sent in a header. Expected printable ASCII characters"
            " without spaces."
        )
    return token


@dataclass
class Endpoint:
    """One address, and how to ask it. Copies in forked processes learn from each other that it is gone."""

    url: str
    """Before ``/predict`` and ``/info``; it may have a query, which no message shows."""
    timeout_s: float
    """Time limit of one try, for everything together."""
    retries: int
    """How often a try is repeated that a lost connection, a timeout, 429 or 5xx ended."""
    token: str | None = field(default=None, repr=False)
    _over: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, mmap.PAGESIZE), repr=False)
    """Memory that forked loaders share: why nothing is asked any more, if so."""

    def address(self, name: str) -> str:
        """Return the address of ``predict`` or ``info``."""
        parts = urlsplit(self.url)
        return parts._replace(path=f"{parts.path.rstrip('/')}/{name}").geturl()

    @property
    def is_open(self) -> bool:
        """Whether requests cross a network without encryption."""
        parts = urlsplit(self.url)
        return parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost")

    def shown(self, name: str) -> str:
        """Return :meth:`address` without its query, for messages."""
        return without_query(self.address(name))

    def ask(
        self,
        method: str,
        name: str,
        what: str,
        headers: Mapping[str, str],
        body: bytes,
        max_bytes: int,
        accepted: Collection[int] = (),
    ) -> Reply:
        """Send a request until it is answered with 2xx.

        Args:
            method: GET or POST.
            name: ``predict`` or ``info``.
            what: leads messages, such as an image's id.
            headers: beside the token.
            body: to send.
            max_bytes: of the reply.
            accepted: other statuses that are answers.

        Raises:
            HarnessError: refused, or all tries failed.
            EveryImageError: it refuses whatever is sent, or answers nothing at all.
        """
        headers = {**headers, **({"Authorization": f"Bearer {self.token}"} if self.token else {})}
        lead, url = f"{what}: {self.shown(name)}", self.address(name)
        problem, answered, retry_after = "", False, None
        for attempt in range(self.retries + 1):
            if attempt:
                wait = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1)
                self._wait(max(wait, retry_after or 0.0))
            self._refuse_if_over()
            try:
                reply = exchange(
                    method, url, headers, body, self.timeout_s, max_bytes, _QUOTED_BYTES, self._refuse_if_over
                )
            except NoReplyError as error:
                problem, answered, retry_after = str(error), False, None
                if not error.passing:
                    raise HarnessError(f"{lead}: {problem}.") from None
                continue
            if 200 <= reply.status < 300 or reply.status in accepted:
                return reply
            problem, answered, retry_after = self._described(reply), True, _retry_after(reply)
            if reply.status in _FATAL_STATUSES or 300 <= reply.status < 400:
                self._give_up(f"{self.shown(name)}: {problem}. {_ADVICE.get(reply.status, '')}".rstrip())
            if reply.status != 429 and reply.status < 500:
                raise HarnessError(f"{lead}: {problem}. {_ADVICE.get(reply.status, '')}".rstrip())
            if retry_after is not None and retry_after > _MAX_RETRY_AFTER_S:
                self._give_up(f"{self.shown(name)}: {problem}, and asks to wait for {retry_after:,.0f} s.")
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        if not answered and not self._answers():
            self._give_up(
                f"{self.shown(name)}: the endpoint does not answer ({problem}; {tries})."
                " Check model.url, and that it runs."
            )
        raise HarnessError(f"{lead}: {problem}; {tries}.")

    def info(self) -> dict[str, Any]:
        """Ask what the server says of itself: ``name``, ``version``, ``inference``, ``sha256``, ``classes``.

        Returns:
            Texts, and the names of its classes as a tuple of texts.

        Raises:
            HarnessError: no answer, or the token is refused. A server without ``/info`` is fine.
        """
        reply = self.ask("GET", "info", "model.url", {"Accept": "application/json"}, b"", _MAX_INFO_BYTES, _NO_INFO)
        try:
            reported = json.loads(reply.body) if reply.status == 200 else {}
        except (ValueError, RecursionError):
            return {}
        if not isinstance(reported, dict):
            return {}
        kept = {k: first_line(self.hide(v)) for k in _TEXTS if isinstance(v := reported.get(k), str)}
        if not re.fullmatch(r"[0-9a-f]{64}", kept.get("sha256", "")):
            kept.pop("sha256", None)
        named = reported.get("classes")
        names = tuple(name for name in named if isinstance(name, str)) if isinstance(named, list) else ()
        known: dict[str, Any] = {"classes": names} if names and len(names) == len(named or ()) else {}
        if named is not None and not known:
            known = {"odd": f"/info says its classes as {first_line(self.hide(str(named)))[:60]}, which is not read"}
        return {k: v for k, v in kept.items() if v} | known

    def quote(self, reply: Reply) -> str:
        """Return what a reply says, for a message: ``: '...'``, or nothing if it is no text."""
        if not reply.content_type.startswith(_TEXT):
            return ""
        text = reply.body[:_QUOTED_BYTES].decode(errors="replace")
        try:
            reported = json.loads(text)
            found = next(
                (reported[k] for k in ("error", "detail", "message") if isinstance(reported.get(k), str)), text
            )
        except (ValueError, AttributeError, RecursionError):
            found = text
        line = first_line(self.hide(found))
        return f": {line!r}" if line else ""

    def hide(self, text: str) -> str:
        """Return a text without the token, before it is cut: servers repeat what they were sent."""
        return re.sub(re.escape(self.token), "***", text, flags=re.IGNORECASE) if self.token else text

    def _described(self, reply: Reply) -> str:
        if 300 <= reply.status < 400:
            target = first_line(without_query(self.hide(reply.headers.get("location", "nowhere"))))
            return (
                f"answers {reply.status} and points to {target}; redirects are not followed: set model.url to the last"
            )
        return f"answers {reply.status} {first_line(self.hide(reply.reason))}".rstrip() + self.quote(reply)

    def _answers(self) -> bool:
        """Whether the endpoint answers anything at all."""
        try:
            exchange("GET", self.address("info"), {}, b"", min(self.timeout_s, _ALIVE_WITHIN_S), _MAX_INFO_BYTES, 0)
        except NoReplyError as error:
            return not error.passing
        return True

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
            self._refuse_if_over()

    def stop(self) -> None:
        """End this rank's requests: the run breaks off."""
        if not self._over[0]:
            self._write_over("stopped")

    def _give_up(self, text: str) -> NoReturn:
        """End this and every other request of this rank with one message."""
        self._refuse_if_over()  # the first error wins
        self._write_over(text)
        raise EveryImageError(text)

    def _write_over(self, text: str) -> None:
        data = text.encode()[: len(self._over) - 1]
        self._over[1 : len(data)] = data[1:]
        self._over[:1] = data[:1]  # from now on it is seen

    def _refuse_if_over(self) -> None:
        if self._over[0]:
            raise EveryImageError(self._over[:].rstrip(b"\0").decode(errors="replace"))


def without_query(url: str) -> str:
    """Return an address without user, query and fragment."""
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    except ValueError:
        return "(not an address)"


def first_line(text: str) -> str:
    """Return the first line that says something, printable, at most 200 characters."""
    for line in text.splitlines():
        printable = " ".join("".join(c if c.isprintable() else " " for c in line).split())
        if printable:
            return printable if len(printable) <= _QUOTED_CHARACTERS else f"{printable[: _QUOTED_CHARACTERS - 3]}..."
    return ""


def _retry_after(reply: Reply) -> float | None:
    """Return for how many seconds a server asks to be left alone."""
    value = reply.headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        moment = parsedate_to_datetime(value)
        return max(0.0, (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None
