"""`data download --source hub`: the Parquet copy becomes the official layout, byte for byte, and is checked like it."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ade_harness.data.hub_copy import REPOSITORY, write_copy
from ade_harness.errors import HarnessError
from tests.conftest import Done

pytestmark = pytest.mark.slow  # the file takes more than a few seconds


class Hub(ThreadingHTTPServer):
    """Data set repositories: revision -> path -> content."""

    revisions: dict[str, dict[str, bytes]]
    served: list[str]
    error: str | None = None
    commit = "489d5cd81a0b59fab9b7ea758d3548ebe99677da"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def _send(self, code: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self) -> None:
        if self.server.error is not None:
            return self._send(401, X_Error_Code=self.server.error)
        path = unquote(urlparse(self.path).path)
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/"):
            revision = path.removeprefix(f"/api/datasets/{REPOSITORY}/tree/")
            files = self.server.revisions.get(revision)
            if files is None:
                return self._send(404, X_Error_Code="RevisionNotFound")
            listed = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
            return self._send(200, json.dumps(listed).encode(), Content_Type="application/json")
        for revision, files in self.server.revisions.items():
            for name, content in files.items():
                if path == f"/datasets/{REPOSITORY}/resolve/{revision}/{name}":
                    self.server.served.append(name)
                    etag = f'"{hashlib.sha256(content).hexdigest()}"'
                    return self._send(200, content, ETag=etag, X_Repo_Commit=self.server.commit)
        return self._send(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.revisions, server.served = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    }.items():  # fmt: skip
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    monkeypatch.setenv("ADE_HARNESS_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


def rows(root: Path, names: bool) -> list[dict[str, dict[str, object]]]:
    made = []
    for image in sorted((root / "images/validation").iterdir()):
        annotation = root / "annotations/validation" / f"{image.stem}.png"
        made.append(
            {
                "image": {"bytes": image.read_bytes(), "path": image.name if names else None},
                "annotation": {"bytes": annotation.read_bytes(), "path": None},
            }
        )
    return made


def parquet(content: list[dict[str, dict[str, object]]]) -> bytes:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = list(content[0])
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(content, schema=pa.schema([(c, kind) for c in columns])), file)
    return file.getvalue()


def same(one: Path, two: Path) -> bool:
    files = [{p.relative_to(r): p.read_bytes() for p in r.rglob("*") if p.is_file()} for r in (one, two)]
    return files[0] == files[1] and len(files[0]) > 0


def test_rows_become_the_official_files(hub: Hub, tiny_ade: Path, tmp_path: Path) -> None:
    content = rows(tiny_ade, names=True)
    hub.revisions["main"] = {
        "README.md": b"x", "data/train-00000-of-00001.parquet": b"never read",
        "data/validation-00000-of-00002.parquet": parquet(content[:4]), "data/validation-00001-of-00002.parquet": parquet(content[4:]),
    }  # fmt: skip
    seen: list[tuple[int, int]] = []
    root = write_copy(tmp_path / "out", on_pair=lambda done, total: seen.append((done, total)))
    assert same(root, tiny_ade)
    assert seen == [(n, 7) for n in range(1, 8)]
    assert not any("train" in name for name in hub.served)
    # continued: what is there is not fetched or written again, what was cut is
    cut = root / "images/validation/ADE_val_00001003.jpg"
    cut.write_bytes(cut.read_bytes()[:50])
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.png")}
    served = len([n for n in hub.served if n.endswith("parquet")])
    write_copy(tmp_path / "out")
    assert same(root, tiny_ade)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*.png")} == before
    assert len([n for n in hub.served if n.endswith("parquet")]) <= served + 2  # headers are asked for


def test_files_that_the_hub_made_have_names_by_number(hub: Hub, tiny_ade: Path, tmp_path: Path) -> None:
    hub.revisions["main"] = {"scene_parse_150.py": b"x"}
    hub.revisions["refs/convert/parquet"] = {
        "scene_parsing/validation/0000.parquet": parquet(rows(tiny_ade, names=False))
    }
    root = write_copy(tmp_path / "out")
    assert sorted(p.name for p in (root / "images/validation").iterdir()) == [
        f"ADE_val_{n:08d}.jpg" for n in range(1, 8)
    ]


def test_the_command_checks_what_it_wrote(hub: Hub, tiny_ade: Path, call: Callable[..., Done], tmp_path: Path) -> None:
    """Seven small images are not the official two thousand: the exit code and the words say so."""
    hub.revisions["main"] = {"data/validation.parquet": parquet(rows(tiny_ade, names=True))}
    done = call("data", "download", "--source", "hub", "--root", tmp_path / "out")
    assert done.code == 2, done.err
    assert "1993 official images are missing" in done.out
    assert "the official image is" in done.out
    assert "NOT the whole official set" in done.out


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"main": {"README.md": b"x"}}, "has no Parquet files of the validation split, only README.md"),
        ({"main": {"validation.parquet": b"no parquet"}}, "its Parquet files cannot be read"),
        ({"main": {"validation.parquet": parquet([{"picture": {"bytes": b"x", "path": None}}])}}, "has no column image or annotation, only picture"),
        ({"main": {"validation.parquet": parquet([{"image": {"bytes": None, "path": "x"}, "annotation": {"bytes": b"x", "path": None}}])}}, "row 1 has no bytes of its image"),
    ],
)  # fmt: skip
def test_other_content_is_one_message(hub: Hub, files: dict[str, dict[str, bytes]], text: str, tmp_path: Path) -> None:
    hub.revisions = files
    with pytest.raises(HarnessError, match=text):
        write_copy(tmp_path / "out")


def test_a_hub_that_says_no(
    hub: Hub, tmp_path: Path, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.error = "GatedRepo"
    with pytest.raises(HarnessError, match="this repository is gated"):
        write_copy(tmp_path / "out")
    hub.error = "RepoNotFound"
    with pytest.raises(HarnessError, match=r"not found on the hub\. The official archive"):
        write_copy(tmp_path / "out")
    hub.shutdown()
    hub.server_close()
    with monkeypatch.context() as patch, pytest.raises(HarnessError, match="the download failed"):
        patch.setattr(time, "sleep", lambda _: None)  # the library waits 23 seconds between its tries
        write_copy(tmp_path / "out")
    done = call("data", "download", "--source", "hub", "--sha1", "abc")
    assert "--sha1: of the archive" in done.err
    assert "--repository: goes with --source hub" in call("data", "download", "--repository", "a/b").err
