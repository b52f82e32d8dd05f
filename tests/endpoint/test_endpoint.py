"""Endpoints: the same labels as the model behind them, and one clear message for whatever a server may do."""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from ade_harness.config.compose import compose_config
from ade_harness.config.schema import Config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.endpoint import client as endpoint_module
from ade_harness.endpoint import http as exchange_module
from ade_harness.endpoint.client import Endpoint, read_token
from ade_harness.endpoint.predictor import EndpointPredictor, encode, open_endpoint, read_scores
from ade_harness.endpoint.server import RefusedError
from ade_harness.endpoint.service import ModelService, make_server, open_service
from ade_harness.errors import EveryImageError, HarnessError
from ade_harness.runtime.queue import max_held
from tests.cli.test_cli import one_message
from tests.conftest import Done

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

Call = Callable[..., Done]
FAST = ("tracking=none", "run.overlays=0")
TOKEN = "-".join(("S3cret", "TOK3N", "0123456789"))  # never whole in a file: runs record uncommitted changes
IMAGE = np.random.default_rng(5).integers(0, 256, (20, 30, 3)).astype(np.uint8)


class Handler(BaseHTTPRequestHandler):
    """Records requests and does with them what the test says."""

    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = json.dumps(self.server.info).encode()
        self.send("application/json", body)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.requests.append((dict(self.headers), data))
            self.server.now += 1
            self.server.maximum = max(self.server.maximum, self.server.now)
        try:
            self.server.behave(self, data)
        except OSError:
            pass  # the client has had enough
        finally:
            with self.server.lock:
                self.server.now -= 1

    def send(self, kind: str, body: bytes, status: int = 200, length: int | None = -1, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


Behaviour = Callable[[Handler, bytes], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behave: Behaviour, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.behave = behave
        self.info: dict[str, Any] = {"name": "test", "version": "1"}
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.lock = threading.Lock()
        self.now = self.maximum = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(behave: Behaviour, port: int = 0) -> Iterator[Server]:
    server = Server(behave, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def png(array: np.ndarray) -> bytes:
    return encode(array, "png")


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def reply(kind: str, body: bytes, **headers: str) -> Behaviour:
    return lambda handler, _: handler.send(kind, body, **headers)


def right_size(data: bytes) -> bytes:
    """A label map of the image's size: everything is wall."""
    width, height = Image.open(io.BytesIO(data)).size
    return png(np.ones((height, width), np.uint8))


def good(handler: Handler, data: bytes) -> None:
    handler.send("image/png", right_size(data))


@cache
def composed() -> Config:
    return compose_config(["model=http", "model.url=http://127.0.0.1:9"])


def config(*overrides: str) -> Config:
    """Composing takes a fifth of a second; this does not."""
    tree = OmegaConf.merge(OmegaConf.structured(composed()), OmegaConf.from_dotlist(list(overrides)))
    return cast(Config, OmegaConf.to_object(tree))


def predictor(url: str, *overrides: str, token: str | None = None) -> EndpointPredictor:
    model = config(f"model.url={url}", *overrides).model
    return EndpointPredictor(
        model, ade20k_classes(), Endpoint(url, model.http.timeout_s, model.http.retries, token), {}, "auto"
    )


def labels_of(made: EndpointPredictor, image: np.ndarray = IMAGE) -> np.ndarray:
    return made.prepare("ADE_x", image).pixels[0].numpy()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Do not wait between tries; note for how long."""
    noted: list[float] = []
    monkeypatch.setattr(Endpoint, "_wait", lambda _, seconds: noted.append(seconds))
    return noted


# the same labels as the model's own


@contextmanager
def reference_server(*overrides: str, token: str | None = None) -> Iterator[tuple[ModelService, str]]:
    service = open_service(compose_config(["model=demo", *overrides]))
    with make_server(service, token=token) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield service, f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def hashes(run: Path) -> dict[str, str]:
    rows = pd.read_parquet(run / "ledger")
    return dict(zip(rows.image_id, rows.label_hash, strict=True))


def test_labels_and_scores_of_an_endpoint_are_those_of_its_model(call: Call, tmp_path: Path) -> None:
    assert call("model=demo", "dataset.limit=5", "run.dir=own", *FAST).code == 0
    expected = hashes(tmp_path / "own")
    assert len(expected) == 5
    with reference_server() as (_, url):
        overrides = ("model=http", f"model.url={url}", "dataset.limit=5", "model.http.concurrency=2", *FAST)
        for returns in ("labels", "scores"):
            done = call(*overrides, f"model.http.returns={returns}", f"run.dir={returns}")
            assert done.code == 0, done.err
            assert "Note: the predictions came from http://127.0.0.1" in done.out
            assert "DataLoader" not in done.err
            assert hashes(tmp_path / returns) == expected
        facts = json.loads((tmp_path / "labels/manifest.json").read_text())["model"]
        assert facts["origin"] == f"{url}/predict (demo ade-harness 0.1.0)"
        assert facts["server"]["name"] == "demo"
        assert (facts["sent"], facts["returned"]) == ("png", "labels")
        jpeg = call(*overrides, "model.http.send=jpeg", "model.http.jpeg_quality=30", "run.dir=jpeg")
        assert jpeg.code == 0, jpeg.err
        assert hashes(tmp_path / "jpeg") != expected
        assert "sent as JPEG of quality 30, which changes their pixels" in " ".join(jpeg.out.split())


@pytest.mark.parametrize(
    "protocol",
    [
        ["inference=mmseg_whole_512", "inference.resize.side=64", "inference.resize.max_side=128"],
        ["inference=mmseg_slide_512_ms", "inference.resize.side=48", "inference.resize.max_side=96",
         "inference.window.crop=32", "inference.window.stride=21", "inference.tta.scales=[0.75,1.0]"],
        ["inference=fit_input", "inference.resize.height=64", "inference.resize.width=64"],
    ],
)  # fmt: skip
def test_scores_of_any_protocol_make_its_labels(protocol: list[str]) -> None:
    with reference_server(*protocol, "runtime.kernels=torch") as (service, url):
        with service.answer(png(IMAGE), scores=False) as ([own], _):
            pass
        scores = predictor(url, "model.http.returns=scores")
        assert np.array_equal(labels_of(scores) + np.uint8(1), np.array(Image.open(io.BytesIO(own))))
        assert np.array_equal(labels_of(predictor(url)), labels_of(scores))


def test_half_precision_big_endian_and_mapped_scores_are_upsampled_bilinearly() -> None:
    import torch

    rng = np.random.default_rng(1)
    scores = rng.normal(size=(3, 5, 7)).astype(np.float16)
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(scores).float()[None, [0, 2]], IMAGE.shape[:2], mode="bilinear", align_corners=False
    )
    expected = np.array([7, 149])[upsampled[0].argmax(0).numpy()]
    for sent in (scores, scores.astype(">f4"), np.asfortranarray(scores)):
        body = npy(sent)
        with serving(reply("application/octet-stream", body)) as server:
            made = predictor(server.url, "model.http.returns=scores", "model.class_map=[7,null,149]")
            assert np.array_equal(labels_of(made), expected)
            assert "148 of the 150 classes can never be predicted" in " ".join(made.notes())


def test_what_is_sent() -> None:
    with serving(good) as server:
        predictor(f"{server.url}/base/?version=2", token=TOKEN).prepare("ADE_x", IMAGE)
        headers, data = server.requests[0]
        assert np.array_equal(np.array(Image.open(io.BytesIO(data))), IMAGE)  # without loss
        assert headers["Content-Type"] == headers["Accept"] == "image/png"
        assert headers["Authorization"] == f"Bearer {TOKEN}"
        labels_of(predictor(server.url, "model.http.send=jpeg"))
        headers, data = server.requests[1]
        assert (headers["Content-Type"], data[:3]) == ("image/jpeg", b"\xff\xd8\xff")
        assert "Authorization" not in headers
        assert (
            Endpoint(f"{server.url}/base/?version=2", 1, 0).address("predict") == f"{server.url}/base/predict?version=2"
        )


# what a server may do


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that promise a large image."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )


LABELS = np.ones((20, 30), np.uint8)
SCORES = np.zeros((150, 5, 8), np.float32)
NAN = np.where(np.arange(8) == 3, np.float32("nan"), SCORES)
INFINITE = np.where(np.arange(8) == 3, np.float32("inf"), SCORES)


class Pickled:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pickled",)


@pytest.mark.parametrize(
    ("kind", "body", "headers", "expected"),
    [
        ("image/png", png(LABELS.T), {}, "the label map is 20x30 (width x height), the image is 30x20"),
        ("image/png", huge_png(60000, 60000), {}, "the label map is 60000x60000|cannot be read"),
        ("text/html; charset=utf-8", b"<!doctype html>\n<title>Sign in</title>", {}, "sends 'text/html', expected image/png: '<!doctype html>'"),
        ("application/json", b'{"detail": "model is \\u001b[31m warming up"}', {}, "expected image/png: 'model is [31m warming up'"),
        ("image/png", b"", {}, "answers 200 and sends nothing"),
        ("image/png", png(LABELS)[:-30], {}, "cannot be read"),
        ("image/png", b"GIF89a", {}, "neither JPEG nor PNG but GIF"),
        ("image/png", png(LABELS + 150), {}, "holds the value 151; expected 0 (none) and 1..150"),
        ("image/png", png(IMAGE), {}, "a colour image, expected one 8-bit channel"),
        ("image/png", png(LABELS), {"Label_Encoding": "zero_based"}, "sends labels as 'zero_based', but model.encoding=official"),
        ("image/png", png(LABELS), {"Content_Encoding": "gzip"}, "sends its reply compressed"),
        ("image/png", bytes(100_000), {}, "the reply has 100,000 bytes, at most 66,736 were expected"),
        ("", png(LABELS), {}, "sends 'no Content-Type', expected image/png"),
        ("application/x-npy", npy(SCORES[:100]), {}, "the scores have 100 channels, expected 150"),
        ("application/x-npy", npy(NAN), {}, "12.5% of the scores are NaN or +inf"),
        ("application/x-npy", npy(INFINITE), {}, "12.5% of the scores are NaN or +inf"),
        ("application/x-npy", npy(np.array([Pickled()])), {}, "pickled objects, which are never loaded"),
        ("application/x-npy", npy(SCORES.astype(np.float64)), {}, "the scores are float64, expected float16 or float32"),
        ("application/x-npy", npy(SCORES.astype(np.int32)), {}, "the scores are int32"),
        ("application/x-npy", npy(SCORES[None]), {}, "have the shape [1, 150, 5, 8], expected [150, h, w]"),
        ("application/x-npy", npy(SCORES[:, :0]), {}, "have the shape [150, 0, 8]"),
        ("application/x-npy", npy(SCORES)[:-9], {}, "header says [150, 5, 8] float32, but 23,991 bytes follow"),
        ("application/x-npy", npy(SCORES).replace(b"5, 8)", b"5,9**9)"), {}, "no NumPy .npy file"),
        ("application/x-npy", b"\x93NUMPY", {}, "no NumPy .npy file"),
        ("image/png", png(LABELS), {"scores": "wanted"}, "sends 'image/png', expected application/x-npy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_wrong_reply_is_one_clear_message(
    kind: str, body: bytes, headers: dict[str, str], expected: str, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    scores = kind == "application/x-npy" or "scores" in headers
    with serving(reply(kind, body, **headers)) as server:
        made = predictor(server.url, f"model.http.returns={'scores' if scores else 'labels'}")
        with pytest.raises(HarnessError) as caught:
            made.prepare("ADE_x", IMAGE)
    text = str(caught.value)
    assert text.startswith(f"ADE_x: {server.url}/predict: ")
    assert any(overrides in text for overrides in expected.split("|")), text
    assert len(server.requests) == 1  # what is wrong once is wrong again
    assert text.isprintable()
    assert not waits
    assert not list(tmp_path.iterdir())  # nothing was run


def endless(handler: Handler, _: bytes) -> None:
    handler.send("image/png", b"", length=None)
    while True:
        handler.wfile.write(bytes(1 << 16))


def drip_body(handler: Handler, data: bytes) -> None:
    handler.send("image/png", b"", length=1000)
    for _ in range(300):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def drip_headers(handler: Handler, _: bytes) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Type: image/png; charset=" + b"x" * 300:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def silent(handler: Handler, _: bytes) -> None:
    time.sleep(1)


def cut_off(handler: Handler, data: bytes) -> None:
    handler.send("image/png", b"\x89PNG", length=50)


def no_http(handler: Handler, _: bytes) -> None:
    handler.wfile.write(b"220 mail.example.org ESMTP\r\n")


def hang_up(handler: Handler, _: bytes) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("behave", "expected"),
    [
        (drip_body, "no whole reply within 0.4 s (model.http.timeout_s); 1 try"),
        (drip_headers, "no whole reply within 0.4 s"),
        (silent, "no whole reply within 0.4 s"),
        (cut_off, "the connection was closed after 4 of 50 bytes"),
        (no_http, "the reply is an incomplete HTTP response (BadStatusLine)"),
        (hang_up, "the reply is an incomplete HTTP response (RemoteDisconnected)|no connection"),
        (endless, "more than the 66,736 bytes that were expected"),
    ],
)
def test_no_reply_ends_at_the_deadline_or_the_limit(behave: Behaviour, expected: str) -> None:
    with serving(behave) as server:
        made = predictor(server.url, "model.http.timeout_s=0.4", "model.http.retries=0")
        begin = time.monotonic()
        with pytest.raises(HarnessError) as caught:
            made.prepare("ADE_x", IMAGE)
        assert time.monotonic() - begin < 6  # a timeout per byte would take longer
    assert not isinstance(caught.value, EveryImageError)  # the server lives: it is this image's failure
    assert f"ADE_x: {server.url}/predict: " in str(caught.value)
    assert any(overrides in str(caught.value) for overrides in expected.split("|")), caught.value


def in_turn(*behaviours: Behaviour) -> Behaviour:
    rest = iter(behaviours)

    def behave(handler: Handler, data: bytes) -> None:
        next(rest)(handler, data)

    return behave


def status(code: int, text: str = "no", kind: str = "text/plain", **headers: str) -> Behaviour:
    return lambda handler, _: handler.send(kind, text.encode(), code, **headers)


def test_what_may_pass_is_tried_again_with_growing_waits(waits: list[float]) -> None:
    failing = (status(500), status(503), cut_off, hang_up)
    with serving(in_turn(*failing, good)) as server:
        assert (labels_of(predictor(server.url)) == 0).all()
        assert len(server.requests) == 5
    for wait, longest in zip(waits, (0.5, 1, 2, 4), strict=True):
        assert longest / 2 <= wait <= longest
    with serving(status(502, "<h1>Bad\x07 Gateway</h1>", "text/html")) as server:
        with pytest.raises(HarnessError, match=r"ADE_x: .* answers 502 Bad Gateway: '<h1>Bad Gateway</h1>'; 3 tries"):
            labels_of(predictor(server.url, "model.http.retries=2"))
        assert len(server.requests) == 3


def test_retry_after_is_honoured(waits: list[float]) -> None:
    later = formatdate(time.time() + 60, usegmt=True)
    odd = "Mon, 01 Jan 2024 00:00:00 +9999999999999"  # beyond any date that Python has
    turns = (status(429, Retry_After="7"), status(503, Retry_After=later), status(429, Retry_After=odd), good)
    with serving(in_turn(*turns)) as server:
        labels_of(predictor(server.url))
    assert waits[0] == 7
    assert 50 < waits[1] <= 60
    assert 1 <= waits[2] <= 2
    with serving(status(429, Retry_After="86400")) as server:
        with pytest.raises(EveryImageError, match="asks to wait for 86,400 s"):
            labels_of(predictor(server.url))
        assert len(server.requests) == 1


def test_waiting_really_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0.2)
    with serving(in_turn(status(500), good)) as server:
        begin = time.monotonic()
        labels_of(predictor(server.url))
        assert time.monotonic() - begin >= 0.1


@pytest.mark.parametrize(
    ("code", "of_all", "overrides"),
    [
        (400, False, "answers 400 Bad Request: 'no'"),
        (413, False, "model.http.send=jpeg sends less"),
        (415, False, "model.http.send chooses png or jpeg"),
        (401, True, "model.http.token_env names the environment variable"),
        (403, True, "model.http.token_env"),
        (404, True, "model.url is the address before /predict"),
    ],
)
def test_refusals_are_not_tried_again(code: int, of_all: bool, overrides: str, waits: list[float]) -> None:
    with serving(status(code)) as server:
        made = predictor(server.url)
        with pytest.raises(HarnessError) as caught:
            labels_of(made)
        assert overrides in str(caught.value)
        assert isinstance(caught.value, EveryImageError) == of_all
        with pytest.raises(HarnessError) as again:
            made.prepare("ADE_y", IMAGE)
        assert len(server.requests) == (1 if of_all else 2)  # after a refusal of all, nothing is asked any more
        assert (str(again.value) == str(caught.value)) == of_all
    assert not waits


def test_redirects_are_not_followed_so_the_token_goes_nowhere_else() -> None:
    with serving(good) as other, serving(status(307, Location=f"{other.url}/predict?key={TOKEN}")) as server:
        with pytest.raises(EveryImageError) as caught:
            labels_of(predictor(server.url, token=TOKEN))
        assert f"answers 307 and points to {other.url}/predict; redirects are not followed" in str(caught.value)
        assert TOKEN not in str(caught.value)
        assert not other.requests
        assert len(server.requests) == 1


def test_a_dead_endpoint_differs_from_an_image_that_fails(waits: list[float]) -> None:
    with serving(good) as server:
        made = predictor(server.url, "model.http.retries=1")
    with pytest.raises(EveryImageError) as first:
        labels_of(made)
    assert "the endpoint does not answer (no connection (Connection refused); 2 tries)" in str(first.value)
    with pytest.raises(EveryImageError, match=re.escape(str(first.value))):
        made.prepare("ADE_y", IMAGE)
    assert len(waits) == 1  # the second image was not tried


def test_a_run_that_breaks_off_ends_its_requests() -> None:
    with serving(lambda *_: time.sleep(4)) as server:
        made = predictor(server.url)
        threading.Timer(0.2, made.endpoint.stop).start()
        begin = time.monotonic()
        with pytest.raises(EveryImageError, match="stopped"):
            labels_of(made)
        assert time.monotonic() - begin < 3
        assert len(server.requests) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_certificates_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(good) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        made = predictor(f"https://localhost:{server.server_port}")
        exchange_module._tls.cache_clear()
        with pytest.raises(HarnessError, match="its certificate is not trusted"):
            labels_of(made)
        assert not waits
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        exchange_module._tls.cache_clear()
        assert (labels_of(made) == 0).all()
    exchange_module._tls.cache_clear()


@settings(deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: b"\x93NUMPY\x01\x00" + b))
def test_no_bytes_make_scores_but_scores(data: bytes) -> None:
    try:
        array = read_scores(data, 150, "x")
    except HarnessError:
        return
    assert array.shape[0] == 150


@settings(deadline=None)
@given(st.integers(1, 256), st.integers(1, 64), st.none() | st.integers(0, 300))
def test_the_ranks_share_the_limit(limit: int, world_size: int, workers: int | None) -> None:
    made = predictor("http://127.0.0.1:1", f"model.http.concurrency={limit}")
    if world_size > limit:
        with pytest.raises(HarnessError, match=f"each of the {world_size} ranks needs one request of its own"):
            made.loaders(workers, 0, world_size)
        return
    shares = [made.loaders(workers, rank, world_size) for rank in range(world_size)]
    assert sum(max(1, s.workers or 0) for s in shares) <= limit
    if workers is None:
        assert sum(s.workers or 0 for s in shares) == limit
    for share in shares:
        assert max_held(1, world_size, share.ahead * (share.workers or 0), share.at_once) == max(1, share.workers or 0)


# whole runs


def test_requests_overlap_but_never_more_than_the_limit(call: Call) -> None:
    def slow(handler: Handler, data: bytes) -> None:
        time.sleep(0.15)
        good(handler, data)

    with serving(slow) as server:
        done = call("model=http", f"model.url={server.url}", "model.http.concurrency=3", "dataset.limit=12", *FAST)
        assert done.code == 0, done.err
        assert server.maximum == 3
        assert len(server.requests) == 12
        server.requests.clear()
        server.maximum = 0
        done = call("model=http", f"model.url={server.url}", "runtime.workers=1", "dataset.limit=4", *FAST)
        assert done.code == 0, done.err
        assert (server.maximum, len(server.requests)) == (1, 4)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_a_server_that_is_killed_leaves_a_run_to_continue(
    call: Call, tmp_path: Path, on_error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "_FIRST_WAIT_S", 0.02)

    numbers = itertools.count(1)  # of requests: one more may be here before the server is gone

    def three_then_die(handler: Handler, data: bytes) -> None:
        number = next(numbers)
        if number > 3:
            handler.close_connection = True  # without an answer
            return
        good(handler, data)
        if number == 3:
            handler.server.shutdown()
            handler.server.server_close()

    overrides = (
        f"run.on_error={on_error}",
        "dataset.limit=8",
        "runtime.workers=0",
        "model.http.retries=2",
        "run.dir=run",
    )
    with serving(three_then_die) as server:
        done = call("model=http", f"model.url={server.url}", *overrides, *FAST)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.count("does not answer") == 1
    assert "No score: 3 of 8 images are counted." in done.err
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "incomplete"
    with serving(good, server.server_port) as back:
        again = call("resume", "run", "model.http.concurrency=2", "model.http.timeout_s=5")
        assert again.code == 0, again.err
        assert "continuing: 3 images are done" in again.out
        assert len(back.requests) == 7  # and two images that are counted, to see that the model is the same
        assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == 8


@pytest.mark.parametrize(
    ("then", "shown"),
    [
        ({"name": "test", "version": "2"}, "version was 1 at the start and is 2 now"),
        ({"name": "test"}, "version was 1 at the start and is not said now"),
        ({"name": "test", "version": "1"}, None),
    ],
)
def test_a_server_that_is_replaced_marks_the_run(
    call: Call, tmp_path: Path, then: dict[str, str], shown: str | None
) -> None:
    def replaced(handler: Handler, data: bytes) -> None:
        if len(handler.server.requests) == 2:
            handler.server.info = then
        good(handler, data)

    with serving(replaced) as server:
        done = call("model=http", f"model.url={server.url}", "dataset.limit=3", "run.dir=run", *FAST)
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert ("MIXED: continued with changed settings: a replaced server" in done.out) == (shown is not None)
    assert manifest.get("changes", []) == ([f"a replaced server: {shown}"] if shown else [])
    assert any("MIXED" in mark for mark in json.loads((tmp_path / "run/metrics.json").read_text())["marks"]) == bool(
        shown
    )


def test_an_image_that_fails_costs_that_image_only(call: Call, tmp_path: Path) -> None:
    def one_bad(handler: Handler, data: bytes) -> None:
        if len(handler.server.requests) == 2:
            status(422, '{"detail": "too green"}', "application/json")(handler, data)
        else:
            good(handler, data)

    with serving(one_bad) as server:
        overrides = ("model=http", f"model.url={server.url}", "dataset.limit=4", "runtime.workers=0", *FAST)
        done = call(*overrides, "run.dir=run")
        assert done.code == 2
        assert re.search(r"ADE_val_\d+: \S+/predict: answers 422 .*: 'too green'", done.err)
        assert "3 of 4 images are counted" in done.err
        server.info["sha256"] = "a" * 64  # the same address, but another model
        changed = call("resume", "run")
        assert changed.code == 2
        assert "checkpoint.sha256: was null" in changed.err
        server.requests.clear()
        skipped = call(*overrides, "run.dir=skip", "run.on_error=skip")
        assert skipped.code == 0, skipped.err
        assert "1 failed and were skipped" in skipped.out


def everything_written(folder: Path, *done: Done) -> bytes:
    files = [p.read_bytes() + str(p).encode() for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 5
    return b"".join(files) + "".join(d.out + d.err for d in done).encode()


def test_the_token_is_written_nowhere(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)

    def repeats_it(handler: Handler, data: bytes) -> None:
        reported = handler.headers["Authorization"]
        if len(handler.server.requests) == 2:
            handler.send_response(422, f"no {reported}")
            handler.send_header("Content-Type", "text/plain")
            handler.send_header("Content-Length", str(len(reported)))
            handler.end_headers()
            handler.wfile.write(reported.encode())
        elif len(handler.server.requests) == 3:
            handler.send(reported, reported.encode())
        elif len(handler.server.requests) == 4:
            handler.send("image/png", right_size(data), Label_Encoding=reported)
        else:
            good(handler, data)

    with serving(repeats_it) as server:
        server.info = {"name": f"the one with {TOKEN}", "version": TOKEN}
        overrides = ("model=http", f"model.url={server.url}", "model.http.token_env=MY_TOKEN", "dataset.limit=4")
        failed = call(*overrides, "run.dir=failed", "runtime.workers=0", "tracking=none")
        assert failed.code == 2
        assert "answers 422 no Bearer ***: 'Bearer ***'" in failed.err
        done = call(*overrides, "run.dir=done", "tracking.mode=offline", "model.http.concurrency=2")
        assert done.code == 0, done.err
        assert all(headers["Authorization"] == f"Bearer {TOKEN}" for headers, _ in server.requests)
    written = everything_written(tmp_path, failed, done)
    assert TOKEN.lower().encode() not in written.lower()
    assert b"MY_TOKEN" in written  # its name may be known
    assert TOKEN not in repr(Endpoint(server.url, 1, 1, TOKEN))


def test_a_token_is_hidden_before_a_reply_is_cut() -> None:
    for kind, body in (
        ("text/plain", "x" * 190 + TOKEN),
        ("application/json", json.dumps({"error": "x" * 190 + TOKEN})),
    ):
        with serving(status(400, body, kind)) as server, pytest.raises(HarnessError) as caught:
            labels_of(predictor(server.url, token=TOKEN))
        assert TOKEN[:5].lower() not in str(caught.value).lower()
        assert "xxx" in str(caught.value)


def test_the_reference_servers_token(call: Call, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setenv("MY_TOKEN", TOKEN)
    with reference_server(token=TOKEN) as (_, url):
        overrides = ("model=http", f"model.url={url}", "dataset.limit=1", "runtime.workers=0", *FAST)
        refused = call(*overrides)
        assert refused.code == 2
        assert refused.err.startswith(f"error: {url}/info: answers 401 Unauthorized: 'a bearer token is needed'.")
        assert call(*overrides, "model.http.token_env=MY_TOKEN").code == 0
        missing = call(*overrides, f"model.http.token_env={TOKEN.replace('-', '_')}")
        assert missing.code == 2
        assert "Give the name of the variable, not the token" in missing.err
        assert TOKEN.replace("-", "_") not in missing.err.replace(refused.err, "")
    assert not waits
    monkeypatch.setenv("MY_TOKEN", "two words")
    with pytest.raises(HarnessError, match="cannot be sent in a header"):
        read_token("MY_TOKEN")


def test_an_endpoint_that_is_not_there_is_reported_before_anything_is_made(
    call: Call, tmp_path: Path, waits: list[float]
) -> None:
    with serving(good) as server:
        pass
    done = call("model=http", f"model.url={server.url}", "dataset.limit=1", "run.dir=run", *FAST)
    assert done.code == 2
    assert done.err.startswith(f"error: {server.url}/info: the endpoint does not answer (no connection")
    assert not (tmp_path / "run").exists()
    assert len(waits) == 4


@pytest.mark.parametrize(
    "info", [b"", b"<html>", b"[1]", b'{"name": 3, "sha256": "abc", "version": "\\u001b[2J"}', b"[" * 5000, b"\xff"]
)
def test_odd_infos_are_no_infos(info: bytes) -> None:
    with serving(good) as server:
        server.RequestHandlerClass = type("Odd", (Handler,), {"do_GET": lambda h: h.send("text/html", info)})
        made = open_endpoint(config(f"model.url={server.url}"), ade20k_classes())
        assert made.info in ({}, {"version": "[2J"})
        assert made.source_hash("x") == ""


# mistakes in overrides


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.url=ftp://x"], "no http or https address"),
        (["model.url=localhost:8000"], "no http or https address"),
        (["model.url=http://"], "no http or https address"),
        (["model.url=http://x:99999"], "no http or https address"),
        (["model.url=http://x/a b"], "no http or https address"),
        (["model.url=http://[::1"], "no http or https address"),
        (["model.url=http://me:hunter2@x"], "holds a user or password"),
        (["model.url=http://x?sig=hunter2"], "sig in its query looks like a secret"),
        (["model.url=http://x?v=hunter2hunter2hunter2hunter2hunter2"], "v in its query looks like a secret"),
        (["model.url=http://x#hunter2"], "holds a fragment"),
        (["model.http.send=gif"], "model.http.send=gif: unknown value, expected one of png, jpeg"),
        (["model.http.returns=label"], "Did you mean 'labels'"),
        (["model.http.timeout_s=0"], "model.http.timeout_s=0: expected 0.1 to 3,600 seconds"),
        (["model.http.timeout_s=nan"], "model.http.timeout_s=nan: expected 0.1 to 3,600"),
        (["model.http.retries=-1"], "model.http.retries=-1: expected 0 to 20"),
        (["model.http.concurrency=0"], "model.http.concurrency=0: expected 1 to 256"),
        (["model.http.jpeg_quality=101"], "model.http.jpeg_quality=101: expected 1 to 100"),
        (["model.http.token_env=hunter2-x"], "the name of an environment variable"),
        (["model.class_map=[1]"], "Set model.http.returns=scores"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(overrides: list[str], expected: str) -> None:
    with pytest.raises(HarnessError) as caught:
        compose_config(["model=http", "model.url=http://127.0.0.1:9", *overrides])
    assert expected in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_mistakes_on_the_command_line() -> None:
    for overrides, expected in (
        ([], "model.url must be set"),
        (["model.url=http://x?v=1&api_key=hunter2"], "api_key in its query looks like a secret"),  # not Hydra's grammar
        (["model.url=http://x", "model.http.tokn_env=A"], "Did you mean 'model.http.token_env'"),
    ):
        with pytest.raises(HarnessError) as caught:
            compose_config(["model=http", *overrides])
        assert expected in str(caught.value)
        assert "hunter2" not in str(caught.value)
    assert compose_config(["model=http", "model.url=http://x/y?a=1&b=2"]).model.url == "http://x/y?a=1&b=2"


def test_a_query_that_is_no_secret_is_sent_but_not_shown() -> None:
    made = predictor("http://127.0.0.1:9/a?version=2024-10-01", "model.http.returns=labels")
    assert made.endpoint.shown("predict") == "http://127.0.0.1:9/a/predict"
    assert "2024" not in json.dumps(made.facts()) + " ".join(made.notes())
    plain = Endpoint("http://example.org", 1, 0, TOKEN)
    assert plain.is_open
    assert not Endpoint("https://example.org", 1, 0, TOKEN).is_open
    assert not Endpoint("http://127.0.0.1:5", 1, 0, TOKEN).is_open


# the reference server


@pytest.mark.parametrize("class_map", ["[0,1,2]", "[2,1,0]", "[0,null,1]"])
def test_scores_of_a_model_that_knows_some_of_the_classes_are_refused(class_map: str) -> None:
    """Also where its channels are the first classes in order: a client expects one channel for each class."""
    overrides = [
        "model=custom", "model._target_=tests.inference.test_predictor.Fixed", "model.kwargs.channels=3",
        f"model.class_map={class_map}", "inference=original_size", "runtime.accelerator=cpu",
    ]  # fmt: skip
    service = open_service(compose_config(overrides))
    with pytest.raises(RefusedError, match="not the classes in order: ask for labels"):
        service.answer(encode(IMAGE, "png"), scores=True).__enter__()
    with service.answer(encode(IMAGE, "png"), scores=False) as (_, kind):
        assert kind == "image/png"


@pytest.fixture(scope="module")
def server_address() -> Iterator[str]:
    with reference_server() as (_, url):
        yield url.removeprefix("http://")


JPEG = {"Content-Type": "image/jpeg"}


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "code", "overrides"),
    [
        ("GET", "/", {}, None, 404, "available: /predict, /info"),
        ("GET", "/predict", {}, None, 405, "takes POST"),
        ("POST", "/info", {}, b"", 405, "takes GET"),
        ("POST", "/predict", {"Content-Type": "text/plain"}, b"x", 415, "image/png or image/jpeg"),
        ("POST", "/predict", {**JPEG, "Transfer-Encoding": "chunked"}, b"0\r\n\r\n", 411, "Content-Length"),
        ("POST", "/predict", {**JPEG, "Content-Length": "99999999999"}, b"x", 413, "67,108,864 bytes"),
        ("POST", "/predict", {**JPEG, "Content-Length": "9" * 40}, b"x", 413, "67,108,864 bytes"),
        ("POST", "/predict", JPEG, b"hello", 400, "neither JPEG nor PNG"),
        ("POST", "/predict", JPEG, encode(IMAGE, "jpeg")[:-40], 400, "cannot be read"),
        ("POST", "/predict", {"Content-Type": "image/png"}, huge_png(9000, 8000), 413, "64,000,000"),
        ("POST", "/predict", {**JPEG, "Accept": "text/html"}, encode(IMAGE, "jpeg"), 406, "application/x-npy (scores)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_reference_server_refuses(
    server_address: str, method: str, path: str, headers: dict[str, str], body: bytes | None, code: int, overrides: str
) -> None:
    connection = http.client.HTTPConnection(server_address, timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    assert response.status == code
    assert response.getheader("Content-Type") == "application/json"
    assert overrides in json.loads(response.read())["error"]
    connection.close()


def test_the_reference_server_answers_on_one_connection(server_address: str) -> None:
    connection = http.client.HTTPConnection(server_address, timeout=10)
    connection.request("GET", "/info")
    reported = json.loads(connection.getresponse().read())
    assert (reported["name"], reported["inference"]) == ("demo", "original_size")
    for _ in range(2):
        connection.request("POST", "/predict", png(IMAGE), {"Content-Type": "image/png"})
        response = connection.getresponse()
        assert (response.getheader("Content-Type"), response.getheader("Label-Encoding")) == ("image/png", "official")
        assert np.array(Image.open(io.BytesIO(response.read()))).shape == (20, 30)
    asking = {"Content-Type": "image/png", "Accept": "application/x-npy"}
    connection.request("POST", "/predict?any=query", png(IMAGE), asking)
    scores = np.load(io.BytesIO(connection.getresponse().read()), allow_pickle=False)
    assert (scores.shape, scores.dtype) == ((150, 5, 8), np.float32)
    connection.close()


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /info HTTP/9.9\r\n\r\n", 505),
        (b"GET http://[x HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"PUT /predict HTTP/1.1\r\nHost: x\r\n\r\n", 501),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET /info HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),  # TLS, to a server without it
    ],
)
def test_what_is_no_request_is_refused_in_json(server_address: str, sent: bytes, code: int) -> None:
    host, port = server_address.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status == code
        assert response.getheader("Content-Type") == "application/json"
        assert json.loads(response.read())["error"]


def test_memory_for_bodies_and_scores_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    image = png(np.zeros((40, 50, 3), np.uint8))
    with reference_server("inference.tta.flip=true") as (_, url):
        host, port = url.removeprefix("http://").split(":")

        def ask(accept: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection(host, int(port), timeout=10)
            connection.request("POST", "/predict", image, {"Content-Type": "image/png", "Accept": accept})
            response = connection.getresponse()
            return response.status, response.read()

        for _ in range(3):  # what a body has taken is given back
            assert ask("image/png")[0] == 200
        monkeypatch.setattr("ade_harness.endpoint.service._MAX_SCORES_BYTES", 4 * 150 * 40 * 50 - 1)
        assert ask("application/x-npy")[0] == 413
        assert ask("image/png")[0] == 200
        monkeypatch.setattr("ade_harness.endpoint.server._MAX_BODIES_BYTES", len(image) - 1)
        assert ask("image/png")[0] == 503


def test_answers_that_nobody_reads_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small picture has a large answer of scores; a client may ask for many, and read none. Others wait their turn."""
    monkeypatch.setattr("ade_harness.endpoint.service._MAX_ANSWERS_BYTES", 4 * 150 * 400 * 400)
    monkeypatch.setattr("ade_harness.endpoint.service._WAIT_S", 0.5)
    image = png(np.zeros((400, 400, 3), np.uint8))
    head = (
        b"POST /predict HTTP/1.1\r\nContent-Type: image/png\r\nAccept: application/x-npy\r\nContent-Length: %d\r\n\r\n"
    )
    with reference_server("inference.tta.flip=true") as (_, url):
        host, port = url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port)), timeout=30) for _ in range(3)]
        try:
            for connection in silent:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.sendall(head % len(image) + image)
            starts = [connection.recv(12) for connection in silent]
            assert sorted(starts) == [b"HTTP/1.1 200", b"HTTP/1.1 503", b"HTTP/1.1 503"]
        finally:
            for connection in silent:
                connection.close()
        monkeypatch.setattr("ade_harness.endpoint.service._WAIT_S", 30.0)
        made = predictor(url, "model.http.returns=scores")
        with ThreadPoolExecutor(4) as pool:  # each reads its answer, so that all come
            found = list(pool.map(lambda _: labels_of(made), range(4)))
        assert all(np.array_equal(found[0], one) for one in found)


def test_connections_and_the_time_of_a_request_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ade_harness.endpoint.server._MAX_CONNECTIONS", 2)
    monkeypatch.setattr("ade_harness.endpoint.server._REQUEST_S", 1.0)
    with reference_server() as (_, url):
        host, port = url.removeprefix("http://").split(":")
        begin = time.monotonic()
        dripping = [socket.create_connection((host, int(port)), timeout=10) for _ in range(2)]
        for connection in dripping:
            connection.sendall(b"POST /predict HTTP/1.1\r\nA: ")
        time.sleep(0.2)
        third = http.client.HTTPConnection(host, int(port), timeout=10)
        third.request("GET", "/info")
        response = third.getresponse()
        assert (response.status, response.getheader("Retry-After")) == (503, "1")
        assert "2 connections are open already" in json.loads(response.read())["error"]
        for connection in dripping:  # a byte now and then would keep a timeout of single bytes away for ever
            with contextlib.suppress(OSError):
                for _ in range(100):
                    connection.sendall(b"x")
                    time.sleep(0.05)
            connection.close()
        assert time.monotonic() - begin < 9
        again = http.client.HTTPConnection(host, int(port), timeout=10)
        again.request("GET", "/info")
        assert again.getresponse().status == 200
        again.close()


def test_serve_says_what_is_wrong(call: Call, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    with serving(good) as taken:
        for overrides, expected in (
            (["--port", "many"], "serve: argument --port: invalid int value"),
            (["--prt=1"], "serve: unrecognized arguments: --prt=1"),
            (["dataset.limit=3"], "dataset.limit=3: has no effect on serve. Remove it."),
            (["+probe=dinov3_linear"], "+probe=dinov3_linear: has no effect on serve. Remove it."),
            (["model=predictions", "model.path=labels"], "gives label maps of a data set and has no network"),
            (["--token-env=NO_SUCH_VARIABLE"], "no environment variable of that name is set"),
            (["--port", str(taken.server_port)], f"cannot listen on 127.0.0.1 port {taken.server_port}"),
            (["--port", "700000"], "cannot listen on 127.0.0.1 port 700000"),
        ):
            done = call("serve", *overrides)
            assert done.code == 2
            assert expected in done.err
            assert "Traceback" not in done.err


def test_ctrl_c_while_a_connection_gets_its_thread_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread may be at its end before the signal's exception is: its place must not be given back twice."""
    begun = ThreadingHTTPServer.process_request

    def interrupted(self: Any, request: Any, address: Any) -> None:
        begun(self, request, address)
        for _ in range(500):
            if threading.active_count() == before:
                break
            time.sleep(0.01)
        raise KeyboardInterrupt

    service = open_service(compose_config([]))
    with make_server(service, "127.0.0.1", 0, None) as server:
        monkeypatch.setattr(ThreadingHTTPServer, "process_request", interrupted)
        client = socket.create_connection(server.server_address[:2])
        client.close()
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            server.serve_forever()


def test_a_server_of_other_classes_is_refused(call: Call) -> None:
    """Labels below 150 would be counted as ADE20K's, whatever they mean to the server."""
    ours = list(ade20k_classes().names)
    with serving(good) as server:
        overrides = ("model=http", f"model.url={server.url}", "dataset.limit=1", *FAST, "runtime.workers=0")
        for names, said in (
            (["road", "sidewalk", "car"], "/info: its labels are of 3 classes ('road', 'sidewalk', 'car', ...), and"),
            (ours[1:] + ours[:1], "/info: its class 0 is 'building', and"),
        ):
            server.info["classes"] = names
            one_message(call(*overrides), said)
        scores = call(*overrides, "model.http.returns=scores")
        assert scores.code == 2
        assert "By the model's own names: model.class_map=[1,2," in scores.err
        assert server.requests == []
        for names in (
            ours,
            [f"name {n}" for n in range(150)],
            [1, 2],
            "wall",
        ):  # of names that are nobody's nothing is known
            server.info["classes"] = names
            assert call(*overrides).code == 0


def test_a_token_of_serve_is_named_by_its_own_option(call: Call) -> None:
    one_message(call("serve", "--token-env", "NO_SUCH_VARIABLE"), "error: --token-env: no environment variable of that")


@pytest.mark.slow
def test_serve_runs_until_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ade_harness", "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"model\.url=(\S+)", line)
        assert url is not None, line
        assert Endpoint(url[1], 10, 0).info()["name"] == "demo"
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # leaving the block waits for it
    assert (process.returncode, out.strip(), err) == (0, "stopped", "")


def test_memory_is_for_so_many_pixels_at_a_time() -> None:
    """Whoever asks how often: room is taken before an image is decoded."""
    service = ModelService("x", None, torch.device("cpu"), True, None)  # type: ignore[arg-type]
    with service._place(40_000_000), service._place(24_000_000):
        with pytest.raises(RefusedError) as refused, service._place(1):
            pass
        assert refused.value.status == 503
    with service._place(64_000_000):
        pass
    with ExitStack() as stack:
        for _ in range(64):
            stack.enter_context(service._place(1))
        with pytest.raises(RefusedError), service._place(1):
            pass
    assert (service._waiting, service._pixels) == (0, 0)
