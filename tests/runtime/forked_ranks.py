"""Runs commands on any number of ranks quickly: imports everything once, then forks one process per rank.

Reads one JSON object per line: {"overrides": [...], "ranks": N, "cwd": ..., "port": ..., "kill": [rank, images] or null};
answers with the list of exit codes. With "kill" a rank kills itself once it has counted so many images. With
"overrides_of" each rank gets overrides of its own, and is a node of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    from tests.warm import import_all

    import_all()
    for line in sys.stdin:
        job = json.loads(line)
        size = job["ranks"]
        if job["overrides_of"] is None:  # as a supervisor does: ranks do not compose what is the same for all
            work = [rank_of([*job["overrides"], f"runtime.devices={size}"])] * size
        else:
            nodes = ["runtime.devices=1", f"runtime.num_nodes={size}"]
            work = [rank_of([*job["overrides"], *nodes, *own]) for own in job["overrides_of"]]
        children = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                os._exit(run_rank(work[rank], job, rank))
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(codes), flush=True)


def rank_of(overrides: list[str]) -> Callable[[], int]:
    """Return the work of a rank; a mistake in its configuration is raised when it is called."""
    from ade_harness.cli.launch import be_rank
    from ade_harness.config.compose import compose_config
    from ade_harness.config.composed import Composed
    from ade_harness.evaluation.session import run_session

    composed = Composed.from_config(compose_config(overrides))
    return lambda: be_rank(composed.config, lambda found: run_session(composed, found))


def run_rank(work: Callable[[], int], job: dict, rank: int) -> int:
    from ade_harness.cli.main import guarded

    size = str(job["ranks"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    if job["overrides_of"] is not None:
        os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    os.chdir(job["cwd"])
    log = os.open(f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["kill"] is not None and job["kill"][0] == rank:
        kill_after(job["kill"][1])
    try:
        return guarded(work)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()


def kill_after(images: int) -> None:
    from ade_harness.evaluation.recorder import Recorder

    record, count = Recorder.record, 0

    def counted(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        nonlocal count
        record(self, *arguments)
        count += 1
        if count == images:
            self.writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.record = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
