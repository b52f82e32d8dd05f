"""Whether a run directory was made by this user, or is untrusted.

A run's configuration names code that is imported, addresses that are contacted, and environment variables that are
sent. To continue or reproduce one's own run repeats what one has typed; somebody else's directory was typed by them. So
a run carries a signature by a key that only this user has, and any other needs ``--trust`` first.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ade_harness.config.files import choices, read_choice
from ade_harness.config.kinds import KINDS
from ade_harness.errors import HarnessError
from ade_harness.files.escapes import escaped
from ade_harness.files.reading import expanded

_KEY_BYTES = 32
_HUBS = re.compile(r"(hf[-_]hub|local-dir|file):", re.IGNORECASE)
"""How timm and segmentation-models-pytorch write that a network is to be fetched from somewhere."""


def key_path() -> Path:
    """Return where this user's key is: ``$XDG_STATE_HOME/ade_harness/key``."""
    return expanded(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "ade_harness" / "key"


def signature(*parts: Any) -> str | None:
    """Return this user's signature of some plain values; None if there is no key and none can be made."""
    key = _key(make=True)
    return None if key is None else _sign(key, parts)


def is_signed(found: Any, *parts: Any) -> bool:
    """Whether a signature is this user's, of these values."""
    key = _key(make=False)
    return (
        key is not None
        and isinstance(found, str)
        and hmac.compare_digest(found.encode("utf-8", "surrogatepass"), _sign(key, parts).encode())
    )


def _sign(key: bytes, parts: Sequence[Any]) -> str:
    return hmac.new(key, repr(list(parts)).encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _key(make: bool) -> bytes | None:
    path = key_path()
    try:
        if make and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = path.with_name(f".key-{secrets.token_hex(6)}")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
            try:
                os.link(temporary, path)  # of two that make one at once, the first counts
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        key = path.read_bytes()
    except OSError:
        return None
    return key if len(key) == _KEY_BYTES else None


def require_trust(config: Mapping[str, Any], what: str) -> None:
    """Refuse an untrusted configuration that would run code, ask an address, or send a secret.

    Args:
        config: plain values, of the complete configuration.
        what: how the message calls where it is from.

    Raises:
        HarnessError: says what it would do, and that ``--trust`` allows it.
    """
    reason = why_not_trusted(config)
    if reason is not None:
        raise HarnessError(
            f"{escaped(what)}: was not made by you on this machine, and {escaped(reason)}. Look at it first; then add"
            " --trust."
        )


def why_not_trusted(config: Mapping[str, Any]) -> str | None:
    """Return what a configuration would do that its reader might not want; None if there is nothing."""
    model = config.get("model")
    model = model if isinstance(model, Mapping) else {}
    return next(_reasons(config, model), None)


def _reasons(config: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    for key, value in _leaves(config, ""):
        if key.rpartition(".")[2] == "_target_" and value is not None:
            yield f"would import {key}={value} from this machine and run it"
    kind = KINDS.get(str(model.get("kind")))
    if kind is not None and kind.trust is not None:
        yield kind.trust
    http = model.get("http")
    token = http.get("token_env") if isinstance(http, Mapping) else None
    if token is not None:
        yield f"would send your environment variable {token} to {model.get('url')}"
    yield from _addresses(config, model)
    tracking = config.get("tracking")
    if isinstance(tracking, Mapping) and tracking.get("kind") == "wandb":
        for name in ("entity", "project", "run_id"):
            if tracking.get(name) is not None:
                yield f"would log to W&B with tracking.{name}={tracking[name]}"


def _addresses(config: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """Yield what would be fetched or asked, but is in no configuration of this package."""
    name = str(model.get("name"))
    known = {str(value) for _, value in _leaves(read_choice("model", name), "")} if name in choices("model") else set()
    for key, value in _leaves(config, ""):
        address = isinstance(value, str) and ("://" in value or (_HUBS.search(value) and key.startswith("model.")))
        asks = address or (key == "model.url" and value is not None)
        if asks and not key.startswith("model.about.") and str(value) not in known:
            yield f"would use the address {key}={value}"
    if model.get("id") is not None and str(model["id"]) not in known:
        yield f"would load model.id={model['id']}"
    for source in ("official", "hub", "backbone"):
        node = model.get(source)
        hub = node.get("hub_id") if isinstance(node, Mapping) else None
        if hub is not None and str(hub) not in known:
            yield f"would fetch model.{source}.hub_id={hub}"


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, below in value.items():
            yield from _leaves(below, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from _leaves(below, f"{key}[{index}]")
    elif isinstance(value, str | int | float | bool) or value is None:
        yield key, value
