"""Submit evaluations as SLURM jobs through submitit: `-m ... hydra/launcher=slurm`.

submitit writes and submits the batch script, as one job array; each job starts one process per node, which is the
same supervisor as on a laptop. The signal before the time limit and the requeue are the supervisor's, not submitit's:
it continues from the ledger.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ade_harness.config.runtime import SlurmConfig
from ade_harness.config.schema import Config
from ade_harness.errors import HarnessError, require
from ade_harness.files.reading import expanded
from ade_harness.runtime.console import make_console, print_line


@dataclass(frozen=True)
class EvaluationJob:
    """What one node of a job runs; pickled by submitit."""

    arguments: tuple[str, ...]
    """Arguments of the command ``python -m ade_harness``."""
    root: str
    """``run.root``: a run without a directory of its own is named by its job, so that a requeued one continues it."""

    def __call__(self) -> None:
        """Evaluate; fails the job if the evaluation fails."""
        from ade_harness.cli.main import run_command

        code = run_command([*with_run_dir(self.arguments, self.root), "runtime.requeue=true"])
        if code:
            raise HarnessError(f"the evaluation ended with exit code {code}: see its messages.")


def with_run_dir(arguments: Sequence[str], root: str) -> list[str]:
    """Add the run directory of this SLURM job, unless there is one."""
    if any(argument.startswith("run.dir=") for argument in arguments):
        return list(arguments)
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    return [*arguments, f"run.dir={root}/slurm-{name}"]


def sbatch_parameters(cfg: SlurmConfig) -> dict[str, Any]:
    """Return what submitit is asked for, from a ``runtime.slurm`` node."""
    # since SLURM 22.05 srun does not read the job's own --cpus-per-task
    srun = [] if cfg.cpus_per_node is None else [f"--cpus-per-task={cfg.cpus_per_node}"]
    if cfg.container is not None:
        srun += [f"--container-image={cfg.container}"]
    if cfg.container_mounts is not None:
        srun += [f"--container-mounts={cfg.container_mounts}"]
    parameters = {
        "job_name": "ade-harness",
        "partition": cfg.partition,
        "account": cfg.account,
        "qos": cfg.qos,
        "time": cfg.time_min,
        "nodes": cfg.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": cfg.gpus_per_node,
        "cpus_per_task": cfg.cpus_per_node,
        "mem": None if cfg.mem_gb is None else f"{cfg.mem_gb}GB",
        "constraint": cfg.constraint,
        "setup": list(cfg.setup) or None,
        "srun_args": ["--kill-on-bad-exit=1", *srun],
        "stderr_to_stdout": True,
        "additional_parameters": {"signal": f"USR1@{cfg.signal_before_s}", "requeue": True, **cfg.extra},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _require_same(nodes: Sequence[SlurmConfig], settings: Mapping[str, Any]) -> None:
    """Refuse a sweep over ``runtime.slurm``: SLURM gives all jobs of an array the same. `settings` come first."""
    for name in SlurmConfig.__dataclass_fields__:
        if settings.get(name) is not None:
            continue
        values = [getattr(node, name) for node in nodes]
        other = next((value for value in values if value != values[0]), values[0])
        require(
            other == values[0],
            f"runtime.slurm.{name} is {values[0]} of one job and {other} of another: a sweep is submitted as one array,"
            f" whose jobs all get the same. Give a command for each value, or one to all: hydra.launcher.{name}=...",
        )


def submit(
    jobs: Sequence[Sequence[str]], configs: Sequence[Config], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Submit one job for each command, as one array; print and return their ids, overrides and logs.

    Args:
        jobs: the arguments of each command.
        configs: their configurations, all with the same ``runtime.slurm``.
        settings: of ``hydra.launcher``; what is not null takes precedence over ``runtime.slurm``.

    Raises:
        HarnessError: jobs ask for different resources, there is no SLURM or no submitit here, or SLURM refuses.
    """
    _require_same([config.runtime.slurm for config in configs], settings)
    try:
        import submitit
    except ImportError as error:
        raise HarnessError("hydra/launcher=slurm needs submitit: pip install 'ade-harness[slurm]'.") from error
    require(
        shutil.which("sbatch") is not None,
        "hydra/launcher=slurm: sbatch is not on this machine. Give the command on a login node of the cluster.",
    )
    asked = replace(configs[0].runtime.slurm, **{k: v for k, v in settings.items() if v is not None})
    folder = expanded(asked.folder)
    executor = submitit.SlurmExecutor(folder=folder / "%j", python=asked.python or sys.executable)
    executor.update_parameters(**sbatch_parameters(asked))
    try:
        with executor.batch():
            submitted = [
                executor.submit(EvaluationJob(tuple(arguments), cfg.run.root))
                for arguments, cfg in zip(jobs, configs, strict=True)
            ]
    except (submitit.core.utils.FailedJobError, OSError) as error:
        raise HarnessError(f"sbatch refused: {' '.join(str(error).split())[:500]}") from error
    found = [
        {"job": str(job.job_id), "overrides": list(arguments), "log": str(job.paths.stdout)}
        for arguments, job in zip(jobs, submitted, strict=True)
    ]
    for job in found:
        print_line(make_console(), f"job {job['job']}: {' '.join(job['overrides'])}\n  its log: {job['log']}")
    return found
