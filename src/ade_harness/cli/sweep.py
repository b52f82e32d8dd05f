"""Every combination of comma-separated values: one after another, one chosen by number, or as SLURM jobs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from ade_harness.config.compose import compose_config
from ade_harness.errors import HarnessError, require

_LAUNCHERS = ("basic", "slurm")


def run_sweep(overrides: Sequence[str], extra: Path | None, run: Callable[[list[str]], int]) -> int:
    """Run a sweep.

    Args:
        overrides: with comma-separated values; ``hydra/launcher=slurm`` submits instead of running here.
        extra: folder of ``--config-dir``.
        run: one command in the process of a SLURM job; returns its exit code.

    Raises:
        HarnessError: a mistake in any combination (before the first runs), or runs that failed.
    """
    launchers = [word.partition("=")[2] for word in overrides if word.startswith("hydra/launcher=")]
    launcher = launchers[-1] if launchers else "basic"
    require(launcher in _LAUNCHERS, f"hydra/launcher={launcher}: expected one of {', '.join(_LAUNCHERS)}.")
    words = [word for word in overrides if not word.startswith("hydra/launcher=")]
    if launcher == "slurm" and not any(word.startswith("runtime=") for word in words):
        words.append("runtime=slurm")
    jobs = combinations(words)
    configs = [compose_config(job_words, extra) for job_words in jobs]  # all mistakes before the first job
    flags = ["--config-dir", str(extra.resolve())] if extra else []
    if launcher == "slurm":
        from ade_harness.cli.slurm import submit

        submit([[*job_words, *flags] for job_words in jobs], configs, run)
        return 0
    codes = []
    for number, job_words in enumerate(jobs, start=1):
        print(f"[{number} of {len(jobs)}] {' '.join(job_words)}", flush=True)
        # a process of its own: one failure or one model's memory never reaches the next
        codes.append(subprocess.run([sys.executable, "-m", "ade_harness", *job_words, *flags], check=False).returncode)
    failed = [" ".join(job_words) for job_words, code in zip(jobs, codes, strict=True) if code]
    if failed:
        raise HarnessError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")
    return 0


def choose_job(overrides: Sequence[str], extra: Path | None, job: str) -> list[str]:
    """Return the words of the combination number `job` (text, from 0); raises HarnessError if there is none."""
    jobs = combinations(overrides)
    require(
        job.isdigit() and int(job) < len(jobs),
        f"--job {job}: expected 0 to {len(jobs) - 1}, as this sweep has {len(jobs)} combinations.",
    )
    return [*jobs[int(job)], *(["--config-dir", str(extra)] if extra else [])]


def list_sweep(overrides: Sequence[str]) -> int:
    """Print the combinations with their numbers; returns 0."""
    for number, words in enumerate(combinations(overrides)):
        print(f"{number}: {' '.join(words)}")
    return 0


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """Return the words of every combination, in Hydra's order."""
    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(list(overrides)), None)
    return [list(words) for batch in batches for words in batch]
