"""A stand-in for W&B's HTTP interface on loopback: it keeps what arrives, and gives artifacts back.

What it answers is what wandb 0.31 asks for (GraphQL, the file stream, PUT of files), as seen by logging its requests.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

ENTITY = "team"


@dataclass
class StubServer:
    """What has arrived."""

    base: str = ""
    key: str = "k" * 40
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """GraphQL operations with their variables."""
    unknown: list[str] = field(default_factory=list)
    """Requests that it has no answer for."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    stream: dict[tuple[str, str], dict[int, str]] = field(default_factory=dict)
    """Lines by (run, file), each by its number."""
    exits: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)
    """Files, by the path of their upload address."""
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    refuse: Callable[[str], int | None] = lambda _: None
    """An HTTP status in place of an answer, by operation or path."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def artifact(self, name: str) -> dict[str, Any]:
        """Return the newest version of an artifact that was committed; W&B shows no other."""
        return [a for a in self.artifacts.values() if a["name"] == name and a["state"] == "COMMITTED"][-1]

    def run_file(self, run: str, name: str) -> bytes:
        """Return a file of a run."""
        return self.uploads[f"/upload/run/{run}/{name}"]

    # GraphQL, by the name of the operation

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """Return the data of a GraphQL request; None if it is unknown."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else "?"
        self.calls.append((name, variables))
        method = getattr(self, "_on_" + re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower(), None)
        if method is None:
            self.unknown.append(f"{name}: {re.sub(chr(10), ' ', query)}")
            return None
        data: dict[str, Any] = method(variables)
        return data

    def _on_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"id": "E", "name": ENTITY}}]}
        return {"viewer": {"id": "V", "entity": ENTITY, "username": "me", "flags": "{}", "teams": teams}}

    _on_get_default_entity = _on_viewer

    def _on_server_features_query(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_upsert_bucket(self, v: dict[str, Any]) -> dict[str, Any]:
        inserted = v["name"] not in self.runs
        run = self.runs.setdefault(v["name"], {"project": v["project"]})
        run |= {k: x for k, x in v.items() if x is not None}
        project = {"id": "P", "name": v["project"], "entity": {"id": "E", "name": ENTITY}}
        bucket = {
            "id": v["name"], "name": v["name"], "displayName": run.get("displayName"), "description": None,
            "config": None, "sweepName": None, "historyLineCount": 0, "project": project,
        }  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _on_artifact_type(self, v: dict[str, Any]) -> dict[str, Any]:
        name = v["name"].partition(":")[0]
        found = [a for a in self.artifacts.values() if a["name"] == name]
        return {"project": {"artifact": {"artifactType": {"name": found[0]["type"]}} if found else None}}

    def _on_organization_core_weave_organization_i_d(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_run_resume_status(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        if run is None:
            return {"model": {"bucket": None}}

        def lines(file: str) -> dict[int, str]:
            return self.stream.get((v["name"], file), {})

        def tail(file: str) -> str:
            return json.dumps([text for _, text in sorted(lines(file).items())][-1:])

        summary = self.uploads.get(f"/upload/run/{v['name']}/wandb-summary.json", b"{}").decode()
        bucket = {
            "id": v["name"], "name": v["name"], "displayName": run.get("displayName"), "sweepName": None,
            "summaryMetrics": summary, "config": run.get("config") or "{}", "tags": run.get("tags") or [],
            "historyLineCount": len(lines("wandb-history.jsonl")), "historyTail": tail("wandb-history.jsonl"),
            "eventsLineCount": len(lines("wandb-events.jsonl")), "eventsTail": tail("wandb-events.jsonl"),
            "logLineCount": len(lines("output.log")), "wandbConfig": '{"t": {}}',  # a run that has begun
        }  # fmt: skip
        return {"model": {"bucket": bucket}}

    def _on_notify_scriptable_run_alert(self, v: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append(v)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_create_artifact(self, v: dict[str, Any]) -> dict[str, Any]:
        given = v["input"]
        identifier = f"A{len(self.artifacts)}"
        versions = sum(a["name"] == given["artifactCollectionName"] for a in self.artifacts.values())
        self.artifacts[identifier] = {
            "id": identifier, "name": given["artifactCollectionName"], "type": given["artifactTypeName"],
            "version": versions, "metadata": json.loads(given["metadata"] or "{}"), "run": given["runName"],
            "aliases": [a["alias"] for a in given["aliases"]], "digest": given["digest"], "state": "PENDING",
            "project": given["projectName"], "used_by": [],
        }  # fmt: skip
        created = {"id": identifier, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": created}}

    def _on_create_artifact_manifest(self, v: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.base}/upload/manifest/{v['artifactID']}"
        file = {"id": "F", "uploadUrl": url, "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"M-{v['artifactID']}", "file": file}}}

    def _on_create_artifact_files(self, v: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in v["input"]["artifactFiles"]:
            path = f"{file['artifactID']}/{file['name']}"
            node = {
                "storagePath": path, "uploadUrl": f"{self.base}/upload/artifact/{path}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "artifact": {"id": file["artifactID"]},
            }  # fmt: skip
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_commit_artifact(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[v["artifactID"]]
        artifact["state"] = "COMMITTED"
        artifact["manifest"] = json.loads(self.uploads[f"/upload/manifest/{artifact['id']}"])
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def _on_use_artifact(self, v: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[v["input"]["artifactID"]]["used_by"].append(v["input"]["runName"])
        return {"useArtifact": {"artifact": {"id": v["input"]["artifactID"]}}}

    def _on_create_run_files(self, v: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": n, "uploadUrl": f"{self.base}/upload/run/{v['run']}/{n}"} for n in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    # the public interface

    def _on_artifact_membership_by_name(self, v: dict[str, Any]) -> dict[str, Any]:
        name, _, alias = v["name"].partition(":")
        found = [
            a for a in self.artifacts.values()
            if a["name"] == name and (v["entity"], v["project"]) == (ENTITY, a["project"])
            and a["state"] == "COMMITTED" and (alias in a["aliases"] or alias == f"v{a['version']}")
        ]  # fmt: skip
        if not found:
            return {"project": {"artifactCollectionMembership": None} if v["entity"] == ENTITY else None}
        artifact = found[-1]
        project = {"id": "P", "internalId": "1", "name": artifact["project"], "entity": {"name": ENTITY}}
        collection = {"__typename": "ArtifactSequence", "name": name, "project": project}
        aliases = [{"__typename": "ArtifactAlias", "id": a, "alias": a} for a in artifact["aliases"]]
        node = {
            "__typename": "Artifact", "id": artifact["id"], "artifactSequence": collection, "description": None,
            "versionIndex": artifact["version"], "artifactType": {"name": artifact["type"]},
            "metadata": json.dumps(artifact["metadata"]), "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [],
            "historyStep": None, "state": "COMMITTED", "size": 1, "digest": artifact["digest"], "commitHash": "0",
            "fileCount": len(artifact["manifest"]["contents"]), "createdAt": "2026-01-02T03:04:05Z",
            "updatedAt": None, "aliases": [{**a, "artifactCollection": collection} for a in aliases],
        }  # fmt: skip
        membership = {
            "__typename": "ArtifactCollectionMembership", "id": "AM", "versionIndex": artifact["version"],
            "createdAt": "2026-01-02T03:04:05Z", "aliases": aliases, "artifactCollection": collection, "artifact": node,
        }  # fmt: skip
        return {"project": {"artifactCollectionMembership": membership}}

    def _on_fetch_artifact_manifest(self, v: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.base}/download/manifest/{v['id']}"
        return {"artifact": {"currentManifest": {"file": {"directUrl": url}}}}

    def _on_get_artifact_membership_file_urls(self, v: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifact(v["collection"])
        edges = [
            {
                "node": {
                    "__typename": "File",
                    "name": n,
                    "directUrl": f"{self.base}/download/artifact/{artifact['id']}/{n}",
                }
            }
            for n in artifact["manifest"]["contents"]
        ]
        files = {"pageInfo": {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}, "edges": edges}
        membership = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
        return {"project": {"artifactCollection": membership}}

    def _on_run(self, v: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(v["name"])
        if run is None or v["entity"] != ENTITY:
            return {"project": {"run": None}}
        node = {
            "id": "R", "projectId": 1, "tags": run.get("tags", []), "name": v["name"], "displayName": v["name"],
            "sweepName": None, "state": run.get("state") or "finished", "config": "{}", "group": None, "jobType": None, "commit": None,
            "readOnly": False, "createdAt": "2026-01-02T03:04:05", "heartbeatAt": None, "description": None,
            "notes": None, "systemMetrics": "{}", "summaryMetrics": "{}", "historyLineCount": 0,
            "user": {"name": "me", "username": "me"}, "historyKeys": None,
        }  # fmt: skip
        return {"project": {"run": node}}

    def _on_upsert_view2(self, v: dict[str, Any]) -> dict[str, Any]:
        self.views.append(v)
        return {"upsertView": {"view": {"id": f"W{len(self.views)}", "name": v["name"]}, "inserted": True}}


def _handler(stub: StubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        def _reply(self, content: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_POST(self) -> None:
            body = self._body()
            key = base64.b64encode(f"api:{stub.key}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {key}":
                self._reply(b'{"errors": [{"message": "permission denied"}]}', 401)
                return
            with stub.lock:
                if self.path == "/graphql":
                    asked = json.loads(body)
                    status = stub.refuse(asked["query"])
                    data = None if status else stub.answer(asked["query"], asked.get("variables") or {})
                    reply = {"data": data} if data is not None else {"errors": [{"message": "unknown"}]}
                    self._reply(json.dumps(reply).encode(), status or (200 if data is not None else 400))
                elif self.path.endswith("/file_stream"):
                    status = stub.refuse(self.path)
                    if not status:
                        self._stream(self.path.split("/")[-2], json.loads(body))
                    self._reply(b"{}", status or 200)
                else:
                    stub.unknown.append(f"POST {self.path}")
                    self._reply(b"{}", 404)

        def _stream(self, run: str, sent: dict[str, Any]) -> None:
            for name, part in (sent.get("files") or {}).items():
                lines = stub.stream.setdefault((run, name), {})
                lines |= {part["offset"] + i: line for i, line in enumerate(part["content"])}
            if sent.get("complete"):
                stub.exits[run] = sent["exitcode"]

        def do_PUT(self) -> None:
            body = self._body()
            with stub.lock:
                status = stub.refuse(self.path)
                if not status:
                    stub.uploads[unquote(self.path)] = body
            self._reply(b"", status or 200)

        def do_GET(self) -> None:
            with stub.lock:
                content = stub.uploads.get(unquote(self.path.replace("/download/", "/upload/", 1)))
                if content is None:
                    stub.unknown.append(f"GET {self.path}")
            self._reply(content or b"", 200 if content is not None else 404)

    return Handler


@contextmanager
def serve() -> Iterator[StubServer]:
    """Run a server on a free port of loopback."""
    stub = StubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that goes away is no matter
    stub.base = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hang() -> Iterator[str]:
    """Accept connections and never answer; yields the address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def accept() -> None:
            try:
                while True:
                    kept.append(listener.accept()[0])
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in kept:
            connection.close()
