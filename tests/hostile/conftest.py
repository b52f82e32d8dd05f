"""How many attacks of each kind: ``--hostile=2000`` for a thorough run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ade_harness.errors import HarnessError
from ade_harness.files.escapes import without_long_words

LONGEST_S = 20.0
"""For one damaged file of some kilobytes, on a busy machine."""


@pytest.fixture
def seeds(request: pytest.FixtureRequest) -> range:
    return range(int(request.config.getoption("--hostile")))


@contextmanager
def clear(what: str) -> Iterator[None]:
    """Let an attack pass only if it is taken, or refused in one message in time."""
    begin = time.monotonic()
    try:
        yield
    except HarnessError as error:
        text = without_long_words(str(error))  # as it is shown
        assert text.strip(), what
        assert "Traceback" not in text, what
        assert len(text) < 5000, f"{what}: a message of {len(text)} characters"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.monotonic() - begin < LONGEST_S, what


def attack(seeds: range, door: Callable[[int], Any], kind: str) -> None:
    """Try a door with every seed."""
    for seed in seeds:
        with clear(f"{kind}, seed {seed}"):
            door(seed)
