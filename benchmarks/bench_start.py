"""From the command to the end of two images: what a start costs. `python benchmarks/bench_start.py`.

A run of two synthetic images on N ranks does next to no work, so its time is the start: the supervisor's own, that of
the ranks (imports, rendezvous, model, kernels), and the end. Beside it the two imports that every rank needs, alone:
Lightning as it comes, and without what no evaluation uses (`ade_harness/runtime/lazy_imports.py`). Variants take turns.
The parts of a start are those of rank 0, one after the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from measure import machine_line
from rich.console import Console
from rich.table import Table

MOMENTS = Path(__file__).with_name("start_moments")
LEAN = "from ade_harness.runtime.lazy_imports import import_lightning; import_lightning(); "
IMPORTS = {
    "import torch": "import torch",
    "import torch, lightning.pytorch": "import torch, lightning.pytorch",
    "import torch, lightning.pytorch, lean": f"{LEAN}import torch, lightning.pytorch",
}


PARTS = {
    "process start": "process", "imports": "imports", "rendezvous": "before dataset of nodes",
    "data set": "before model", "weights": "model", "kernels": "kernels", "run directory": "record",
}  # fmt: skip
"""Parts of a start, and the moment of `start_moments/sitecustomize.py` that ends each."""


def seconds(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> float:
    """Return the wall time of a command."""
    begin = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begin


def parts(begin: float, moments: Path, end: float) -> dict[str, float]:
    """Return the seconds of each part of a start, on the clock of `time.time`."""
    found = dict(line.split("\t") for line in moments.read_text().splitlines())
    times = [begin, *(float(found[moment]) for moment in PARTS.values()), end]
    names = [*PARTS, "two images, the score, the end"]
    return {name: after - before for name, before, after in zip(names, times[:-1], times[1:], strict=True)}


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cold", action="store_true", help="count the first round too")
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(
            0 if not options.cold else 1, options.rounds + 1
        ):  # the first fills caches and is not counted
            found = {name: seconds([sys.executable, "-c", code], folder) for name, code in IMPORTS.items()}
            for ranks in options.ranks:
                overrides = [
                    "dataset.images=2",
                    f"run.dir=run{ranks}-{number}",
                    "tracking=none",
                    f"runtime.devices={ranks}",
                ]
                command = [sys.executable, "-m", "ade_harness", *overrides, "runtime.accelerator=cpu", "run.overlays=0"]
                run, moments = f"a run of 2 images on {ranks} ranks", folder / f"moments{ranks}-{number}"
                path = os.pathsep.join([str(MOMENTS), *filter(None, [os.environ.get("PYTHONPATH")])])
                begin = time.time()
                found[run] = seconds(command, folder, {"BENCH_START_MOMENTS": str(moments), "PYTHONPATH": path})
                of_parts = parts(begin, moments, begin + found[run])
                found |= {f"  {name} ({ranks})": value for name, value in of_parts.items()}
            for name, value in found.items() if number else ():
                times.setdefault(name, []).append(value)
    table = Table(title="start-up, seconds", title_justify="left")
    for column in ("what", "median", "lowest", "highest"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, values in times.items():
        table.add_row(name, *(f"{v:.2f}" for v in (statistics.median(values), min(values), max(values))))
    Console(width=100).print(table)
    print(machine_line())


if __name__ == "__main__":
    main()
