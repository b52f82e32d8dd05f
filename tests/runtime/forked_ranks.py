"""Runs commands on any number of ranks quickly: imports everything once, then forks one process per rank.

Reads one JSON object per line: {"words": [...], "ranks": N, "cwd": ..., "port": ..., "kill": [rank, images] or null};
answers with the list of exit codes. With "kill" a rank kills itself once it has counted so many images. With
"words_of" each rank gets words of its own, and is a node of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    import ade_harness.evaluation.outcome
    import ade_harness.evaluation.story
    from ade_harness.cli.main import main as command

    del ade_harness
    for line in sys.stdin:
        job = json.loads(line)
        children = []
        for rank in range(job["ranks"]):
            pid = os.fork()
            if pid == 0:
                os._exit(run_rank(command, job, rank))
            children.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(codes), flush=True)


def run_rank(command, job: dict, rank: int) -> int:  # type: ignore[no-untyped-def]
    size = str(job["ranks"])
    own = job["words_of"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    devices = [f"runtime.devices={size}"]
    if own is not None:
        os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": str(rank), "LOCAL_WORLD_SIZE": "1"}
        devices = ["runtime.devices=1", f"runtime.num_nodes={size}", *own[rank]]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
    os.chdir(job["cwd"])
    log = os.open(f"rank{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["kill"] is not None and job["kill"][0] == rank:
        kill_after(job["kill"][1])
    try:
        return command([*job["words"], *devices])
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
