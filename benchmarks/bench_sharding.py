"""Real ranks on this machine, one of them slowed: time of the queue and of static shares against the ideal.

    python benchmarks/bench_sharding.py

The network sleeps in proportion to its input's pixels, so ranks do not compete for cores and the ideal is known:
all work over the sum of the ranks' speeds. Ranks are processes through Lightning's DDP, as in any run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

SLEEPER = """
import os, time, torch

class Net(torch.nn.Module):
    def forward(self, images):
        n, _, h, w = images.shape
        slow = 1.5 if os.environ["RANK"] == os.environ["SLOW_RANK"] else 1.0
        time.sleep(slow * h * w * float(os.environ["SECONDS_PER_PIXEL"]))
        return torch.zeros(n, 150, (h + 3) // 4, (w + 3) // 4)
"""
SECONDS_PER_PIXEL = 1e-5


def run(folder: Path, images: int, ranks: int, sharding: str, slow: bool) -> tuple[float, float]:
    """Return (ideal seconds, seconds of the last rank)."""
    directory = folder / f"{ranks}{sharding}{slow}"
    settings = {"SLOW_RANK": str(ranks - 1) if slow else "none", "SECONDS_PER_PIXEL": str(SECONDS_PER_PIXEL)}
    overrides = [
        "model=custom", "model._target_=sleeper.Net", "inference=original_size", f"dataset.limit={images}",
        "tracking=none",
        "runtime.accelerator=cpu", f"runtime.devices={ranks}", f"runtime.sharding={sharding}", "run.overlays=0",
        f"run.dir={directory}", "runtime.workers=1",
    ]  # fmt: skip
    command = [sys.executable, "-m", "ade_harness", *overrides]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    frame = pd.read_parquet(directory / "ledger")
    work = (frame.height * frame.width).sum() * SECONDS_PER_PIXEL
    ideal = work / (ranks - 1 + (1 / 1.5 if slow else 1.0))
    shares = json.loads((directory / "manifest.json").read_text())["timings"]["ranks"]
    return ideal, max(share["active_seconds"] for share in shares)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rules", nargs="+", choices=["queue", "static"], default=["queue", "static"])
    parser.add_argument("--no-slow-rank", action="store_true")
    options = parser.parse_args()
    table = Table(title=f"{options.images} synthetic images, a network that sleeps")
    for column in ("ranks", "one slow", "rule", "ideal s", "measured s", "efficiency"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sleeper.py").write_text(SLEEPER)
        for ranks in options.ranks:
            for slow in (False, True)[: 1 if options.no_slow_rank else 2]:
                for sharding in options.rules:
                    ideal, measured = run(Path(folder), options.images, ranks, sharding, slow)
                    cells = (str(ranks), "yes" if slow else "", sharding, f"{ideal:.1f}", f"{measured:.1f}")
                    table.add_row(*cells, f"{100 * ideal / measured:.1f} %")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
