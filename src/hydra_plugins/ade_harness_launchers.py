"""Hydra launchers: jobs of a sweep as processes here, as SLURM jobs, one of them alone, or listed.

All but the last check every job, its files too, before the first one starts; so do launchers of others, which a
callback puts into one of ours. Hydra imports this module whenever it starts, so that it imports what it needs when a
sweep runs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from ade_harness.errors import HarnessError, require
from ade_harness.files.reading import expanded, require_regular

if TYPE_CHECKING:
    from ade_harness.cli.sweep import Sweep, SweepJob
    from ade_harness.config.schema import Config


class _CheckedLauncher(Launcher, ABC):
    """What ours share: jobs are composed and checked before any starts."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands over; called by Hydra."""
        self.context = hydra_context
        self.task_function = task_function
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs; called by Hydra's sweeper.

        Raises:
            HarnessError: a mistake in any job; then none has started. Or jobs that failed.
        """
        extra = _config_dir(self.config)
        try:
            jobs = self._checked(job_overrides, initial_job_idx, extra)
        except HarnessError:
            _remove_empty(self.config)
            raise
        # a file may say that everything is a sweep: a job is not one, or it would start jobs without end
        flags = [*_of_jobs(self.config), "hydra.mode=RUN", *(["--config-dir", str(extra.resolve())] if extra else [])]
        return self.run(jobs, flags)

    def _checked(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int, extra: Path | None
    ) -> list[SweepJob]:
        """Return the jobs of a sweep, each composed and checked; raises as :meth:`launch`."""
        from ade_harness.cli.sweep import SweepJob
        from ade_harness.config.compose import compose_config

        _check_sweep(self.config)
        job_overrides = _jobs_of(job_overrides)
        jobs, mistakes = [], []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            plain = list(filter_overrides(overrides))
            try:
                config = compose_config(plain, extra)
                check_job(config, self.runs_here)
            except HarnessError as error:
                mistakes.append(f"job {number} ({' '.join(plain)}): {error}")
                continue
            jobs.append(SweepJob(number, tuple(plain), self._directory(number, plain, extra, config), config))
        if mistakes:
            raise HarnessError(
                f"{len(mistakes)} of {len(job_overrides)} jobs cannot run, so none was started.\n" + "\n".join(mistakes)
            )
        self._check_places(jobs)
        return jobs

    runs_here = True
    """Whether jobs run on this machine: it has to have what they ask for."""
    names_places = False
    """Whether jobs without ``run.dir`` choose their directories when they start: SLURM's are called like the jobs."""

    def _check_places(self, jobs: Sequence[SweepJob]) -> None:
        """Refuse jobs that would write one directory: the second would continue the first, or find another setup."""
        seen: dict[Path, SweepJob] = {}
        for job in jobs:
            if self.names_places and job.config.run.dir is None:
                continue
            place = job.run_dir.absolute()
            require(
                place not in seen,
                f"jobs {seen[place].number if place in seen else 0} and {job.number} of the sweep write the same"
                f" directory, {job.run_dir}. Leave run.dir out, or give hydra.sweep.subdir the job's number"
                " (${hydra.job.num}).",
            )
            seen[place] = job

    @abstractmethod  # Hydra registers no abstract classes
    def run(self, jobs: Sequence[SweepJob], flags: Sequence[str]) -> Sequence[JobReturn]:
        """Run checked jobs; `flags`, also overrides of Hydra's own, go to each command."""

    def _directory(self, number: int, overrides: Sequence[str], extra: Path | None, config: Config) -> Path:
        """Return where a job writes: ``run.dir``, or Hydra's own directory of the job."""
        from ade_harness.config.arguments import prepare

        if config.run.dir is not None:
            return Path(config.run.dir)
        sweep: Any = self.context.config_loader.load_sweep_config(self.config, prepare(overrides, extra))
        with open_dict(sweep):
            sweep.hydra.job.id = sweep.hydra.job.num = number
        return Path(str(OmegaConf.select(sweep, "hydra.sweep.dir"))) / str(
            OmegaConf.select(sweep, "hydra.sweep.subdir")
        )


class ProcessLauncher(_CheckedLauncher):
    """One job after another, each a process of its own: no failure and no model's memory reaches the next."""

    _sweep: Sweep | None = None

    def run(self, jobs: Sequence[SweepJob], flags: Sequence[str]) -> Sequence[JobReturn]:
        """Run all, whatever fails, and add them to the table that the command ends with."""
        from ade_harness.cli.sweep import Sweep, placed, sweeps
        from ade_harness.runtime.console import make_console, print_line

        if self._sweep is None:
            self._sweep = Sweep(Path(str(self.config.hydra.sweep.dir)))
            sweeps.append(self._sweep)
        jobs = placed(jobs, self._sweep.folder)
        codes = []
        for place, job in enumerate(jobs, start=1):
            batch = f"{place} of {len(jobs)}" if job.number < len(jobs) else f"job {job.number}"
            print_line(make_console(result=False), f"[{batch}] {' '.join(job.overrides)}")
            arguments = [*job.arguments, *flags]
            codes.append(subprocess.run([sys.executable, "-m", "ade_harness", *arguments], check=False).returncode)
        rows = self._sweep.add(jobs, codes)
        return [_returned(job, code, row.mIoU) for job, code, row in zip(jobs, codes, rows, strict=True)]


class OthersLauncher(_CheckedLauncher):
    """The jobs of a launcher that is not ours, such as Hydra's basic one or an installed plugin's.

    It gets the jobs once all are checked, and runs them as it does; what they leave becomes one table.
    """

    _sweep: Sweep | None = None

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run jobs; called by Hydra's sweeper. Raises as the others."""
        self._given = job_overrides, initial_job_idx
        return super().launch(job_overrides, initial_job_idx)

    def run(self, jobs: Sequence[SweepJob], flags: Sequence[str]) -> Sequence[JobReturn]:
        """Hand all to the other launcher."""
        from ade_harness.cli.sweep import Sweep, sweeps

        config = self.config.copy()
        with open_dict(config):
            config.hydra.launcher = self.settings["launcher"]
        other = Plugins.instance().instantiate_launcher(
            hydra_context=self.context, task_function=self.task_function, config=config
        )
        given, first = self._given
        returned = other.launch(_jobs_of(given), first)
        if self._sweep is None:
            self._sweep = Sweep(Path(str(self.config.hydra.sweep.dir)))
            sweeps.append(self._sweep)
        self._sweep.add(jobs, [_code_of(job) for job in returned])
        return returned


def _code_of(job: JobReturn) -> int:
    """Return the exit code of a job that another launcher has run."""
    failed = job.status == JobStatus.FAILED
    return int(getattr(job._return_value, "exit_code", None) or 1) if failed else 0


_made: list[str] = []
"""The folder of this sweep, if it was not there before."""
_refused: list[HarnessError] = []
"""Why this sweep is refused, which the launcher raises."""


class CheckSweeps(Callback):
    """Puts a launcher that is not ours into one that checks all jobs first: Hydra's sweepers ask the configuration."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Change what sweepers read; called by Hydra, before the sweep's folder is made."""
        from ade_harness.config.arguments import limit_sweep

        _made.clear()
        _refused.clear()
        if not Path(str(config.hydra.sweep.dir)).exists():
            _made.append(str(config.hydra.sweep.dir))
        params = config.hydra.sweeper.get("params") if isinstance(config.hydra.sweeper, DictConfig) else None
        if isinstance(params, DictConfig):  # a file's: what is typed has been counted before Hydra began
            typed: Any = OmegaConf.to_container(config.hydra.overrides.task)
            try:
                with suppress(HydraException):  # no overrides by Hydra's grammar: the sweeper says so
                    limit_sweep([*(f"{key!s}={value}" for key, value in params.items()), *typed])
            except HarnessError as error:  # Hydra turns a callback's errors into warnings
                _refused.append(error)
                with open_dict(config):
                    config.hydra.sweeper.params = {}  # or the sweeper would first make a list of all jobs
        launcher = config.hydra.launcher
        target = str(launcher.get("_target_", "")) if isinstance(launcher, DictConfig) else ""  # Hydra refuses others
        if target and not target.startswith(f"{__name__}."):
            with open_dict(config):
                config.hydra.launcher = {
                    "_target_": f"{__name__}.{OthersLauncher.__name__}",
                    "_recursive_": False,
                    "launcher": launcher,
                }


class OneJobLauncher(_CheckedLauncher):
    """The job of one number alone, for SLURM's job arrays."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose, check and run one job: each task of an array would take minutes to look at all of a large sweep."""
        require(
            self.settings["number"] is not None,
            "hydra/launcher=one_job: runs the job of one number: -m --job N.",
        )
        job_overrides = _jobs_of(job_overrides)
        number, last = int(self.settings["number"]), len(job_overrides) - 1
        require(
            0 <= number <= last, f"--job {number}: expected 0 to {last}, as this sweep has {last + 1} combinations."
        )
        return super().launch(job_overrides[number : number + 1], number)

    def run(self, jobs: Sequence[SweepJob], flags: Sequence[str]) -> Sequence[JobReturn]:
        """Run the job ``hydra.launcher.number``."""
        [job] = jobs
        from ade_harness.runtime.console import Output, output

        arguments = ["evaluate", *job.overrides, *flags]  # its directory is its own: the jobs of an array do not meet
        arguments += {Output.stderr: ["--json"], Output.errors: ["--json", "--quiet"]}.get(output(), [])
        code = subprocess.run([sys.executable, "-m", "ade_harness", *arguments], check=False).returncode
        if code:
            from ade_harness.runtime.lifetime import CommandEnded

            raise CommandEnded(code if code > 0 else 128 - code)
        return [_returned(job, code, None)]


class ListLauncher(Launcher):
    """Prints the jobs with their numbers, and runs none."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra."""
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Print; called by Hydra's sweeper."""
        from ade_harness.cli.sweep import listed
        from ade_harness.runtime.console import make_console, print_line

        _remove_empty(self.config)
        for number, overrides in enumerate(_jobs_of(job_overrides), start=initial_job_idx):
            listed.append(list(filter_overrides(overrides)))
            print_line(make_console(), f"{number}: {' '.join(listed[-1])}")
        return [JobReturn(_return_value=None, status=JobStatus.COMPLETED) for _ in job_overrides]


class SlurmLauncher(_CheckedLauncher):
    """SLURM jobs, as one array: see :mod:`ade_harness.cli.slurm`."""

    runs_here = False
    names_places = True

    def run(self, jobs: Sequence[SweepJob], flags: Sequence[str]) -> Sequence[JobReturn]:
        """Submit all; ``hydra.launcher.KEY`` says what SLURM is asked for."""
        from ade_harness.cli.slurm import submit
        from ade_harness.cli.sweep import submitted

        submitted.extend(
            submit([[*job.overrides, *flags] for job in jobs], [job.config for job in jobs], self.settings)
        )
        return [_returned(job, 0, None) for job in jobs]


def _remove_empty(config: DictConfig) -> None:
    """Remove the folder that Hydra has made for a sweep, where nothing but Hydra's own file is in it.

    Not that of a job of an array, which others may be about to use.
    """
    folder = Path(str(config.hydra.sweep.dir))
    alone = str(config.hydra.launcher.get("_target_", "")).endswith(".OneJobLauncher")
    with suppress(OSError):
        if str(folder) in _made and not alone and [entry.name for entry in folder.iterdir()] == ["multirun.yaml"]:
            (folder / "multirun.yaml").unlink()
            folder.rmdir()


def _check_sweep(config: DictConfig) -> None:
    """Refuse sweeps whose jobs would be something else than what was asked for."""
    from ade_harness.cli.sweep import NO_OTHER_PRIMARY, command
    from ade_harness.config.files import conf_dir

    sweeper, launcher = config.hydra.sweeper, str(config.hydra.launcher.get("_target_", ""))
    require(
        not str(sweeper.get("_target_", "")).endswith(".BasicSweeper") or sweeper.get("max_batch_size") is None,
        "hydra.sweeper.max_batch_size: jobs of a batch are checked and numbered without the others. Remove it: jobs run"
        " one after another here, and SLURM decides how many of an array run at a time (runtime.slurm.extra).",
    )
    given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)  # each job resolves its own
    placed = [o for o in given if re.match(r"[+~]*hydra\.sweep\.(dir|subdir)=", o)]
    alone = launcher.endswith((".SlurmLauncher", ".OneJobLauncher"))
    require(
        not (placed and alone),
        f"{placed[0] if placed else ''}: has no effect: each job of a cluster writes a directory below run.root that is"
        " called like the job, in which it continues when it is requeued. run.root=PATH chooses where.",
    )
    main = next((str(s.path) for s in config.hydra.runtime.config_sources if s.provider == "main"), "")
    require(
        config.hydra.job.config_name == "config" and (not main or Path(main).resolve() == conf_dir().resolve()),
        NO_OTHER_PRIMARY,
    )
    require(
        command.get() == "evaluate",
        f"{command.get()}: cannot be swept (hydra.mode=MULTIRUN): each training is a command of its own.",
    )


def _jobs_of(job_overrides: Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """Leave out jobs of `schema`, which each group has for files to name: a glob finds it, and it is no choice.

    Raises:
        HarnessError: none are left, or there are more than anybody means.
    """
    from ade_harness.config.arguments import GROUPS

    if _refused:
        raise _refused[0]

    none = {f"{group}=schema" for group in GROUPS}
    found = [overrides for overrides in job_overrides if not none & set(overrides)]
    require(bool(found), "the sweep has no jobs: no choice fits its glob(...), or a list of values is empty.")
    return found


def check_job(config: Config, here: bool) -> None:
    """Check what an evaluation needs beside a valid configuration: no recipe of a training, files, and GPUs.

    Args:
        config: of the job.
        here: whether it runs on this machine.

    Raises:
        HarnessError: there is a recipe; names the first key whose file is not there, the first image that is not in
            the data set, or what this machine lacks.
    """
    from ade_harness.config.targets import require_target
    from ade_harness.config.validate import OWN_DATA, refuse_recipe, require_data
    from ade_harness.runtime.cluster import resolve_devices

    refuse_recipe(config)
    require_data(config)
    model = config.model
    if model._target_ is not None:
        require_target(model._target_)
    for key in ("checkpoint", "backbone_checkpoint"):
        value = getattr(model, key)
        if value is not None:
            require_regular(expanded(value), f"model.{key}={value}")
    require(model.path is None or expanded(model.path).exists(), f"model.path={model.path}: no such file or folder.")
    is_place = model.id is not None and model.id.startswith(("/", "./", "../", "~"))
    require(not is_place or expanded(model.id or "").is_dir(), f"model.id={model.id}: no such folder.")
    keys = {"demo": (), "folder": tuple(OWN_DATA)}.get(config.dataset.kind, ("root",))
    for key in keys:
        value = getattr(config.dataset, key)
        found = value is None or expanded(value).exists()
        require(found, f"dataset.{key}={value}: no such file, folder or zip.")
    _check_images(repr(config.dataset), config)
    if here:
        resolve_devices(config.runtime)


_opened: dict[str, str | None] = {}
"""Data sets of this process's sweeps, and what is wrong with them."""


def _check_images(dataset: str, config: Config) -> None:
    """Open a data set, once for all jobs that have the same: are its images there, and those that are named?"""
    from ade_harness.config.dataset import DatasetKind
    from ade_harness.data.factory import open_dataset

    if config.dataset.kind == DatasetKind.demo:  # is made where it is not there yet
        return
    if dataset not in _opened:
        try:
            open_dataset(config.dataset, config.inference.exif)
            _opened[dataset] = None
        except HarnessError as error:
            _opened[dataset] = str(error)
    require(_opened[dataset] is None, _opened[dataset] or "")


def _of_jobs(config: DictConfig) -> list[str]:
    """Return the overrides of Hydra's own options that are about a job, such as its log, not about the sweep."""
    of_sweep = re.compile(r"[+~]*hydra(/launcher|/sweeper|\.(launcher|sweeper|sweep|mode|run)\b)")
    given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)  # each job resolves its own
    return [override for override in given if not of_sweep.match(override)]


def _config_dir(config: DictConfig) -> Path | None:
    """Return the folder of ``--config-dir``, which Hydra has put among its sources."""
    for source in config.hydra.runtime.config_sources:
        if source.provider == "command-line":
            return Path(str(source.path))
    return None


def _returned(job: SweepJob, code: int, value: float | None) -> JobReturn:
    from ade_harness.config.plain import as_dict

    status = JobStatus.FAILED if code else JobStatus.COMPLETED
    outcome = HarnessError(f"job {job.number} ended with exit code {code}") if code else value
    config = OmegaConf.create(as_dict(job.config))
    return JobReturn(overrides=list(job.overrides), cfg=config, _return_value=outcome, status=status)
