"""Cores and memory of affinity and control groups, versions 1 and 2, in trees as kernels, Docker and SLURM make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ade_harness.cli import doctor
from ade_harness.config.runtime import Accelerator, RuntimeConfig
from ade_harness.errors import HarnessError
from ade_harness.runtime import cluster, limits

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of 8 cores and 64 GiB without control groups; returns where they would be."""
    monkeypatch.setattr(limits, "_ROOT", tmp_path)
    monkeypatch.setattr(limits, "_OWN", tmp_path / "own")
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(
        limits.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 64 * GIB // 4096, "SC_PAGE_SIZE": 4096}[name]
    )
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_machine_without_control_groups(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.usable_cores() == 8
    assert limits.usable_memory() == 64 * GIB
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda _: {3})
    assert limits.usable_cores() == 1


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("150000 100000", 2), ("900000 100000", 8), ("x", 8),
     ("100000 0", 8), ("", 8)],
)  # fmt: skip
def test_the_quota_of_version_2(machine: Path, quota: str, cores: int) -> None:
    write(machine, cpu__max=quota)  # in a container with a namespace of its own, the root is its group
    assert limits.usable_cores() == cores
    write(machine, own="0::/")
    assert limits.usable_cores() == cores


def test_groups_above_limit_those_below(machine: Path) -> None:
    """A job of SLURM's has the quota, its steps and tasks have none, or larger ones."""
    job = machine / "system.slice/slurmstepd.scope/job_7"
    write(machine, own="0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    write(job, cpu__max="300000 100000", memory__max=str(10 * GIB))
    write(job / "step_0/user/task_0", cpu__max="max 100000", memory__max="max")
    write(job / "step_0", cpu__max="600000 100000", memory__max=str(12 * GIB))
    assert limits.usable_cores() == 3
    assert limits.usable_memory() == 10 * GIB
    write(machine / "system.slice/other", cpu__max="100000 100000")  # of others
    assert limits.usable_cores() == 3


@pytest.mark.parametrize("controllers", ["cpu,cpuacct", "cpu"])
def test_version_1(machine: Path, controllers: str) -> None:
    own = f"12:pids:/x\n4:memory:/slurm/uid_0/job_7/step_0\n3:{controllers}:/slurm/uid_0/job_7/step_0\n0::/init.scope"
    write(machine, own=own)
    group = machine / "cpu/slurm/uid_0/job_7"  # Debian links cpu to cpu,cpuacct
    write(group / "step_0", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert limits.usable_cores() == 8
    write(group, cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    assert limits.usable_cores() == 2
    write(machine / "memory/slurm/uid_0", memory__limit_in_bytes="9223372036854771712")  # none
    assert limits.usable_memory() == 64 * GIB
    write(machine / "memory/slurm/uid_0/job_7", memory__limit_in_bytes=str(4 * GIB))
    assert limits.usable_memory() == 4 * GIB


def test_a_container_without_a_namespace_sees_the_hosts_path(machine: Path) -> None:
    write(machine, own="3:cpu:/docker/0123abcd\n2:memory:/docker/0123abcd")
    write(machine / "cpu", cpu__cfs_quota_us="100000", cpu__cfs_period_us="50000")
    write(machine / "memory", memory__limit_in_bytes=str(GIB))
    assert limits.usable_cores() == 2
    assert limits.usable_memory() == GIB


def test_ranks_and_doctor_follow_the_limits(machine: Path) -> None:
    assert doctor._share_of_memory() == ""
    write(machine, memory__max=str(GIB), cpu__max="100000 100000")
    assert "1.0 GiB may be used here" in doctor._share_of_memory()
    assert "of which 1 may be used here" in doctor._share_of_cores() or (doctor.os.cpu_count() or 1) == 1
    with pytest.raises(HarnessError, match=r"runtime.devices=9: .* has memory for 2 ranks at most"):
        cluster.resolve_devices(RuntimeConfig(accelerator=Accelerator.cpu, devices=9))
    with pytest.raises(HarnessError, match=r"runtime.workers=40: .* for 32 loader processes of each of its 1 ranks at"):
        cluster.resolve_devices(RuntimeConfig(accelerator=Accelerator.cpu, devices=1, workers=40))
    with pytest.raises(HarnessError, match=r"runtime.workers=2: .* for 0 loader processes of each of its 2 ranks at"):
        cluster.resolve_devices(RuntimeConfig(accelerator=Accelerator.cpu, devices=2, workers=2))
    assert cluster.resolve_devices(RuntimeConfig(accelerator=Accelerator.cpu, devices=1, workers=32)) == ("cpu", 1)
