"""Web addresses that users give."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

from ade_harness.errors import HarnessError, require

_SECRET_NAME = re.compile(r"token|secret|passw|credential|auth|signature|api.?key|access.?key|^(key|code|sig|pwd|jwt)$")
_MAX_PLAIN_VALUE = 32


def check_url(url: str, key: str, advice: str, example: str) -> None:
    """Check that an address is one, and holds no secret.

    Args:
        url: the address.
        key: how messages call it.
        advice: what to do with a secret.
        example: of a right address.

    Raises:
        HarnessError: names the key; it never shows what may be a secret.
    """
    try:
        parts = urlsplit(url)
        _, host = parts.port, parts.hostname
    except ValueError:
        host, parts = None, urlsplit("")
    if "@" in parts.netloc:
        raise HarnessError(f"{key}: holds a user or password (before the @). {advice}")
    if not host or parts.scheme not in ("http", "https") or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise HarnessError(f"{key}: no http or https address without spaces. Expected such as {example}.")
    require(not parts.fragment, f"{key}: holds a fragment (#...), which is never sent. Leave it out.")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        require(
            not _SECRET_NAME.search(name.lower()) and len(value) <= _MAX_PLAIN_VALUE,
            f"{key}: {name[:40]} in its query looks like a secret. {advice}",
        )
