"""Inputs from the edges of a machine, each of which is one message: names, dates, links, addresses, replies, streams."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ade_harness.data.folder import read_classes
from ade_harness.data.source import FolderSource
from ade_harness.endpoint.service import make_server
from ade_harness.errors import HarnessError
from ade_harness.files.documents import Moment, checked
from ade_harness.files.escapes import require_utf8
from ade_harness.files.fetch import fetch
from ade_harness.files.reading import place_or_id
from ade_harness.leaderboard.submission.declaration import _source_problems
from ade_harness.runtime.coordination import Coordinator, LocalStore

Call = Callable[..., Any]


@pytest.mark.parametrize("text", ["x", "", "2026-13-01", "2026-00", "-1-01", 7, None])
def test_what_is_no_date_is_damage(text: Any) -> None:
    with pytest.raises(HarnessError, match="finished: expected a date and time"):
        checked({"finished": text}, {"finished": Moment}, "manifest.json")
    assert checked({"finished": "2026-11-30T18:07:02+00:00"}, {"finished": Moment}, "manifest.json")


@pytest.mark.parametrize(
    "changed", [{"checked": None}, {"checked": {"a": [1]}}, {"gated": 1}, {"more": 1}, {"role": ...}]
)
def test_a_reference_has_all_its_fields(changed: dict[str, Any]) -> None:
    whole = {
        "role": "endpoint", "address": "https://example.org/m", "sha256": None, "gated": False, "checked": "answers",
    }  # fmt: skip
    assert _source_problems([whole]) == []
    broken = {key: value for key, value in {**whole, **changed}.items() if value is not ...}
    assert _source_problems([broken])[0].startswith(f"references[0].{next(iter(changed))}: ")


def test_names_that_are_not_utf8_reach_every_rank() -> None:
    with pytest.raises(HarnessError, match=r"a\\udcff\.jpg: its name is not UTF-8") as raised:
        require_utf8("a\udcff.jpg", "a\udcff.jpg")
    coordinator = Coordinator(LocalStore())
    coordinator.lose(f"{raised.value} b\udcfe")
    assert b"b\\udcfe" in coordinator._store.get("lost")


def test_names_of_classes_are_short(tmp_path: Path) -> None:
    (tmp_path / "classes.yaml").write_text(f"names: [{'x' * 201}, sky]\n")
    with pytest.raises(HarnessError, match=r"names\[0\]: .* has 201 characters"):
        read_classes(tmp_path / "classes.yaml", "mine")


def test_folders_that_link_to_each_other_end(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abcdefghi"]
    for folder in folders:
        folder.mkdir()
        (folder / "x.jpg").touch()
    (folders[0] / "same").symlink_to(folders[1])  # one more path is none too many
    assert len(FolderSource(tmp_path).names()) == 10
    for one in folders:
        for other in folders:
            if one != other:
                (one / f"to_{other.name}").symlink_to(other)
    with pytest.raises(HarnessError, match="by more than 16 paths"):
        FolderSource(tmp_path).names()


@pytest.mark.parametrize("host", ["é" * 70, "a\0b", "203.0.113.7"])
def test_odd_hosts_are_named(host: str) -> None:
    with pytest.raises(HarnessError, match="cannot listen on .*Choose another --host"):
        make_server(SimpleNamespace(), host)  # type: ignore[arg-type]


def test_a_home_directory_may_hold_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place_or_id("~/net") == str(tmp_path / "net")
    assert place_or_id("nvidia/segformer-b0") == "nvidia/segformer-b0"


class Odd(BaseHTTPRequestHandler):
    """Answers with the headers that the path names."""

    def do_GET(self) -> None:
        headers, body = json.loads(os.environ["ODD_REPLY"])
        self.send_response(headers.pop("status", 200))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Length": "abc"}, "says 'abc' as the length"),
        ({"Content-Length": "1e3"}, "says '1e3' as the length"),
        ({"Content-Length": "5, 6"}, "multiple unmatching values"),
        ({"Content-Encoding": "gzip"}, "sends the file compressed"),
        ({}, "sends more than 4 bytes"),
        ({"status": 302, "Location": "http://[::1"}, "the download stopped"),
        ({"status": 416}, "the download stopped"),
        ({"Content-Length": "5, 5"}, None),
    ],
)
def test_odd_replies_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, Any], message: str | None
) -> None:
    monkeypatch.setenv("ODD_REPLY", json.dumps([headers, "12345"]))
    server = HTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        url, place = f"http://127.0.0.1:{server.server_port}/x", tmp_path / "x"
        if message is None:
            assert fetch(url, place).read_text() == "12345"
            return
        with pytest.raises(HarnessError, match=message):
            fetch(url, place, max_bytes=4 if "more than" in message else 100)
        assert not place.exists()
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("words", [["models"], ["--version"], ["doctor", "--help"]])
def test_a_full_output_is_one_message(words: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, as Linux has it")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ade_harness", *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written (No space left on device)")
    assert "Traceback" not in done.stderr


def test_a_full_disk_elsewhere_is_not_blamed_on_the_output() -> None:
    from ade_harness.cli.main import guarded

    def work() -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        guarded(work)


def test_a_working_directory_that_is_gone_is_one_message(tmp_path: Path) -> None:
    program = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]);"
        "os.execv(sys.executable, [sys.executable, '-m', 'ade_harness', 'models'])"
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "gone")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working directory cannot be used")
