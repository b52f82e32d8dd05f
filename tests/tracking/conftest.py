"""One stand-in for W&B for all tests of this folder's file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.tracking.stub_server import StubServer, serve


@pytest.fixture(scope="module")
def stub() -> Iterator[StubServer]:
    """Run a server on loopback."""
    with serve() as server:
        yield server
