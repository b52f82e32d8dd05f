"""The HTTP side of the server: reads and checks requests, and answers each in a thread of its own."""

from __future__ import annotations

import hmac
import json
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

from ade_harness import __version__
from ade_harness.endpoint.client import first_line
from ade_harness.endpoint.predictor import ENCODING_HEADER, LABELS_TYPE, SCORES_TYPE

_MAX_BYTES = 64 << 20
_SLOW_CLIENT_S = 60
"""From one byte to the next."""
_REQUEST_S = 120.0
"""For a whole request to arrive: 64 MiB at 0.6 MB/s."""
_MAX_BODIES_BYTES = 8 * _MAX_BYTES
"""Bodies of all requests at a time."""
_PIECE_BYTES = 1 << 20
"""Read of a body at a time."""
_MAX_CONNECTIONS = 128
"""At once; each has a thread."""
_IMAGE_TYPES = ("image/png", "image/jpeg")


Body = tuple[bytes | memoryview, ...]
"""The parts of an answer, in order."""


class RefusedError(Exception):
    """A request that gets an error for an answer."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = headers


class Service(Protocol):
    """What answers requests."""

    def info(self) -> dict[str, Any]:
        """Return the reply to GET /info."""

    def answer(self, data: bytes, scores: bool) -> AbstractContextManager[tuple[Body, str]]:
        """Give the label map (or scores) of an image file, as bytes, and their type, until they are sent.

        Raises:
            RefusedError: in the context manager's beginning.
        """


class Server(ThreadingHTTPServer):
    """Listens, and hands each connection to a thread."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], service: Service, token: str | None) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)
        self.service = service
        self.token = token
        self._connections = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._bodies, self._lock = 0, threading.Lock()

    def take(self, number: int) -> int:
        """Reserve memory for a body, or give it back; returns the bytes.

        Raises:
            RefusedError: bodies that are under way need too much.
        """
        with self._lock:
            if number > 0 and self._bodies + number > _MAX_BODIES_BYTES:
                raise RefusedError(503, "too many bytes are under way: try again", **{"Retry-After": "1"})
            self._bodies += number
        return number

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, or the answer that there are too many."""
        if self._connections.acquire(blocking=False):
            try:
                super().process_request(request, client_address)
            except RuntimeError:  # no thread could be started; after Ctrl-C one may have been, and gives its place back
                self._connections.release()
                raise
            return
        body = json.dumps({"error": f"{_MAX_CONNECTIONS} connections are open already"}).encode()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with suppress(OSError):
            request.settimeout(1)
            request.sendall(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection; then there is room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be silent about clients that go away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = _SLOW_CLIENT_S
    _held = 0
    """Bytes of the request's body, until it is answered."""

    def version_string(self) -> str:
        return f"ade-harness/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: a request's line may hold what nobody should read."""

    def handle_one_request(self) -> None:
        """Read and answer a request, which has to arrive in bounded time, however slowly its bytes come."""
        self._arrival = threading.Timer(_REQUEST_S, self._hang_up)
        self._arrival.daemon = True
        self._arrival.start()
        try:
            super().handle_one_request()
        finally:
            self._arrival.cancel()

    def _hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is no HTTP, or no method of ours, as any other error: in JSON."""
        self.request_version = "HTTP/1.1"  # of what could not be read it would be 0.9, which has no headers
        self.requestline = getattr(self, "requestline", "")
        self._refuse(RefusedError(int(code), message or self.responses.get(code, ("refused", ""))[0]))
        self.close_connection = True

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        if self.request_version == "HTTP/0.9":  # it knows neither statuses nor headers
            self.send_error(505, "HTTP/1.0 or HTTP/1.1 is needed")
            return
        try:
            try:
                path = urlsplit(self.path).path
            except ValueError as error:
                raise RefusedError(400, "the address cannot be read") from error
            expected = {"/info": "GET", "/predict": "POST"}.get(path)
            if expected is None:
                raise RefusedError(404, "no such address: available: /predict, /info")
            if method != expected:
                raise RefusedError(405, f"{path} takes {expected}", Allow=expected)
            self._check_token()
            if method == "GET":
                self._reply(200, (json.dumps(self.server.service.info()).encode(),), "application/json", {})
                return
            scores = self._asks_for_scores()
            data = self._read()
            self._arrival.cancel()  # the network may take its time
            with self.server.service.answer(data, scores) as (body, kind):
                self._reply(200, body, kind, {} if scores else {ENCODING_HEADER: "official"})
        except RefusedError as error:
            self._refuse(error)
        except OSError:
            self.close_connection = True  # the client went away, or is too slow
        except Exception as error:  # a client must always get an answer; the owner sees why
            print(f"serve: {type(error).__name__}: {first_line(str(error))}", file=sys.stderr, flush=True)
            self._refuse(RefusedError(500, "the server failed"))
        finally:
            self.server.take(-self._held)
            self._held = 0

    def _check_token(self) -> None:
        token = self.server.token
        given = self.headers.get("Authorization", "").encode(errors="replace")
        if token is not None and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise RefusedError(401, "a bearer token is needed", **{"WWW-Authenticate": "Bearer"})

    def _asks_for_scores(self) -> bool:
        wanted = self.headers.get("Accept") or "*/*"
        accepted = {part.partition(";")[0].strip().lower() for part in wanted.split(",")}
        if SCORES_TYPE in accepted:
            return True
        if accepted.isdisjoint((LABELS_TYPE, "image/*", "*/*")):
            raise RefusedError(406, f"Accept: expected {LABELS_TYPE} (labels) or {SCORES_TYPE} (scores)")
        return False

    def _read(self) -> bytes:
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in _IMAGE_TYPES:
            raise RefusedError(415, f"Content-Type: expected {' or '.join(_IMAGE_TYPES)}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise RefusedError(411, "Content-Length is needed")
        if len(length) > 12 or int(length) > _MAX_BYTES:
            raise RefusedError(413, f"at most {_MAX_BYTES:,} bytes are accepted")
        data = bytearray()
        while left := int(length) - len(data):
            number = min(left, _PIECE_BYTES)
            self._held += self.server.take(number)  # as it comes: who sends slowly holds no more than that
            part = self.rfile.read(number)
            data += part
            if len(part) < number:
                raise RefusedError(400, f"the request ended after {len(data):,} of {length} bytes")
        return bytes(data)

    def _refuse(self, error: RefusedError) -> None:
        try:
            body = (json.dumps({"error": str(error)}).encode(),)
            # what was sent may still be under way: it is no next request
            self._reply(error.status, body, "application/json", {**error.headers, "Connection": "close"})
            self._drain()
        except OSError:
            self.close_connection = True

    def _drain(self) -> None:
        """Take what is still coming, so that the answer is not lost in a reset of the connection."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        end = time.monotonic() + 5
        while time.monotonic() < end and self.connection.recv(1 << 16):
            pass

    def _reply(self, status: int, body: Body, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        length = sum(map(len, body))
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for part in body:
            self.wfile.write(part)
