"""One HTTP request and its reply, within one deadline: connecting, TLS, sending, and every byte that comes back.

Libraries' timeouts begin again with each byte, so that a server which sends one byte a minute holds them for ever. This
also follows no redirect and uses no proxy, no ``.netrc`` and no cookie: what a request carries goes to the address that
was given, and to no other.
"""

from __future__ import annotations

import io
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import SplitResult, urlsplit

_CHUNK = 1 << 16
_LOOK_UP_S = 0.5


class NoReplyError(Exception):
    """No whole reply came; the text says why.

    Attributes:
        passing: whether it may go better another time.
    """

    def __init__(self, reason: str, passing: bool = True) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    reason: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def content_type(self) -> str:
        """Without parameters, in lower case; empty if none was sent."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def exchange(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    timeout_s: float,
    max_bytes: int,
    quote: int,
    on_wait: Callable[[], None] = lambda: None,
) -> Reply:
    """Send a request on a connection of its own and read the whole reply.

    Args:
        method: such as POST.
        url: http or https, without credentials.
        headers: beside Host, Content-Length and the like; printable, without line breaks.
        body: to send.
        timeout_s: for everything together, except looking up the host's name.
        max_bytes: of the reply's body, if the status is 2xx.
        quote: bytes that are read of the body of any other reply.
        on_wait: called now and then while nothing comes; what it raises ends the request.

    Raises:
        NoReplyError: no connection, no HTTP, too slow, cut off, or too large.
    """
    end = time.monotonic() + timeout_s
    parts = urlsplit(url)
    connection = None
    try:
        connection = _connect(parts, end)
        _send(connection, _head(method, parts, headers, len(body)) + body, end)
        arriving: Any = _Arriving(connection, end, on_wait)
        response = HTTPResponse(arriving, method=method)
        response.begin()
        return _read(response, max_bytes, quote)
    except TimeoutError:
        raise NoReplyError(f"no whole reply within {timeout_s:g} s (model.http.timeout_s)") from None
    except ssl.SSLCertVerificationError as error:
        raise NoReplyError(f"its certificate is not trusted ({error.verify_message})", passing=False) from error
    except (socket.gaierror, UnicodeError) as error:
        raise NoReplyError(f"the host name cannot be looked up ({error.args[-1]})") from error
    except OSError as error:
        raise NoReplyError(f"no connection ({error.strerror or type(error).__name__})") from error
    except (HTTPException, ValueError) as error:
        raise NoReplyError(f"the reply is an incomplete HTTP response ({type(error).__name__})") from error
    finally:
        if connection is not None:
            connection.close()


class _Arriving(io.RawIOBase):
    """A connection's bytes as a file that ends with TimeoutError at the deadline."""

    def __init__(self, connection: socket.socket, end: float, on_wait: Callable[[], None]) -> None:
        self._connection = connection
        self._end = end
        self._on_wait = on_wait

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            self._connection.settimeout(min(_left(self._end), _LOOK_UP_S))
            try:
                return self._connection.recv_into(buffer)
            except TimeoutError:
                self._on_wait()

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse asks of a socket."""
        return io.BufferedReader(self)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _connect(parts: SplitResult, end: float) -> socket.socket:
    host, secure = parts.hostname or "", parts.scheme == "https"
    failed: OSError = OSError("no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host, parts.port or (443 if secure else 80), type=socket.SOCK_STREAM
    ):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(_left(end))
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if not secure:
                return connection
            connection.settimeout(_left(end))
            return _tls().wrap_socket(connection, server_hostname=host)
        except OSError as error:
            connection.close()
            if isinstance(error, TimeoutError | ssl.SSLError):
                raise
            failed = error
    raise failed


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reading the system's certificates takes a while


def _head(method: str, parts: SplitResult, headers: Mapping[str, str], length: int) -> bytes:
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    fields = {
        "Host": parts.netloc,
        "User-Agent": "ade-harness",
        "Accept-Encoding": "identity",
        "Connection": "close",
        **({"Content-Length": str(length)} if method == "POST" else {}),
        **headers,
    }
    return "".join([f"{method} {target} HTTP/1.1\r\n", *(f"{k}: {v}\r\n" for k, v in fields.items()), "\r\n"]).encode()


def _send(connection: socket.socket, data: bytes, end: float) -> None:
    left = memoryview(data)
    while left:
        connection.settimeout(_left(end))
        try:
            left = left[connection.send(left[:_CHUNK]) :]
        except (BrokenPipeError, ConnectionResetError):
            return  # a server that refuses closes early; its reply may be there already, and is worth more


def _read(response: HTTPResponse, max_bytes: int, quote: int) -> Reply:
    headers = {name.lower(): value for name, value in response.getheaders()}
    good = 200 <= response.status < 300
    announced = response.length
    if good and announced is not None and announced > max_bytes:
        raise NoReplyError(f"the reply has {announced:,} bytes, at most {max_bytes:,} were expected", passing=False)
    maximum = max_bytes if good else quote
    body = bytearray()
    while len(body) <= maximum and (chunk := response.read(min(_CHUNK, maximum + 1 - len(body)))):
        body += chunk
    if good and len(body) > maximum:
        raise NoReplyError(f"the reply has more than the {maximum:,} bytes that were expected", passing=False)
    if good and announced is not None and len(body) < announced:
        raise NoReplyError(f"the connection was closed after {len(body):,} of {announced:,} bytes")
    return Reply(response.status, response.reason, headers, bytes(body[:maximum]))
