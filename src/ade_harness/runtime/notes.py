"""What a rank and its supervisor report to each other beside logs: a note in shared memory, exit codes, one signal."""

from __future__ import annotations

import json
import mmap
import os
import shlex
import signal
from pathlib import Path

from ade_harness.runtime.cluster import SUPERVISED

GIVEN_FULL_ERROR = "ADE_HARNESS_FULL_ERROR"
"""Environment variable: what the user has set HYDRA_FULL_ERROR to, which we set too while Hydra runs."""
COMMAND = "ADE_HARNESS_COMMAND"
"""Environment variable: the command that the user gave, as JSON; ranks have it from their supervisor."""
EXIT_MESSAGE = 2
"""Something that the user can fix, or Ctrl-C; the rank has reported what."""
EXIT_STOPPED = 75
"""Asked to stop (SIGTERM, or the signal before a time limit); what was counted is kept."""
EXIT_RANK_LOST = 76
"""Another rank died; what this one counted is kept."""
SIBLING_DIED = signal.SIGUSR2
"""The supervisor's signal to the ranks of its node after one of them has died."""

NOTE_BYTES = 2048
DONE = "done"
"""Field of a note: the rank has come to the end of its work."""


class Note:
    """A few bytes of shared memory in which a rank reports to its supervisor what it does; they outlive a kill."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), NOTE_BYTES)
        self._content: dict[str, str] = {}

    def write(self, **content: str) -> None:
        """Change some fields."""
        self._content |= content
        text = json.dumps({k: v[:400] for k, v in self._content.items()}).encode()[: NOTE_BYTES - 1]
        self._memory[: len(text) + 1] = text + b"\0"

    @staticmethod
    def read(path: Path) -> dict[str, str]:
        """Return the fields; empty if there are none, or if the rank was killed while it wrote."""
        try:
            content: dict[str, str] = json.loads(path.read_bytes().split(b"\0")[0] or b"{}")
        except (OSError, ValueError):
            return {}
        return content


def note_done() -> None:
    """Tell the supervisor, if there is one, that this rank has come to the end of its work."""
    path = os.environ.get(SUPERVISED)
    if path:
        note = Note(Path(path))
        note.write(**Note.read(Path(path)), **{DONE: "yes"})


def open_note() -> Note | None:
    """Return this rank's note to its supervisor, if it has one."""
    path = os.environ.get(SUPERVISED)
    return Note(Path(path)) if path else None


def resume_command(run_dir: str | Path) -> str:
    """Return the command that continues a run."""
    return f"python -m ade_harness resume {shlex.quote(str(run_dir))}"
