"""Downloads from a server on loopback: resumed, checked, extracted safely."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ade_harness.config.compose import compose_config
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import extract, fetch

CONTENT = bytes(range(256)) * 9000


class Server(ThreadingHTTPServer):
    """Serves CONTENT; can break off, refuse ranges, or fail."""

    break_after: int | None = None
    ranges = True
    status = 200
    content = CONTENT
    requests: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        body = self.server.content[start:]
        if start >= len(self.server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.server.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.break_after is not None:
            body, self.server.break_after = body[: self.server.break_after], None
            self.wfile.write(body)
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server(("127.0.0.1", 0), Handler)
    served.requests = []
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}/ADEChallengeData2016.zip"


SHA1 = hashlib.sha1(CONTENT).hexdigest()


def test_fetch_shows_progress_and_is_not_repeated(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = tmp_path / "new" / "file.zip"
    fetch(url(server), path, algorithm="sha1", digest=SHA1, on_bytes=lambda *v: seen.append(v))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    fetch(url(server), path, algorithm="sha1", digest=SHA1)
    assert len(server.requests) == 1
    assert not list(path.parent.glob("*.part"))


def test_fetch_resumes_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.break_after = 1_200_000
    path = fetch(url(server), tmp_path / "file.zip", algorithm="sha1", digest=SHA1)
    assert path.read_bytes() == CONTENT
    assert server.requests[0] is None
    assert server.requests[1] is not None  # the rest only
    assert int(server.requests[1].removeprefix("bytes=").rstrip("-")) > 0


def test_fetch_continues_an_earlier_part_and_takes_a_whole_one(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "file.zip.part"
    part.write_bytes(CONTENT[:777])
    fetch(url(server), tmp_path / "file.zip", algorithm="sha1", digest=SHA1)
    assert server.requests == ["bytes=777-"]
    (tmp_path / "file.zip").rename(part)
    assert fetch(url(server), tmp_path / "file.zip", algorithm="sha1", digest=SHA1).read_bytes() == CONTENT


def test_fetch_starts_again_where_ranges_are_ignored(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.zip.part").write_bytes(b"old")
    assert fetch(url(server), tmp_path / "file.zip", algorithm="sha1", digest=SHA1).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=f"the sha1 of the download is {SHA1}, expected 00"):
        fetch(url(server), tmp_path / "file.zip", algorithm="sha1", digest="00" * 20)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("status", [404, 503])
def test_a_failing_server_is_named(server: Server, tmp_path: Path, status: int) -> None:
    server.status = status
    with pytest.raises(HarnessError, match=f"the server answers {status}"):
        fetch(url(server), tmp_path / "file.zip")


def test_an_unreachable_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="the download stopped 5 times"):
        fetch("http://127.0.0.1:9/x.zip", tmp_path / "file.zip")


def test_data_download_and_verify_from_the_command_line(server: Server, tmp_path: Path, tiny_ade: Path, call) -> None:  # type: ignore[no-untyped-def]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for file in sorted(tiny_ade.rglob("*.*")):
            archive.write(file, file.relative_to(tiny_ade.parent))
    server.content = buffer.getvalue()
    digest = hashlib.sha1(server.content).hexdigest()
    root = tmp_path / "fetched"
    done = call("data", "download", "--root", root, "--url", url(server), "--sha1", digest)
    assert done.code == 0, done.err
    assert f"dataset.root={root / 'ADEChallengeData2016'}" in done.out
    assert len(list((root / "ADEChallengeData2016/images/validation").iterdir())) == 7
    done = call("data", "verify", root / "ADEChallengeData2016")
    assert done.code == 2  # seven images are not the official set
    assert "7 of 2000 validation pairs" in done.out
    assert "NOT the whole official set" in done.out
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADE20K_ROOT", str(root / "ADEChallengeData2016"))
        assert call("data", "verify").out.splitlines()[1:] == done.out.splitlines()[1:]  # the first says the rate
        assert compose_config(["model=segformer_b0"]).dataset.root == str(root / "ADEChallengeData2016")
        assert compose_config(["model=segformer_b0", "dataset.root=x"]).dataset.root == "x"
    again = call("data", "download", "--root", tmp_path / "again", "--url", url(server), "--sha1", digest, "--quiet")
    assert again.code == 0
    assert "downloading" not in again.out + again.err  # no progress, the result alone
    assert len(again.out.splitlines()) == 2
    done = call("data", "download", "--root", root, "--url", url(server), "--sha1", "0" * 40)
    assert done.code == 2
    assert "expected 0000" in done.err
    assert call("data", "verifi").err.count("Did you mean 'verify'") == 1


def test_extract_refuses_path_traversal_and_damage(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    for name in ("../evil.txt", "/etc/evil.txt", "a/../../evil.txt", "C:/evil.txt"):
        with zipfile.ZipFile(archive, "w") as opened:
            opened.writestr("fine.txt", "x")
            opened.writestr(name, "x")
        with pytest.raises(HarnessError, match="path traversal"):
            extract(archive, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(zipfile.ZipInfo(""), "x")
    with pytest.raises(HarnessError, match="a member has no name"):
        extract(archive, tmp_path / "out")
    archive.write_bytes(b"PK nothing")
    with pytest.raises(HarnessError, match="not a whole zip"):
        extract(archive, tmp_path / "out")
