"""The rank's end of a W&B run that is open while the rank works: see :mod:`ade_harness.tracking.session`."""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from ade_harness.config.schema import TrackingConfig
from ade_harness.tracking.content import Content
from ade_harness.tracking.session import Start
from ade_harness.tracking.upload import ended, environment
from ade_harness.tracking.wandb_run import Entry

EVERY_S = 10.0
"""Between two rows of the run's history."""
_OPEN_S = 5.0
"""How long an evaluation that has ended waits for its run to open: the offline run and its upload come after."""
_LEAVE_S = 5.0
"""How long an evaluation that failed, or was asked to stop, waits for its run's end in W&B."""


@dataclass(frozen=True)
class Ended:
    """What came of a live run."""

    url: str | None
    """None: it was never open."""
    problem: str
    """Empty: all of it has arrived."""


class LiveRun:
    """A session in a process of its own.

    Args:
        cfg: the ``tracking`` node.
        entry: how the run is found.
        identifier: of the W&B run.
        on_open: called in another thread with the run's address, once it is open.
    """

    def __init__(
        self, cfg: TrackingConfig, entry: Entry, identifier: str, on_open: Callable[[str], None] = lambda _: None
    ) -> None:
        self._found: dict[str, Any] = {}
        self._printed: list[str] = []
        self._on_open = on_open
        self._begun = threading.Event()
        """It is open, or has ended."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ade_harness.tracking.session"],  # -P: nothing of the directory is imported
            env=environment(patient=True),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the evaluation
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._messages: queue.SimpleQueue[object | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()
        self._messages.put(Start(cfg, entry, identifier, os.getpid(), EVERY_S))

    def end(self, content: Content, timeout_s: float, patient: bool = False) -> Ended:
        """Log what the run holds, and wait until it has arrived.

        Args:
            content: what it holds.
            timeout_s: when to give up.
            patient: wait as long for a run that is not open yet: there is no other way.
        """
        with ended(self._process):
            self._messages.put(content)
            return self._wait(timeout_s, timeout_s if patient else min(_OPEN_S, timeout_s))

    def leave(self) -> None:
        """End the run without a content: an evaluation that failed, or that may go on later."""
        with ended(self._process):
            self._wait(_LEAVE_S, _LEAVE_S)

    def _wait(self, timeout_s: float, open_s: float) -> Ended:
        self._messages.put(None)
        begin = time.monotonic()
        opened = self._begun.wait(open_s)
        try:
            self._process.wait(max(0, timeout_s - (time.monotonic() - begin)) if opened else 0)
        except subprocess.TimeoutExpired:
            self._found["problem"] = (
                f"not done within tracking.timeout_s={timeout_s:g} seconds"
                if opened
                else f"not open within {open_s:g} seconds"
            )
        self._reader.join(1)  # what it has printed last
        return Ended(self._found.get("url"), self._problem())

    def _problem(self) -> str:
        problem = self._found.get("problem")
        if problem or self._found.get("done"):
            errors = [line for line in self._printed if "ERROR" in line]
            return str(problem or (errors[0] if errors else ""))
        last = next((line for line in reversed(self._printed) if line), "") or f"exit code {self._process.returncode}"
        return f"its process has ended: {last[:300]}"

    def _write(self) -> None:
        """Send what is put, until None ends it: beside the work, since a pipe is full after 64 kB."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError), pipe:  # the session has ended: `end` says why
            while (message := self._messages.get()) is not None:
                pipe.write(pickle.dumps(message))
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            self._read_lines(self._process.stdout)
        finally:
            self._begun.set()

    def _read_lines(self, pipe: IO[bytes]) -> None:
        for line in pipe:
            text = line.decode("utf-8", "replace").strip()
            try:
                message = json.loads(text) if text.startswith("{") else {}
            except ValueError:
                message = {}
            if not message:
                self._printed.append(text)
            self._found |= message
            if "url" in message:
                self._begun.set()
                with suppress(Exception):  # printing an address costs no run
                    self._on_open(str(message["url"]))
