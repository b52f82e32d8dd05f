"""A rank that a supervisor starts: ``python -m ade_harness.cli.rank``.

It imports what is slow while its supervisor still composes the configuration, then takes that from a file: ranks
do not compose it again.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ade_harness.cli.launch import be_rank
from ade_harness.cli.main import guarded
from ade_harness.cli.work import WORK
from ade_harness.config.composed import Composed
from ade_harness.files.logs import configure_log
from ade_harness.runtime.cluster import HANDOVER
from ade_harness.runtime.console import debug_messages
from ade_harness.runtime.lazy_imports import import_lightning
from ade_harness.runtime.lifetime import importing, leave
from ade_harness.runtime.notes import note_done
from ade_harness.runtime.orphans import exit_with_supervisor

_POLL_S = 0.01


def main() -> int:
    """Do a rank's share of what the supervisor hands over; returns the exit code."""
    exit_with_supervisor()
    code = guarded(_run)
    if code == 0:
        note_done()
    return code


def _run() -> int:
    path = Path(os.environ[HANDOVER])
    with importing():  # here, before anything is known: both kinds of work need it
        import_lightning()
        import ade_harness.evaluation.session  # noqa: F401
    while not path.exists():
        time.sleep(_POLL_S)
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    composed = Composed.from_json(content)
    with debug_messages() if content["logging"] is None and content["verbose"] else nullcontext():
        if content["logging"] is not None:
            configure_log(content["logging"], content["verbose"])
        return be_rank(composed.config, lambda found: WORK[content["work"]](composed, found))


if __name__ == "__main__":
    leave(main())
