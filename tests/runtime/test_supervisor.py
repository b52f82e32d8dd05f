"""Deaths of ranks, as a user meets them: one clear message, in bounded time, and everything can be continued."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest

from tests.conftest import Done
from tests.runtime.slow_model import SLOW_MODEL
from tests.warm import WarmPopen

IMAGES = 24
OVERRIDES = (
    "model=custom", "model._target_=slow_model.Net", "inference=original_size", f"dataset.limit={IMAGES}",
    "tracking=none", "runtime.accelerator=cpu", "runtime.workers=0", "run.overlays=0", "run.dir=run",
)  # fmt: skip
pytestmark = pytest.mark.slow


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    return tmp_path


class Started:
    """A command that runs."""

    def __init__(self, work: Path, *overrides: str, **environment: str) -> None:
        self.run = work / "run"
        (self.run / "progress.json").unlink(missing_ok=True)  # of an earlier part
        self.process = WarmPopen(
            [sys.executable, "-m", "ade_harness", *OVERRIDES, *overrides], cwd=work, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip

    def until(self, images: int, timeout_s: float = 90) -> None:
        """Wait for progress: so many images are done, every rank has done one and is processing another."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError):
                progress = json.loads((self.run / "progress.json").read_text())
                if progress["done"] >= images and all(rank["item"] and rank["done"] for rank in progress["ranks"]):
                    return
            time.sleep(0.05)
        raise AssertionError("no progress: " + "".join(self.process.communicate(timeout=5)))

    def ranks(self) -> list[psutil.Process]:
        """Return the rank processes in their order, which is that of their start."""
        return sorted(psutil.Process(self.process.pid).children(), key=psutil.Process.create_time)

    def end(self, timeout_s: float = 60) -> Done:
        """Wait for the end."""
        out, err = self.process.communicate(timeout=timeout_s)
        return Done(self.process.returncode, out, err)


@pytest.fixture
def start(work: Path) -> Iterator[Callable[..., Started]]:
    running: list[Started] = []

    def begin(*overrides: str, **environment: str) -> Started:
        running.append(Started(work, *overrides, **environment))
        return running[-1]

    yield begin
    for started in running:
        if started.process.poll() is None:
            os.killpg(started.process.pid, signal.SIGKILL)
            started.process.communicate()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expected")
    (folder / "slow_model.py").write_text(SLOW_MODEL)
    done = Started(folder, SLOW_MODEL_SECONDS="0").end()
    assert done.code == 0, done.err
    return folder / "run"


def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "ledger").sort_values("image_id").reset_index(drop=True)


def assert_same(run: Path, expected: Path) -> None:
    assert table(run).image_id.is_unique
    assert table(run).label_hash.tolist() == table(expected).label_hash.tolist()
    assert np.array_equal(np.load(run / "confusion_matrix.npy"), np.load(expected / "confusion_matrix.npy"))


@pytest.mark.parametrize(("ranks", "victim"), [(2, 0), (2, 1)])
def test_a_killed_rank_is_named_and_the_run_goes_on_later(
    start: Callable[..., Started], cli: Callable[..., Done], work: Path, expected: Path, ranks: int, victim: int
) -> None:
    started = start(f"runtime.devices={ranks}", SLOW_MODEL_SECONDS="0.7")
    started.until(4)
    process = started.ranks()[victim]
    process.kill()
    begin = time.monotonic()
    done = started.end()
    assert time.monotonic() - begin < 20
    assert done.code == 128 + 9
    assert re.search(
        rf"error: rank {victim} on \S+ \(process {process.pid}\) was killed by SIGKILL \(often the kernel, when memory"
        r" runs out: see dmesg\) while processing ADE_val_\d{8}\.",
        done.err,
    ), done.err
    assert "Traceback" not in done.err
    assert done.err.strip().splitlines()[-1] == "  python -m ade_harness resume run"
    assert not (started.run / "metrics.json").exists()
    assert len(table(started.run)) > 0  # the other rank has saved its counts
    again = cli("resume", "run", "runtime.devices=2", SLOW_MODEL_SECONDS="0")
    assert again.code == 0, again.err
    assert_same(started.run, expected)


def test_restarts_continue_by_themselves(start: Callable[..., Started], expected: Path) -> None:
    started = start("runtime.devices=2", "runtime.max_restarts=2", SLOW_MODEL_SECONDS="0.5")
    started.until(3)
    started.ranks()[0].kill()
    done = started.end(120)
    assert done.code == 0, done.err
    assert "restart 1 of 2: completed images are saved." in done.err
    assert_same(started.run, expected)
    assert len(json.loads((started.run / "manifest.json").read_text())["earlier"]) == 1


def test_all_killed_at_once(start: Callable[..., Started], cli: Callable[..., Done], expected: Path) -> None:
    """Also the supervisor: nothing can be reported, and nothing is lost; ranks do not outlive it."""
    started = start("runtime.devices=2", SLOW_MODEL_SECONDS="0.7")
    started.until(3)
    ranks = started.ranks()
    started.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive  # they noticed by themselves, and saved their counts
    assert len(table(started.run)) >= 3
    shown = cli("status", "run")
    assert "interrupted" in shown.out
    assert "python -m ade_harness resume run" in shown.out
    again = cli("resume", "run", "runtime.devices=3", SLOW_MODEL_SECONDS="0")
    assert again.code == 0, again.err
    assert_same(started.run, expected)
    assert "state:          finished" in cli("status", "run").out


def test_a_crash_of_the_models_code_shows_its_log(start: Callable[..., Started], work: Path) -> None:
    (work / "slow_model.py").write_text(
        SLOW_MODEL.replace(
            "        n, _, h, w", "        if os.environ['RANK'] == '1':\n            os.abort()\n        n, _, h, w"
        )
    )
    done = start("runtime.devices=2", SLOW_MODEL_SECONDS="0").end()
    assert done.code == 128 + 6
    assert re.search(r"error: rank 1 on \S+ \(process \d+\) was killed by SIGABRT", done.err), done.err
    assert "rank00001.log" in done.err or "Its log is empty." in done.err


def test_an_unexpected_error_on_one_rank_ends_all(start: Callable[..., Started], work: Path) -> None:
    """Such as a CUDA error: its traceback is in the message, whichever rank it was."""
    (work / "slow_model.py").write_text(
        SLOW_MODEL.replace(
            "        n, _, h, w",
            "        if os.environ['RANK'] == '1':\n            raise RuntimeError('CUDA error: an illegal memory access')\n"
            "        n, _, h, w",
        )
    )
    begin = time.monotonic()
    done = start("runtime.devices=2", SLOW_MODEL_SECONDS="0.1").end()
    assert done.code == 1
    assert time.monotonic() - begin < 60
    assert re.search(r"error: rank 1 on \S+ \(process \d+\) ended with exit code 1", done.err), done.err
    assert "CUDA error: an illegal memory access" in done.err
    assert "rank00001.log" in done.err


def test_sigterm_and_the_time_limits_signal_end_in_order(
    start: Callable[..., Started], cli: Callable[..., Done], expected: Path
) -> None:
    """SIGTERM here; the time limit's SIGUSR1 takes the same way: tests/slurm."""
    started = start("runtime.devices=2", SLOW_MODEL_SECONDS="0.7")
    started.until(3)
    started.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    done = started.end()
    assert time.monotonic() - begin < 15
    assert done.code == 75, done.err
    assert "Stopped. Completed work is saved; to resume:\n  python -m ade_harness resume run" in done.err
    assert "Traceback" not in done.err
    assert 3 <= len(table(started.run)) < IMAGES
    again = cli("resume", "run", SLOW_MODEL_SECONDS="0")
    assert again.code == 0, again.err
    assert_same(started.run, expected)


def test_a_silent_rank_is_lost_after_the_time_that_was_set(start: Callable[..., Started]) -> None:
    """Stopped, as by a hanging driver: it does not answer even to signals."""
    started = start("runtime.devices=2", "runtime.dead_after_s=5", SLOW_MODEL_SECONDS="0.3")
    started.until(2)
    process = started.ranks()[1]
    process.suspend()
    begin = time.monotonic()
    done = started.end()
    assert 4 < time.monotonic() - begin < 40
    assert done.code == 76
    text = rf"error: rank 1 on \S+ \(process {process.pid}\) has been silent for 5 s, last processing ADE_val_\d+"
    assert re.search(text, done.err), done.err


def test_a_slow_rank_is_named_and_the_queue_spares_it(start: Callable[..., Started], work: Path) -> None:
    settings = {"SLOW_MODEL_SECONDS": "0.3", "SLOW_MODEL_RANK": "1", "SLOW_MODEL_FACTOR": "5"}
    done = start("runtime.devices=2", "dataset.limit=40", **settings).end(120)
    assert done.code == 0, done.err
    found = table(work / "run")["rank"].value_counts()
    assert found[0] > 2 * found[1]
    assert re.search(r"warning: rank 1 on \S+ takes \d\.\d times as long as the median rank", done.out), done.out
    assert "Note: rank 1 on" in done.out  # with the result too
    assert re.search(r"balance: +\d\d\.\d%, a rank was idle for", done.out)
    log = (work / "run/logs/rank00001.log").read_text()
    assert re.search(r"rank 1: \d+ of 40 images, \d+\.\d images/s, \d+:\d\d left", log), log


def test_status_of_a_running_job_from_another_shell(start: Callable[..., Started], cli: Callable[..., Done]) -> None:
    started = start("runtime.devices=2", SLOW_MODEL_SECONDS="5")
    started.until(1)
    shown = cli("status", "run")
    assert shown.code == 0
    assert re.search(r"state: +running \(process \d+ on ", shown.out), shown.out
    assert re.search(r"progress: +\d+ of 24 images, \d+\.\d images/s, \d+:\d\d left", shown.out), shown.out
    assert len(re.findall(r"ADE_val_\d{8}", shown.out)) == 2  # what each rank is processing
    # and a second job is refused while this one lives
    second = cli(*OVERRIDES)
    assert second.code == 2
    assert "another job is working on this run (process" in second.err
    started.process.send_signal(signal.SIGTERM)
    started.end()


@pytest.mark.parametrize(
    ("ranks", "call", "code", "message"),
    [
        (2, "sys.exit(0)", 2, r"error: the model, or a library it uses, called sys\.exit\(0\) at \S+slow_model\.py:\d+, in forward"),
        (1, "os._exit(0)", 1, r"error: rank 0 on \S+ .* exited early with code 0 .*os\._exit\) while processing"),
        (2, "os._exit(0)", 1, r"error: rank 1 on \S+ .* exited early with code 0 .*os\._exit\) while processing"),
    ],
)  # fmt: skip
def test_a_model_that_exits_is_a_fault(
    start: Callable[..., Started], work: Path, ranks: int, call: str, code: int, message: str
) -> None:
    leave = f"        if os.environ['RANK'] == '{ranks - 1}':\n            import sys\n            {call}\n        n, _, h, w"
    (work / "slow_model.py").write_text(SLOW_MODEL.replace("        n, _, h, w", leave))
    begin = time.monotonic()
    done = start(f"runtime.devices={ranks}", SLOW_MODEL_SECONDS="0.1").end()
    assert done.code == code, done.err
    assert time.monotonic() - begin < 60
    assert re.search(message, done.err), done.err
    assert not (work / "run/metrics.json").exists()


@pytest.mark.parametrize("after_s", [0.0, 1.0, 5.0])
def test_ranks_end_with_their_supervisor_also_while_they_start(start: Callable[..., Started], after_s: float) -> None:
    started = start("runtime.devices=2", SLOW_MODEL_SECONDS="1")
    end = time.monotonic() + 60
    while len(ranks := psutil.Process(started.process.pid).children()) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(after_s)
    if started.process.stderr is not None:
        started.process.stderr.close()  # nobody reads what a rank would like to say
    os.kill(started.process.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(ranks, timeout=60)  # they look once they have imported what they need
    assert not alive, [p.cmdline() for p in alive]
    assert len(gone) == len(ranks)


def test_a_node_that_never_comes_is_one_message(start: Callable[..., Started]) -> None:
    """Seen from node 0, and from another node: each waits for the other at a port of its own."""
    begun = {}
    for rank in ("0", "1"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        node = {"NODE_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        begun[rank] = start("runtime.num_nodes=2", "runtime.timeout_min=0.1", f"run.dir=run{rank}", **node)
    for rank, message in (
        ("0", r"error: not all of the 2 ranks came to 127\.0\.0\.1:\d+ within runtime\.timeout_min=0\.1 minutes"),
        ("1", r"error: rank 1 on \S+ cannot reach rank 0 at 127\.0\.0\.1:\d+ within runtime\.timeout_min=0\.1 min"),
    ):
        done = begun[rank].end()
        assert done.code == 2, done.err
        assert re.search(message, done.err), done.err
        assert "Traceback" not in done.err
