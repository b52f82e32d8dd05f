"""Where everybody can get the weights of a run, and whether everybody really can."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import requests

from ade_harness.config.kinds import Gives, Source, kind_of
from ade_harness.errors import HarnessError
from ade_harness.files.address import check_url
from ade_harness.files.fetch import OnBytes
from ade_harness.models.checkpoint.public import INDEX
from ade_harness.runs.finished import FinishedRun

_TIMEOUT_S = 30
_CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HUB = re.compile(r"hub:(?P<id>[\w.-]+/[\w.-]+)@(?P<revision>[0-9a-f]{40})(?:/(?P<file>[\w./-]+))?")
_EXAMPLE = "https://example.org/weights.safetensors or hub:ORGANISATION/NAME@COMMIT/FILE"
_SECRET = "A submission is public: give an address that needs no password."


@dataclass(frozen=True)
class PublicSource:
    """One public thing that a run needs: a weight file, a repository of the hub, or an endpoint."""

    role: str
    """checkpoint, backbone or endpoint."""
    address: str
    """http(s) address, or ``hub:ORGANISATION/NAME@COMMIT/FILE``."""
    sha256: str | None
    """SHA-256 of the file that the run has read; None for an endpoint that reports none."""
    gated: bool = False
    """Behind a licence form that everybody may fill in."""
    checked: str = "not checked"
    """How it was seen to be public."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for a file."""
        return asdict(self)


def parse_address(text: str, key: str) -> str:
    """Check an address of a public file.

    Raises:
        HarnessError: it is none, holds a secret, or only this machine or network can reach it.
    """
    if text.startswith("hub:"):
        if _HUB.fullmatch(text) is None or ".." in text:
            raise HarnessError(f"{key}={text}: expected hub:ORGANISATION/NAME@COMMIT/FILE, the commit in 40 digits.")
        return text
    check_url(text, key, _SECRET, _EXAMPLE)
    if is_local(text):
        raise HarnessError(f"{key}={text}: only this machine or network can reach it. Give a public address.")
    return text


def is_local(url: str) -> bool:
    """Whether an address is of this machine or of a private network, as far as its text says."""
    host = urlsplit(url).hostname or ""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".localhost"))


def sources_of(run: FinishedRun, given: Mapping[str, str]) -> list[PublicSource]:
    """Find the public sources of a run's weights.

    Args:
        run: a finished run.
        given: addresses by role that the submitter names, for files that the run took from disk.

    Raises:
        HarnessError: there are no weights, they are random, or nobody else can get them.
    """
    model, facts = run.config["model"], run.manifest["model"]
    kind = kind_of(model["kind"])
    if kind.source is Source.server:
        return [PublicSource("endpoint", parse_address(model["url"], "model.url"), facts.get("sha256"))]
    if kind.gives is Gives.labels:
        raise HarnessError(
            "the run read label maps, so there is no checkpoint to name. Evaluate the model itself (model=custom,"
            " onnx, http, ...)."
        )
    if facts.get("weights") != "pretrained":
        raise HarnessError(
            f"the weights are {facts.get('weights')}: {facts.get('origin')}. Evaluate a published checkpoint."
        )
    own = facts.get("head_sha256") or facts.get("sha256")
    found = [_public_source("checkpoint", model, ("official", "hub"), facts.get("origin"), own, given)]
    if facts.get("backbone_origin"):
        pieces = (facts["backbone_origin"], facts.get("backbone_sha256"))
        found.append(_public_source("backbone", model, ("backbone",), *pieces, given))
    return found


def _public_source(
    role: str, model: Mapping[str, Any], known: tuple[str, ...], origin: Any, sha256: Any, given: Mapping[str, str]
) -> PublicSource:
    """Return where one file of a run is public."""
    origin = str(origin)
    files = [model[name] for name in known]
    if role in given:
        return PublicSource(role, parse_address(given[role], f"--{role}"), sha256)
    for file in files:
        if file["url"] and _is_of(file, sha256) and (origin == file["url"] or file["sha256"]):
            return PublicSource(role, parse_address(file["url"], "the weights"), sha256, file["gated"])
        if file["hub_id"] and file["revision"] and file["sha256"] and _is_of(file, sha256):
            address = f"hub:{file['hub_id']}@{file['revision']}/{file['filename']}"
            return PublicSource(role, parse_address(address, "the weights"), sha256, file["gated"])
    gated = any(file["gated"] for file in files)
    if _HUB.fullmatch(f"hub:{origin}"):
        return PublicSource(role, f"hub:{origin}", sha256, gated)
    if origin.startswith(("http://", "https://")):
        return PublicSource(role, parse_address(origin, "the weights"), sha256, gated)
    advice = (
        "push it to the hub and evaluate model.id=ORGANISATION/NAME model.revision=COMMIT"
        if kind_of(model["kind"]).source is Source.repository
        else f"publish it, and say where: --{role} {_EXAMPLE}"
    )
    raise HarnessError(f"the {role} is not publicly available ({origin}): {advice}.")


def _is_of(file: Mapping[str, Any], sha256: Any) -> bool:
    """Whether a pinned file is the one that was read."""
    return file["sha256"] is None or str(sha256).startswith(str(file["sha256"]).lower())


def overrides_for(source: PublicSource, taken_from: Source) -> list[str]:
    """Return the overrides that make a model's loader fetch a file from its public address, in place of a local path.

    Args:
        source: of the file.
        taken_from: of the model's kind; one that takes a path gets none:
            :mod:`ade_harness.leaderboard.reproduce.rerun` fetches it.
    """
    hub = _HUB.fullmatch(source.address)
    if source.role == "endpoint" or taken_from is Source.file:
        return []
    if taken_from is Source.repository:
        return [f"model.id='{hub['id']}'", f"model.revision='{hub['revision']}'"] if hub else []
    backbone = source.role == "backbone"
    group = "backbone" if backbone else "hub" if hub else "official"
    if hub is None:
        overrides = [f"model.{group}.url='{source.address}'"]
    else:
        keys = {"hub_id": hub["id"], "revision": hub["revision"], "filename": hub["file"]}
        overrides = [f"model.{group}.{key}='{value}'" for key, value in keys.items()]
    overrides.append(f"model.{group}.sha256='{source.sha256}'")
    if backbone:
        return [*overrides, *(["model.backbone.url=null"] if hub else [])]
    return [*overrides, f"model.source={group}"]


def check_public(source: PublicSource, read_all: bool, on_bytes: OnBytes | None = None) -> PublicSource:
    """Ask the address anonymously, without any login.

    Args:
        source: what to look at.
        read_all: whether to read the whole file and compare its hash, where the server does not report one.
        on_bytes: called with the bytes read so far.

    Returns:
        The source with what was seen.

    Raises:
        HarnessError: private, gone, a web page, another file, or not to be reached.
    """
    address = _web_address(source)
    with _Stranger() as session:
        try:
            with session.get(address, stream=True, timeout=_TIMEOUT_S) as response:
                return _look(source, response, read_all, on_bytes)
        except requests.RequestException as error:
            raise HarnessError(
                f"{source.address}: cannot be reached ({type(error).__name__}). Try again, or skip this check"
                " with --no-network: the submission records that."
            ) from error


class _Stranger(requests.Session):
    """Never logs in: a password of this machine (.netrc) would hide that others have none."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Add none after a redirect either."""
        prepared_request.headers.pop("Authorization", None)


def _web_address(source: PublicSource) -> str:
    hub = _HUB.fullmatch(source.address)
    if hub is None:
        return f"{source.address.rstrip('/')}/info" if source.role == "endpoint" else source.address
    from huggingface_hub import hf_hub_url

    return str(hf_hub_url(hub["id"], hub["file"] or "config.json", revision=hub["revision"]))


def _look(source: PublicSource, response: requests.Response, read_all: bool, on_bytes: OnBytes | None) -> PublicSource:
    address, status = source.address, response.status_code
    if status in (401, 403):
        if source.gated:
            return _seen(source, "behind its licence form")
        raise HarnessError(f"{address}: is private: the server answers {status}. Make it public, or name another.")
    if status == 404 and source.role == "endpoint":
        return _seen(source, "answers")  # GET /info is not asked of every endpoint
    if status >= 400:
        raise HarnessError(f"{address}: the server answers {status}. Name an address where the file is.")
    if source.role == "endpoint" or (source.address.startswith("hub:") and source.sha256 is None):
        return _seen(source, "answers")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise HarnessError(f"{address}: answers with a web page, not with a file. Give the address of the file itself.")
    if address.endswith(INDEX):  # the run's hash is of all the shards together
        return _seen(source, "its index answers; the shards were not read")
    reported = _reported_hash([*response.history, response])
    if reported is None and not read_all:
        return _seen(source, "answers; its content was not read")
    if reported is None:
        reported, how = _read_hash(response, on_bytes), "read, same hash"
    else:
        how = "the server reports the same hash"
    if reported != source.sha256:
        raise HarnessError(
            f"{address}: is another file: its sha256 is {reported}, the run has read {source.sha256}."
            " Name the file that was evaluated."
        )
    return _seen(source, how)


def _seen(source: PublicSource, how: str) -> PublicSource:
    return replace(source, checked=how)


def _reported_hash(responses: list[requests.Response]) -> str | None:
    """Return the sha256 that a hub reports for a large file."""
    for response in responses:
        tag = response.headers.get("X-Linked-Etag", "").strip('"')
        if _SHA256.fullmatch(tag):
            return tag
    return None


def _read_hash(response: requests.Response, on_bytes: Callable[[int, int | None], None] | None) -> str:
    digest, have = hashlib.sha256(), 0
    length = response.headers.get("Content-Length")
    for chunk in response.iter_content(_CHUNK):
        digest.update(chunk)
        have += len(chunk)
        if on_bytes:
            on_bytes(have, int(length) if length else None)
    return digest.hexdigest()
