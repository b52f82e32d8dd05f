"""What of this machine this process may use: cores and memory, by its affinity and its control groups.

A container or a SLURM task may have 2 of a node's 128 cores, which ``os.cpu_count()`` does not see. The limits of a
group hold for all groups below it, so that the smallest from this process's own group up to the root counts: SLURM
sets those of a job, not of each task. Version 1 and version 2 of the kernel's control groups are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
"""A line for each hierarchy: number, controllers (none of version 2), and this process's group."""


def usable_cores() -> int:
    """Return the cores that this process may use, at least 1: a quota of 1.5 cores is 2."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, round(quota)) for quota in _cpu_quotas())])


def usable_memory() -> int:
    """Return the bytes of memory that this process and the others of its control groups may have together."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = {1: "memory.limit_in_bytes", 2: "memory.max"}
    found = [memory]
    for version, group in _groups("memory"):
        with suppress(OSError, ValueError):  # no limit is "max", or more than any machine has
            found.append(int((group / names[version]).read_text()))
    return min(found)


def _cpu_quotas() -> Iterator[float]:
    """Yield the quotas of this process's groups, in cores."""
    for version, group in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if version == 2:
                quota, period = map(int, (group / "cpu.max").read_text().split())  # no limit: "max PERIOD"
            else:
                quota, period = (int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            if quota > 0:  # version 1 writes -1 where there is none
                yield quota / period


def _groups(controller: str) -> Iterator[tuple[int, Path]]:
    """Yield (version, folder) of this process's groups with a controller, from its own up to the root.

    In a container the root may be the group itself, under a path that only the host has: what is not there is passed
    over by who reads in it.
    """
    try:
        lines = _OWN.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        version, top = (1, _ROOT / controllers) if controllers else (2, _ROOT)
        if controllers and not top.is_dir():
            top = _ROOT / controller  # "cpu,cpuacct" and the like are linked by each name
        group = top / path.strip("/")
        while group != top and top in group.parents:
            yield version, group
            group = group.parent
        yield version, top
