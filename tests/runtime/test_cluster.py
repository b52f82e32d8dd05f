"""Who started this process, and which node it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ade_harness.cli.slurm import sbatch_parameters, with_run_dir
from ade_harness.config.compose import compose_config
from ade_harness.errors import HarnessError
from ade_harness.runtime import cluster

STEP = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "localhost",
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *STEP,
        "LOCAL_RANK",
        "TORCHELASTIC_RUN_ID",
        cluster.SUPERVISED,
        "NODE_RANK",
        "SLURM_RESTART_COUNT",
        "SLURM_LOCALID",
        *cluster._LOCAL_SIZES,
    ):
        monkeypatch.delenv(name, raising=False)


def runtime(*overrides: str) -> Any:
    return compose_config(list(overrides)).runtime


def test_a_laptop_is_one_node() -> None:
    assert not cluster.is_rank()
    node = cluster.find_node(runtime())
    assert (node.rank, node.count, node.address) == (0, 1, "127.0.0.1")


def test_one_task_per_node_starts_the_nodes_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    assert not cluster.is_rank()
    assert cluster.node_count(runtime()) == 2
    node = cluster.find_node(runtime())
    assert (node.rank, node.count, node.address) == (1, 2, "localhost")
    monkeypatch.setenv("SLURM_JOB_ID", "1235")
    assert cluster.find_node(runtime()).port - node.port >= 8  # each job has ports for its restarts
    with pytest.raises(HarnessError, match=r"runtime.num_nodes=3, but srun started this on 2 nodes"):
        cluster.find_node(runtime("runtime.num_nodes=3"))


def test_several_tasks_per_node_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "8"}).items():
        monkeypatch.setenv(name, value)
    assert cluster.is_rank()
    assert cluster.resolve_devices(runtime("runtime.accelerator=cpu")) == ("cpu", 4)


def test_the_batch_script_itself_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not cluster.is_rank()
    assert cluster.node_count(runtime()) == 1


@pytest.mark.parametrize("name", ["LOCAL_RANK", "TORCHELASTIC_RUN_ID", cluster.SUPERVISED])
def test_others_that_start_ranks(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "0")
    assert cluster.is_rank()


def test_requeue_reports_why_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[str] = []
    assert not cluster.requeue_slurm_job(3, reported.append)
    assert "this is no SLURM job" in reported[-1]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(cluster.shutil, "which", lambda _: "scontrol")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert not cluster.requeue_slurm_job(3, reported.append)
    assert "was requeued 3 times" in reported[-1]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    there = "job 7 is requeued, and continues there."
    failed = "runtime.requeue: job 7 could not be requeued (no permission): submit it again to continue."
    for code, lines in ((0, [there, "asked"]), (1, [there, "asked", failed])):
        reported.clear()
        asked = SimpleNamespace(returncode=code, stderr="no permission")
        monkeypatch.setattr(cluster.subprocess, "run", lambda *_, asked=asked, **__: reported.append("asked") or asked)
        assert cluster.requeue_slurm_job(3, reported.append) is (code == 0)
        assert reported == lines  # SLURM may end this process before scontrol has returned


def test_what_sbatch_is_asked_for() -> None:
    overrides = (
        "runtime=slurm", "runtime.slurm.partition=gpu", "runtime.slurm.account=lab", "runtime.slurm.gpus_per_node=8",
        "runtime.slurm.nodes=2", "runtime.slurm.mem_gb=64", "runtime.slurm.container=image.sqsh",
        "runtime.slurm.container_mounts=/data:/data", "runtime.slurm.setup=[module load cuda]",
        "runtime.slurm.extra.reservation=eval",
    )  # fmt: skip
    assert sbatch_parameters(runtime(*overrides).slurm) == {
        "job_name": "ade-harness", "partition": "gpu", "account": "lab", "time": 240, "nodes": 2, "ntasks_per_node": 1,
        "gpus_per_node": 8, "mem": "64GB", "setup": ["module load cuda"],
        "srun_args": ["--kill-on-bad-exit=1", "--container-image=image.sqsh", "--container-mounts=/data:/data"],
        "stderr_to_stdout": True,
        "additional_parameters": {"signal": "USR1@120", "requeue": True, "reservation": "eval"},
    }  # fmt: skip


def test_a_jobs_run_directory_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    assert with_run_dir(["a=1"], "runs") == ["a=1", "run.dir=runs/slurm-9"]
    assert with_run_dir(["run.dir=x"], "runs") == ["run.dir=x"]
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert with_run_dir([], "runs") == ["run.dir=runs/slurm-8_3"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            1,
        ),  # of eight GPUs, as torchrun says
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"LOCAL_RANK": "2", "MPI_LOCALNRANKS": "3"}, 3),
        ({"LOCAL_RANK": "2", "WORLD_SIZE": "4"}, 4),  # as Lightning's own launcher
        ({"LOCAL_RANK": "0"}, 1),
        ({}, 8),
        ({"LOCAL_RANK": "2"}, None),
    ],
)
def test_a_launcher_decides_the_number_of_ranks_on_gpus_too(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: int | None
) -> None:
    monkeypatch.setattr(cluster, "gpu_count", lambda: 8)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(
            HarnessError, match="LOCAL_RANK=2 says that this is one of several ranks .* how many: set LOCAL_WORLD"
        ):
            cluster.resolve_devices(runtime())
    else:
        assert cluster.resolve_devices(runtime()) == ("cuda", expected)
        assert cluster.local_rank() == int(given.get("LOCAL_RANK", "0"))


def test_one_task_of_a_node_is_its_first_under_slurm_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (STEP | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}).items():
        monkeypatch.setenv(name, value)
    assert cluster.local_rank() == 3
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # one task a node: it starts the ranks, and is none
    assert cluster.local_rank() == 0


def test_ranks_that_met_and_cannot_connect_name_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    from ade_harness.runtime.ranks import started_ranks

    class Launcher:
        def launch(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Gloo connectFullMesh failed with [../third_party/gloo] no route to host")

    strategy = SimpleNamespace(launcher=Launcher(), setup_environment=None)
    monkeypatch.setattr("ade_harness.runtime.ranks.make_trainer", lambda *_, **__: SimpleNamespace(strategy=strategy))
    with (
        pytest.raises(HarnessError, match="cannot reach each other .*connectFullMesh.* set GLOO_SOCKET_IFNAME"),
        started_ranks(runtime()),
    ):
        pass
