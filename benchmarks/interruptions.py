"""Kill ranks at random moments, continue on another number of ranks, and compare every bit with an undisturbed run.

    python benchmarks/interruptions.py                                    # the synthetic images
    python benchmarks/interruptions.py --images 2000
    python benchmarks/interruptions.py model=... dataset=ade20k dataset.root=...      # any evaluation

Prints a table: what was killed, when, how many images were kept, how long it took until the command had ended, and
whether confusion matrix and the label hash of every image are equal to those of one rank.

Victims: a rank's number; "all" ranks and their supervisor; "start", the supervisor while its ranks start, which have to
end by themselves; "sum", rank 1 once all images are in the ledger, while the ranks' counts are summed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

NAMES = {
    "all": "all ranks and their supervisor",
    "start": "the supervisor while ranks start",
    "sum": "rank 1 of 3 while counts are summed",
}
COMMON = ("tracking=none", "run.overlays=0", "runtime.workers=0")


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    what: str
    moment: float | None
    kept: int | None
    noticed_s: float | None
    equal: bool


def start(overrides: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ade_harness", *COMMON, *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(overrides: list[str]) -> None:
    command = [sys.executable, "-m", "ade_harness", *COMMON, *overrides]
    if overrides[0] == "resume":
        command = [sys.executable, "-m", "ade_harness", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(overrides)}\n{done.stdout}{done.stderr}")


def hashes(run: Path) -> dict[str, str]:
    frame = pd.read_parquet(run / "ledger", columns=["image_id", "label_hash"])
    return dict(zip(frame.image_id, frame.label_hash, strict=True)) if frame.image_id.is_unique else {}


def same(run: Path, reference: Path) -> bool:
    name = "confusion_matrix.npy"
    return hashes(run) == hashes(reference) and (run / name).read_bytes() == (reference / name).read_bytes()


def progress(run: Path) -> int:
    try:
        return int(json.loads((run / "progress.json").read_text())["done"])
    except (OSError, ValueError):
        return 0


def ranks_of(supervisor: int) -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(supervisor).children():
        try:
            found[int(child.environ()["RANK"])] = child
        except (psutil.Error, KeyError):
            continue
    return found


def counted(run: Path) -> int:
    """Return how many images the ledger holds."""
    return sum(pq.read_metadata(file).num_rows for file in (run / "ledger").glob("[!.]*.parquet"))


def wait_for(process: subprocess.Popen[bytes], holds: Callable[[], bool]) -> None:
    while process.poll() is None and not holds():
        time.sleep(0.005)


def the_moment(process: subprocess.Popen[bytes], run: Path, victim: str, seconds: float) -> None:
    """Wait until somebody is to be killed."""
    if victim == "start":
        wait_for(process, lambda: bool(ranks_of(process.pid)))
        return
    wait_for(process, (run / "manifest.json").exists)
    if victim == "sum":
        images = int(json.loads((run / "manifest.json").read_text())["dataset"]["images"])
        wait_for(process, lambda: counted(run) == images)
    else:
        end = time.monotonic() + seconds
        wait_for(process, lambda: time.monotonic() > end)


def killed_run(overrides: list[str], run: Path, victim: str, seconds: float, ranks: int) -> tuple[int, float]:
    """Kill `victim` after `seconds` of work; returns images kept, and seconds until all of it had ended."""
    process = start([*overrides, f"run.dir={run}", f"runtime.devices={ranks}"])
    the_moment(process, run, victim, seconds)
    begin = time.monotonic()
    if process.poll() is None:
        alive = ranks_of(process.pid)
        number = {"sum": 1, "all": None, "start": None}.get(victim, victim)
        if victim in ("all", "start"):
            process.kill()
        doomed = list(alive.values()) if victim == "all" else [alive[int(number)]] if number is not None else []
        for rank in doomed:
            rank.kill()
        process.wait(120)
        _, left = psutil.wait_procs(list(alive.values()), timeout=60)
        if left:
            raise SystemExit(f"{victim}: {left} did not end within a minute of their supervisor's death")
    return counted(run) if (run / "ledger").is_dir() else 0, time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="synthetic images, if no overrides are given")
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rules", nargs="+", default=["queue", "static"])
    parser.add_argument("--victims", nargs="+", default=["0", "1", "all", "start", "sum"])
    parser.add_argument("--seed", type=int, default=0)
    arguments, overrides = parser.parse_known_args()
    overrides = overrides or [f"dataset.images={arguments.images}"]
    overrides += ["runtime.accelerator=cpu"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rng = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reference = root / "reference"
        finish([*overrides, f"run.dir={reference}"])
        for sharding in arguments.rules:
            for ranks in arguments.ranks:
                run = root / f"{sharding}{ranks}"
                finish([*overrides, f"run.dir={run}", f"runtime.devices={ranks}", f"runtime.sharding={sharding}"])
                outcomes.append(Outcome(f"{ranks} ranks, {sharding}", None, None, None, same(run, reference)))
        timings = json.loads((root / f"{arguments.rules[0]}{arguments.ranks[-1]}/manifest.json").read_text())["timings"]
        duration = max(share["active_seconds"] for share in timings["ranks"])
        for victim in arguments.victims:
            for number in range(arguments.moments):
                run, moment = root / f"kill-{victim}-{number}", rng.uniform(0, duration)
                known = None if victim in ("start", "sum") else moment
                kept, ended = killed_run(overrides, run, victim, moment, 3)
                again = ["resume", str(run)] if (run / "manifest.json").exists() else [*overrides, f"run.dir={run}"]
                finish([*again, f"runtime.devices={rng.choice((1, 2, 4))}"])
                name = NAMES.get(victim, f"rank {victim} of 3")
                outcomes.append(Outcome(f"kill -9 of {name}", known, kept, ended, same(run, reference)))
    table = Table(title=f"{len(outcomes)} runs of: {' '.join(overrides)}")
    for column in ("what", "killed after s", "images kept", "ended after s", "equal bits"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for o in outcomes:
        cells = (
            "" if v is None else f"{v:.1f}" if isinstance(v, float) else str(v) for v in (o.moment, o.kept, o.noticed_s)
        )
        table.add_row(o.what, *cells, "yes" if o.equal else "NO")
    Console(width=110).print(table)
    if not all(o.equal for o in outcomes):
        raise SystemExit("some bits differ")


if __name__ == "__main__":
    main()
