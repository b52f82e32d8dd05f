"""Kill ranks at random moments, continue on another number of ranks, and compare every bit with an undisturbed run.

    python benchmarks/interruptions.py                                    # the synthetic images
    python benchmarks/interruptions.py --images 2000
    python benchmarks/interruptions.py model=... dataset=ade20k dataset.root=...      # any evaluation

Prints a table: what was killed, when, how many images were kept, how long it took until the command had ended, and
whether confusion matrix and the label hash of every image are equal to those of one rank.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
from rich.console import Console
from rich.table import Table

COMMON = ("tracking=none", "run.overlays=0", "runtime.workers=0")


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    what: str
    moment: float | None
    kept: int | None
    noticed_s: float | None
    equal: bool


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "ade_harness", *COMMON, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def finish(words: list[str]) -> None:
    command = [sys.executable, "-m", "ade_harness", *COMMON, *words]
    if words[0] == "resume":
        command = [sys.executable, "-m", "ade_harness", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(words)}\n{done.stdout}{done.stderr}")


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


def killed_run(words: list[str], run: Path, victim: str, seconds: float, ranks: int) -> tuple[int, float]:
    """Kill `victim` after `seconds` of work; returns images kept, and seconds until the command had ended."""
    process = start([*words, f"run.dir={run}", f"runtime.devices={ranks}"])
    while not (run / "manifest.json").exists() and process.poll() is None:
        time.sleep(0.02)
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    begin = time.monotonic()
    if process.poll() is None:
        alive = ranks_of(process.pid)
        doomed = list(alive.values()) if victim == "all" else [alive[int(victim)]] if int(victim) in alive else []
        if victim == "all":
            process.kill()
        for rank in doomed:
            rank.kill()
        process.wait(120)
        psutil.wait_procs(list(alive.values()), timeout=60)
    ended = time.monotonic() - begin
    ledger = run / "ledger"
    return (len(pd.read_parquet(ledger)) if ledger.is_dir() and any(ledger.iterdir()) else 0), ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="synthetic images, if no words are given")
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rules", nargs="+", default=["queue", "plan"])
    parser.add_argument("--victims", nargs="+", default=["0", "1", "all"])
    parser.add_argument("--seed", type=int, default=0)
    arguments, words = parser.parse_known_args()
    words = words or [f"dataset.images={arguments.images}"]
    words += ["runtime.accelerator=cpu"]
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    rng = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reference = root / "reference"
        finish([*words, f"run.dir={reference}"])
        for sharding in arguments.rules:
            for ranks in arguments.ranks:
                run = root / f"{sharding}{ranks}"
                finish([*words, f"run.dir={run}", f"runtime.devices={ranks}", f"runtime.sharding={sharding}"])
                outcomes.append(Outcome(f"{ranks} ranks, {sharding}", None, None, None, same(run, reference)))
        timings = json.loads((root / f"{arguments.rules[0]}{arguments.ranks[-1]}/manifest.json").read_text())["timings"]
        duration = max(share["active_seconds"] for share in timings["ranks"])
        for victim in arguments.victims:
            for number in range(arguments.moments):
                run, moment = root / f"kill-{victim}-{number}", rng.uniform(0, duration)
                kept, ended = killed_run(words, run, victim, moment, 3)
                finish(["resume", str(run), f"runtime.devices={rng.choice((1, 2, 4))}"])
                name = "all ranks and their supervisor" if victim == "all" else f"rank {victim} of 3"
                outcomes.append(Outcome(f"kill -9 of {name}", moment, kept, ended, same(run, reference)))
    table = Table(title=f"{len(outcomes)} runs of: {' '.join(words)}")
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
