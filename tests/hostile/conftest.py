"""How many attacks of each kind: ``--hostile=2000`` for a thorough run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ade_harness.errors import HarnessError
from ade_harness.files.escapes import without_long_words

LONGEST_S = 20.0
"""For one damaged file of some kilobytes, on a busy machine."""
MOST_BYTES = 1 << 30
"""Bytes of memory, beyond what the process had before, for one damaged file of some kilobytes."""
MOST_LEFT_BYTES = 200 << 20
"""Bytes of memory, after all attacks of a kind: what libraries load and keep once."""


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


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Let an attack pass only if it takes no more memory than it may, and leaves no process."""
    me = psutil.Process()
    before, children = me.memory_info().rss, set(me.children(recursive=True))
    with suppress(OSError):  # a container may forbid it: then the peak is that of the process's life
        Path("/proc/self/clear_refs").write_text("5")
    yield
    taken = _peak_bytes() - before
    assert taken < MOST_BYTES, f"{what}: took {taken >> 20} MiB"
    _, alive = psutil.wait_procs(set(me.children(recursive=True)) - children, timeout=5)
    assert not alive, f"{what}: left {alive}"


def _peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(status["VmHWM"].split()[0]) * 1024


def attack(seeds: range, door: Callable[[int], Any], kind: str, most_left: int = 2) -> None:
    """Try a door with every seed.

    Args:
        seeds: of the attacks.
        door: what is attacked.
        kind: for messages.
        most_left: files that may stay open.
    """
    me = psutil.Process()
    memory = files = 0
    for seed in seeds:
        with bounded(f"{kind}, seed {seed}"), clear(f"{kind}, seed {seed}"):
            door(seed)
        if seed == seeds[0]:  # what it imports, and libraries keep, is there from now on
            gc.collect()
            gc.freeze()  # and need not be looked at again
            memory, files = me.memory_info().rss, me.num_fds()
    gc.collect()
    assert me.memory_info().rss - memory < MOST_LEFT_BYTES, f"{kind}: keeps memory"
    assert me.num_fds() <= files + most_left, f"{kind}: leaves files open"
