"""The scripts of slurm/ on a real SLURM of two nodes: signals, requeue, kills, arrays, and the submitit launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.runtime.slow_model import SLOW_MODEL
from tests.slurm.cluster import Cluster, missing_programs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing_programs()), reason="needs SLURM: apt-get install slurm-wlm munge"),
]
SCRIPT, SWEEP = REPOSITORY / "slurm/evaluate.sbatch", REPOSITORY / "slurm/sweep.sbatch"
IMAGES = 24
OVERRIDES = (
    "model=custom", "model._target_=slow_model.Net", "inference=original_size", f"dataset.limit={IMAGES}",
    "tracking=none", "runtime.accelerator=cpu", "runtime.workers=0", "run.overlays=0",
)  # fmt: skip
TWO_NODES = ("--nodes=2", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Iterator[Cluster]:
    # a short path: sockets have names of at most 107 characters
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        made = Cluster(Path(folder))
        try:
            made.start()
            yield made
        finally:
            made.stop()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    monkeypatch.setenv("ADE_HARNESS_PYTHON", sys.executable)
    monkeypatch.setenv("SLOW_MODEL_SECONDS", "0")
    return tmp_path


def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "ledger").sort_values("image_id").reset_index(drop=True)


def matrix(run: Path) -> np.ndarray:
    return np.load(run / "confusion_matrix.npy")


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One node, one rank."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "slow_model.py").write_text(SLOW_MODEL)
    settings = {"ADE_HARNESS_PYTHON": sys.executable, "SLOW_MODEL_SECONDS": "0"}
    job = cluster.submit(folder, str(SCRIPT), *OVERRIDES, **settings)
    assert cluster.wait(job) == "COMPLETED", output(folder)
    return folder / f"runs/slurm-{job}"


def output(folder: Path) -> str:
    return "\n".join(p.read_text() for p in sorted(folder.glob("**/*.out")))


def assert_same(run: Path, expected: Path) -> None:
    assert table(run).image_id.is_unique
    assert table(run).label_hash.tolist() == table(expected).label_hash.tolist()
    assert np.array_equal(matrix(run), matrix(expected))


def until_rows(run: Path, timeout_s: float = 60) -> int:
    """Wait until some images, but not all, are under way on every rank."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            progress = json.loads((run / "progress.json").read_text())
        except (OSError, ValueError):
            progress = {"done": 0}
        if progress["done"] >= 3:
            return int(progress["done"])
        time.sleep(0.1)
    raise AssertionError(f"no progress in {run}")


def test_two_nodes_give_the_same_bits_as_one(cluster: Cluster, work: Path, expected: Path) -> None:
    job = cluster.submit(work, *TWO_NODES, str(SCRIPT), *OVERRIDES, "runtime.devices=2")
    assert cluster.wait(job) == "COMPLETED", output(work)
    run = work / f"runs/slurm-{job}"
    assert_same(run, expected)
    ranks = json.loads((run / "manifest.json").read_text())["timings"]["ranks"]
    assert [r["host"] for r in ranks] == ["n1", "n1", "n2", "n2"]
    assert sorted(p.name for p in (run / "logs").iterdir()) == [f"rank{r:05d}.log" for r in range(4)]
    logs = [(run / f"logs/rank{r:05d}.log").read_text() for r in range(4)]
    assert all("images/s" in log and "\x1b" not in log for log in logs)  # progress of each rank, no control codes


def test_one_task_per_rank_works_too(cluster: Cluster, work: Path, expected: Path) -> None:
    script = work / "bare.sbatch"
    script.write_text(f'#!/bin/bash\nsrun {sys.executable} -m ade_harness run.dir=run runtime.num_nodes=2 "$@"\n')
    job = cluster.submit(work, "--nodes=2", "--ntasks-per-node=1", str(script), *OVERRIDES)
    assert cluster.wait(job) == "COMPLETED", output(work)
    assert_same(work / "run", expected)
    assert json.loads((work / "run/manifest.json").read_text())["timings"]["world_size"] == 2


@pytest.mark.parametrize("how", ["signal", "requeue"])
def test_requeued_jobs_continue(
    cluster: Cluster, work: Path, expected: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the signal before the time limit (our requeue), and by `scontrol requeue` (SLURM's own kill)."""
    monkeypatch.setenv("SLOW_MODEL_SECONDS", "0.3")
    job = cluster.submit(work, *TWO_NODES, str(SCRIPT), *OVERRIDES)
    run = work / f"runs/slurm-{job}"
    cluster.wait(job, "RUNNING")
    until_rows(run)
    if how == "signal":
        cluster.run("scancel", "--signal=USR1", job)  # what --signal=USR1@120 sends
    else:
        cluster.run("scontrol", "requeue", job)
    cluster.start_again(job)
    assert cluster.wait(job) == "COMPLETED", output(work) + cluster.log()
    assert cluster.job(job)["Restarts"] == "1"
    assert_same(run, expected)
    assert len(json.loads((run / "manifest.json").read_text())["earlier"]) == 1
    text = output(work)
    if how == "signal":
        assert "Stopped. Completed work is saved" in text
        assert f"job {job} is requeued, and continues there." in text
        assert "continuing: 0 images" not in text
    assert "continuing: " in text
    assert "Traceback" not in text


def test_scancel_keeps_what_was_counted(
    cluster: Cluster, work: Path, expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_MODEL_SECONDS", "1")
    job = cluster.submit(work, *TWO_NODES, str(SCRIPT), *OVERRIDES, "run.dir=run")
    cluster.wait(job, "RUNNING")
    until_rows(work / "run")
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    kept = len(table(work / "run"))
    assert 0 < kept < IMAGES
    monkeypatch.setenv("SLOW_MODEL_SECONDS", "0")
    again = cluster.submit(work, str(SCRIPT), *OVERRIDES, "run.dir=run")
    assert cluster.wait(again) == "COMPLETED", output(work)
    assert f"continuing: {kept} images are done" in output(work)
    assert_same(work / "run", expected)


def ranks_of(node: str) -> list[psutil.Process]:
    """Return the rank processes of a node."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("SLURMD_NODENAME") == node and "ADE_HARNESS_NOTE" in environment:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return sorted(found, key=lambda p: p.create_time())


def test_a_killed_rank_on_another_node(cluster: Cluster, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job ends and frees its nodes."""
    monkeypatch.setenv("SLOW_MODEL_SECONDS", "0.5")
    overrides = (*OVERRIDES, "runtime.dead_after_s=5", "run.dir=run")
    job = cluster.submit(work, *TWO_NODES, str(SCRIPT), *overrides)
    cluster.wait(job, "RUNNING")
    until_rows(work / "run")
    begin = time.monotonic()
    os.kill(ranks_of("n2")[0].pid, signal.SIGKILL)
    assert cluster.wait(job) == "FAILED", output(work)
    assert time.monotonic() - begin < 30
    assert not (work / "run/metrics.json").exists()
    assert "rank 1 on n2 (process" in output(work)
    assert "was killed by SIGKILL" in output(work)
    end = time.monotonic() + 20
    while cluster.idle_nodes() < 2 and time.monotonic() < end:
        time.sleep(0.2)
    assert cluster.idle_nodes() == 2


def test_a_node_without_the_data_set_ends_the_job_with_its_name(cluster: Cluster, work: Path) -> None:
    script = work / "bare.sbatch"
    script.write_text(
        "#!/bin/bash\n"
        f"srun --kill-on-bad-exit=1 bash -c '{sys.executable} -m ade_harness model=predictions model.path=x dataset=ade20k"
        " dataset.root=data-of-$SLURMD_NODENAME tracking=none runtime.accelerator=cpu'\n"
    )
    from tests.conftest import write_pair

    write_pair(work / "data-of-n1", "ADE_val_00001000", np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), np.uint8))
    job = cluster.submit(work, "--nodes=2", "--ntasks-per-node=1", str(script))
    assert cluster.wait(job, timeout_s=60) == "FAILED", output(work)
    assert "error: rank 1 on n2: data-of-n2: no such folder or zip" in output(work)
    assert "Traceback" not in output(work)


def test_a_job_array_evaluates_each_combination(cluster: Cluster, work: Path) -> None:
    overrides = ("dataset.limit=4", "tracking=none", "runtime.accelerator=cpu", "inference=original_size,fit_input")
    job = cluster.submit(work, "--array=0-1", str(SWEEP), *overrides)
    end = time.monotonic() + 120
    runs = [work / f"runs/slurm-{job}_{task}" for task in (0, 1)]
    while not all((run / "metrics.json").exists() for run in runs) and time.monotonic() < end:
        time.sleep(0.3)
    names = [yaml.safe_load((run / "config.yaml").read_text())["inference"]["name"] for run in runs]
    assert names == ["original_size", "fit_input"], output(work)


def test_submitit_launcher_submits_an_array_that_continues(
    cluster: Cluster, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLOW_MODEL_SECONDS", "0.2")
    reported = cluster.run(
        sys.executable, "-m", "ade_harness", "-m", "hydra/launcher=slurm", *OVERRIDES, "inference.batch=1,2",
        "runtime.slurm.time_min=5", "runtime.slurm.cpus_per_node=1", "runtime.slurm.extra.comment=ade", cwd=work,
        SLOW_MODEL_SECONDS="0.2",
    )  # fmt: skip
    lines = [line for line in reported.splitlines() if line.startswith("job ")]
    assert len(lines) == 2, reported
    jobs = [line.split()[1].rstrip(":") for line in lines]
    first = work / f"runs/slurm-{jobs[0]}"
    until_rows(first)
    assert cluster.job(jobs[0])["Comment"] == "ade"
    cluster.run("scancel", "--signal=USR1", jobs[0])
    cluster.start_again(jobs[0])
    end = time.monotonic() + 120
    runs = [work / f"runs/slurm-{job}" for job in jobs]
    while not all((run / "metrics.json").exists() for run in runs) and time.monotonic() < end:
        time.sleep(0.3)
    logs = "\n".join(p.read_text() for p in (work / "slurm-jobs").glob("**/*.out"))
    assert all((run / "metrics.json").exists() for run in runs), logs
    assert len(json.loads((first / "manifest.json").read_text())["earlier"]) == 1
    assert table(first).label_hash.tolist() == table(runs[1]).label_hash.tolist()
    assert "is requeued, and continues there." in logs
