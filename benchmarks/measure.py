"""Time and memory, measured so that two ways can be compared on a machine that is not quite quiet."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import torch
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "numpy", "numba", "opencv-python-headless", "pillow")


@dataclass(frozen=True)
class Row:
    """One variant's times in milliseconds, and its memory in MiB if it was measured."""

    name: str
    median: float
    low: float
    high: float
    peak: float | None = None


class TimedLoop(Protocol):
    """A run that knows how much of its time was the network's."""

    def run(self) -> Any:
        """Do the work."""

    @property
    def forward_seconds(self) -> float:
        """Time inside the network during the last run."""


def one_thread() -> None:
    """Keep PyTorch and OpenCV on one thread."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


def interleave(variants: Mapping[str, Callable[[], Any]], rounds: int = 5, per: float = 1) -> list[Row]:
    """Time variants in turn, each once a round on one thread, so that a change of load meets all of them.

    Args:
        variants: name -> what to time; each is called once before, untimed.
        rounds: how often.
        per: times are divided by it, such as the number of images.
    """
    seconds = _seconds({name: (call, float) for name, call in variants.items()}, rounds)
    return [_row(name, [total for total, _ in pairs], per) for name, pairs in seconds.items()]


def interleave_loops(
    loops: Mapping[str, TimedLoop], rounds: int = 5, per: float = 1
) -> tuple[list[Row], list[Row], dict[str, float]]:
    """Time loops like `interleave`, and take each run's forward off that run.

    Returns:
        The rows of whole runs, the rows outside the forward, and the median forward in milliseconds by name.
    """
    calls = {name: (loop.run, lambda loop=loop: loop.forward_seconds) for name, loop in loops.items()}
    seconds = _seconds(calls, rounds)
    whole = [_row(name, [total for total, _ in pairs], per) for name, pairs in seconds.items()]
    outside = [_row(name, [total - inner for total, inner in pairs], per) for name, pairs in seconds.items()]
    forward = {name: statistics.median(inner for _, inner in pairs) * 1e3 / per for name, pairs in seconds.items()}
    return whole, outside, forward


def _seconds(
    calls: Mapping[str, tuple[Callable[[], Any], Callable[[], float]]], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    one_thread()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        if number < 2:  # the objects of libraries, which the untimed round may import too, stay: each collection would
            gc.collect()  # look at all of them again, for up to half a second
            gc.freeze()
        for name, (call, inner) in calls.items():
            gc.collect()
            start = time.perf_counter()
            call()
            total = time.perf_counter() - start
            if number:
                found[name].append((total, inner()))
    gc.unfreeze()
    return found


def _row(name: str, seconds: list[float], per: float) -> Row:
    scaled = [s * 1e3 / per for s in seconds]
    return Row(name, statistics.median(scaled), min(scaled), max(scaled))


def peak_memory(call: Callable[[], Any]) -> float:
    """Return by how many MiB a call makes this process's resident memory grow at its highest (Linux).

    Call it once before: the first call also loads libraries. Memory that the process already holds free is
    given back first; what the caller keeps alive does not count.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    result = call()
    peak = _status_kib("VmHWM")
    del result
    return max(0, peak - before) / 1024


def add_peaks(rows: Iterable[Row], variants: Mapping[str, Callable[[], Any]]) -> list[Row]:
    """Return the rows with each variant's `peak_memory`."""
    return [replace(row, peak=peak_memory(variants[row.name])) for row in rows]


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def machine_line(packages: Iterable[str] = PACKAGES) -> str:
    """Return one line: processor, cores that may be used, GPU, load, Python and package versions."""
    cpu = Path("/proc/cpuinfo")
    names = [line for line in cpu.read_text().splitlines() if line.startswith("model name")] if cpu.exists() else []
    parts = [names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()]
    parts.append(f"{len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} thread(s)")
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    parts.append(f"load {os.getloadavg()[0]:.1f}")
    versions = [f"Python {platform.python_version()}"]
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join([*parts, ", ".join(versions)])


def table(title: str, rows: list[Row], unit: str = "ms") -> Table:
    """Return rows as a Rich table, with ratios against the first one."""
    made = Table(title=title, title_justify="left")
    for column in _columns(rows, unit):
        made.add_column(column, justify="left" if column == "variant" else "right", no_wrap=column != "variant")
    for cells in _cells(rows):
        made.add_row(*cells)
    return made


def markdown(title: str, rows: list[Row], unit: str = "ms") -> str:
    """Return rows as a Markdown table, with ratios against the first one."""
    columns = _columns(rows, unit)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *_cells(rows)]
    return "\n".join([f"### {title}", "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def _columns(rows: list[Row], unit: str) -> list[str]:
    return ["variant", unit, "min..max", "ratio"] + ["peak MiB"] * any(row.peak is not None for row in rows)


def _cells(rows: list[Row]) -> list[list[str]]:
    with_peak = any(row.peak is not None for row in rows)
    cells = []
    for row in rows:
        ratio = row.median / rows[0].median if rows[0].median else float("nan")
        line = [row.name, f"{row.median:.3f}", f"{row.low:.3f}..{row.high:.3f}", f"{ratio:.3f}x"]
        if with_peak:
            line.append("" if row.peak is None else f"{row.peak:.1f}")
        cells.append(line)
    return cells


def show(title: str, rows: list[Row], unit: str = "ms", packages: Iterable[str] = PACKAGES) -> None:
    """Print a table, and below it the machine and the versions."""
    console = Console()
    console.print(table(title, rows, unit))
    console.print(machine_line(packages), style="dim", highlight=False)
