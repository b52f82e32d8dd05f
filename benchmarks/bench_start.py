"""From the command to the end of two images: what a start costs. `python benchmarks/bench_start.py`.

A run of two synthetic images on N ranks does next to no work, so its time is the start: the supervisor's own, that of
the ranks (imports, rendezvous, model, kernels), and the end. Beside it the two imports that every rank needs, alone:
Lightning as it comes, and without what no evaluation uses (`ade_harness/runtime/lazy_imports.py`). Variants take turns.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine_line
from rich.console import Console
from rich.table import Table

LEAN = "from ade_harness.runtime.lazy_imports import import_lightning; import_lightning(); "
IMPORTS = {
    "import torch": "import torch",
    "import torch, lightning.pytorch": "import torch, lightning.pytorch",
    "import torch, lightning.pytorch, lean": f"{LEAN}import torch, lightning.pytorch",
}


def seconds(command: list[str], folder: Path) -> float:
    """Return the wall time of a command."""
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begin


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
                found[f"a run of 2 images on {ranks} ranks"] = seconds(command, folder)
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
