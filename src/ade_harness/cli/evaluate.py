"""The commands `evaluate` and `probe`: a configuration, composed by Hydra, to a run.

`evaluate` and `probe` are ordinary Hydra applications (``hydra.main``): what Hydra's documentation says of a command
line holds here. ``hydra.run.dir`` and ``hydra.sweep.dir`` name where runs are written.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ade_harness.cli.answer import Answer
from ade_harness.cli.completion import complete
from ade_harness.cli.hydra_errors import check_plugins, is_hydras, while_composing
from ade_harness.cli.launch import launch
from ade_harness.cli.sweep import NO_OTHER_PRIMARY, Sweep, listed, submitted, sweeps
from ade_harness.cli.sweep import command as current_command
from ade_harness.cli.work import WORK, score_of, training_of
from ade_harness.config.arguments import OWN_PROTOCOLS, limit_sweep, mode_of, own_recipe, prepare, with_recipe
from ade_harness.config.compose import (
    checked,
    compose_config,
    explain,
    files_choose_sweep,
    register_schemas,
    with_own_protocol,
)
from ade_harness.config.composed import Composed
from ade_harness.config.files import UNREADABLE, conf_dir, refuse_bombs
from ade_harness.config.schema import Config
from ade_harness.config.validate import refuse_recipe, require_data
from ade_harness.errors import HarnessError, require
from ade_harness.files.logs import configure_log
from ade_harness.files.reading import expanded
from ade_harness.runs.directory import new_run_name
from ade_harness.runtime.cluster import is_rank, node_count
from ade_harness.runtime.notes import GIVEN_FULL_ERROR

_SHOWS = ("cfg", "info", "shell_completion", "hydra_help")
"""Options of Hydra's that print something instead of running."""

_End = tuple[int, Path | None]
"""A job's exit code and run directory."""


def run_evaluate(options: argparse.Namespace) -> Answer:
    """Evaluate one configuration, or a sweep of them.

    Raises:
        HarnessError: a mistake in the configuration, or nothing was scored.
    """
    query = next((text for text in options.overrides if text.startswith("query=")), None)
    if options.shell_completion and query is not None:

        def ask_hydra(folder: str | None) -> None:
            options.config_dir = folder
            _run_hydra(options, [query], "evaluate")

        complete(query, ask_hydra)
        return Answer()
    overrides = list(options.overrides)
    recipe = next((text for text in overrides if text.startswith(("probe=", "probe."))), None)
    require(
        recipe is None, f"{recipe}: is a recipe of the command `probe`, and has no effect on `evaluate`. Remove it."
    )
    mode, one = mode_of(overrides), RunMode.RUN.name
    require(not (options.run and options.multirun), "-r and -m are mutually exclusive.")
    require(not options.run or mode in (None, one), f"-r and hydra.mode={mode} are mutually exclusive.")
    require(not options.multirun or mode != one, f"-m and hydra.mode={mode} are mutually exclusive.")
    overrides += [f"hydra.mode={one}"] if options.run else []
    require(
        options.experimental_rerun is None,
        "--experimental-rerun: would run code from a pickle. `resume RUN` continues a run, `reproduce RUN` repeats it.",
    )
    several = options.multirun or mode == RunMode.MULTIRUN.name
    primary = bool(options.config_name or options.config_path)
    require(not (several and primary), NO_OTHER_PRIMARY)
    own = _own_folder(options)
    if own is not None and mode is None and not (options.run or several or options.config_path):
        several = files_choose_sweep(overrides, own)
    require(several or not (options.list or options.job is not None), "--job and --list need a sweep: add -m.")
    require(not options.list or options.job is None, "--list prints the jobs, --job N runs one. Give only one.")
    _check_places(overrides, several)
    require(not (several and primary), NO_OTHER_PRIMARY)
    launcher = next((override for override in overrides if override.startswith("hydra/launcher=")), None)
    require(
        several or launcher in (None, "hydra/launcher=process"),
        f"{launcher}: starts the jobs of a sweep: add -m.",
    )
    _check_shown(options)
    if options.list or options.job is not None:  # what the launcher of all jobs is given has no place here
        overrides = [text for text in overrides if not text.startswith(("hydra/launcher=", "hydra.launcher."))]
    if options.list:
        overrides.append("hydra/launcher=list")
    elif options.job is not None:
        overrides += ["hydra/launcher=one_job", f"hydra.launcher.number={options.job}"]
    elif "hydra/launcher=slurm" in overrides and not any(override.startswith("runtime=") for override in overrides):
        overrides.append("runtime=slurm")
    plain = options.shell_completion or options.hydra_help
    ready = overrides if plain else prepare(overrides, own, several, primary)
    if several and not plain:
        limit_sweep(ready)
    return _run_hydra(options, ready, "evaluate")


def _check_places(overrides: Sequence[str], several: bool) -> None:
    """Refuse Hydra's option for the folder of a single run on a sweep, and the other way round."""
    unread = r"\+*hydra\.run\.dir=" if several else r"\+*hydra\.sweep\.(dir|subdir)="
    found = next((text for text in overrides if re.match(unread, text)), None)
    other = "hydra.sweep.dir=PATH names the folder of a sweep" if several else "names the folder of a sweep: add -m"
    require(found is None, f"{found}: has no effect here; {other}, or remove it.")


def run_probe(options: argparse.Namespace) -> Answer:
    """Train a linear head; raises as :func:`run_evaluate`."""
    extra = _own_folder(options)
    require(not options.multirun, "probe -m: cannot be swept: each training is a command of its own.")
    _check_shown(options)
    plain = options.shell_completion or options.hydra_help
    primary = bool(options.config_name or options.config_path)
    ready = list(options.overrides)
    if not plain:
        ready = prepare(with_recipe(ready, extra, primary), extra, primary=primary)
    return _run_hydra(options, ready, "probe")


def _run_hydra(options: argparse.Namespace, overrides: Sequence[str], command: str) -> Answer:
    """Run a command as a Hydra application."""
    register_schemas()
    if _shows(options):
        logging.raiseExceptions = False  # Hydra logs what it shows: `... | head` is no error of logging
    ends: list[_End] = []
    errors: list[Exception] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name="config")
    def job(tree: DictConfig) -> float | None:
        try:
            return _run_job(tree, options, command, ends)
        except Exception as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # a launcher looks at each job's end
            errors.append(error)  # Hydra would print its own message before ours
            return None

    running = current_command.set(command)
    known = len(sweeps)
    listed.clear()
    submitted.clear()
    check_plugins()
    try:
        with _explained(options), _arguments(options, overrides):
            job()
    finally:  # also after jobs that failed
        current_command.reset(running)
        for sweep in sweeps[known:]:
            sweep.show()
        if sweeps[known:] and options.json and sys.exc_info()[0] is not None:  # of a sweep with failures too
            print(json.dumps(_of_sweeps(sweeps[known:]), indent=2))
    if errors:
        raise errors[0]
    return _answer(command, ends, sweeps[known:])


def _run_job(tree: DictConfig, options: argparse.Namespace, command: str, ends: list[_End]) -> float | None:
    """Run what Hydra has composed, and add its end to `ends`; return what a sweeper that optimises looks at."""
    config, handed_over = _checked_job(tree, options, command)

    def work(on_run_dir: Callable[[Path], None]) -> None:
        WORK[command](Composed.from_config(config), on_run_dir)

    code, run_dir = launch(config, options.in_this_process, work, handed_over)
    ends.append((code, run_dir))
    if code and HydraConfig.get().mode == RunMode.MULTIRUN:
        failed = HarnessError(f"a job ended with exit code {code}: see its messages.")
        failed.exit_code = code
        raise failed
    found = score_of(run_dir) if code == 0 and command == "evaluate" else None
    return float(found["mIoU"]) if found else None


def _checked_job(tree: DictConfig, options: argparse.Namespace, command: str) -> tuple[Config, dict[str, Any]]:
    """Return the configuration of a job, and what its ranks are given beside it.

    Raises:
        HarnessError: a mistake in it, or its data are not there.
    """
    mine = HydraConfig.get()
    try:
        if tree.inference.name in OWN_PROTOCOLS and mine.mode == RunMode.MULTIRUN:
            # each job knows its model only now; it has the packaged primary
            config = compose_config(list(mine.overrides.task), _config_dir(options))
        else:
            config = checked(_completed(tree, command, _own_folder(options)))
        handed_over = {
            "work": command,
            "logging": OmegaConf.to_container(mine.job_logging, resolve=True),
            "verbose": _verbose(),
        }
    except OmegaConfBaseException as error:
        raise HarnessError(explain(error, options.overrides)) from error
    if command == "evaluate":
        refuse_recipe(config)
    if _hydras_directory(config):
        config.run.dir = str(mine.runtime.output_dir)
    require_data(config)
    handed_over["logging"] = _in_run_directory(handed_over["logging"], config)
    return config, handed_over


def _in_run_directory(settings: Any, config: Config) -> Any:
    """Return settings of logging whose files in Hydra's directory of the job are in the run's instead.

    Hydra has begun the file already, before anything was composed. It is begun anew where it belongs; the run gets its
    name now.
    """
    here = Path(HydraConfig.get().runtime.output_dir)
    handlers = settings.get("handlers") if isinstance(settings, dict) else None
    handlers = handlers if isinstance(handlers, dict) else {}
    moved = {
        name: Path(handler["filename"]) for name, handler in handlers.items()
        if isinstance(handler, dict) and "filename" in handler and Path(handler["filename"]).parent == here
    }  # fmt: skip
    if not moved or (config.run.dir is not None and expanded(config.run.dir).absolute() == here.absolute()):
        return settings
    if config.run.dir is None and (is_rank() or node_count(config.runtime) > 1):
        return settings  # each process would choose another name
    if config.run.dir is None:
        config.run.dir = str(expanded(config.run.root) / new_run_name(config.model.name))
    place = expanded(config.run.dir)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"run.dir={place}: cannot be written ({error.strerror or error}).") from error
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename) in moved.values():
            handler.close()
            logging.getLogger().removeHandler(handler)
            with suppress(OSError):  # it may not be begun yet, or two handlers have had it
                if Path(handler.baseFilename).stat().st_size == 0:
                    Path(handler.baseFilename).unlink()
    new = {name: {**handlers[name], "filename": str(place / file.name)} for name, file in moved.items()}
    settings = {**settings, "handlers": {**handlers, **new}}
    configure_log(settings, _verbose())
    return settings


def _verbose() -> bool | str | list[str]:
    """Return ``hydra.verbose``."""
    given = HydraConfig.get().verbose
    return given if isinstance(given, bool | str) else list(given)


def _answer(command: str, ends: Sequence[_End], done: Sequence[Sweep]) -> Answer:
    """Return the answer of jobs that are done, of a sweep, or of what was submitted or listed."""
    code, run_dir = ends[-1] if ends else (0, None)
    if listed:
        return Answer({"jobs": listed}, code)
    if submitted:
        return Answer({"submitted": list(submitted)}, code)
    if done:
        return Answer(_of_sweeps(done), code)
    return Answer((score_of if command == "evaluate" else training_of)(run_dir), code)


def _completed(tree: DictConfig, command: str, own: Path | None) -> DictConfig:
    """Compose again by the model's own protocol and recipe, where a file has chosen the model: it is known only now."""
    mine, kind = HydraConfig.get(), str(tree.inference.name)
    given = overrides = list(mine.overrides.task)
    if kind in OWN_PROTOCOLS:
        overrides = with_own_protocol(overrides, kind, tree)
    if command == "probe" and tree.probe is None:
        overrides = [own_recipe(str(tree.model.name), tree.model.probe, own), *overrides]
    if overrides == given:
        return tree
    loader = GlobalHydra.instance().config_loader()  # of this application: with the user's folders
    again = loader.load_configuration(mine.job.config_name, overrides, RunMode.RUN)
    with open_dict(again):
        del again["hydra"]  # as in the tree that Hydra gives an application
    return again


@contextmanager
def _explained(options: argparse.Namespace) -> Iterator[None]:
    """Turn errors of Hydra's into one message; those of the work pass."""
    try:
        with redirect_stderr(io.StringIO()) if options.package else nullcontext():  # Hydra prints a line of its own
            yield
    except SystemExit as end:
        if _shows(options) and not end.code:  # Hydra's own help ends so
            return
        if not (options.package and end.code):
            raise
        raise HarnessError(
            f"--package {options.package}: no such node. `--cfg job` prints the whole configuration."
        ) from end
    except (HydraException, OmegaConfBaseException, *UNREADABLE) as error:
        if isinstance(error, UNREADABLE) and not while_composing(error):
            raise
        raise HarnessError(explain(error, options.overrides)) from error
    except Exception as error:
        if isinstance(error, BrokenPipeError) or not (is_hydras(error) or while_composing(error)):
            raise
        raise HarnessError(explain(error, options.overrides)) from error


def _of_sweeps(done: Sequence[Sweep]) -> dict[str, Any]:
    """Return what ``--json`` prints of sweeps: their folders, and a row for each job."""
    rows = [asdict(row) for sweep in done for row in sweep.rows]
    return {"sweep": [str(sweep.folder) for sweep in done], "runs": rows}


@contextmanager
def _arguments(options: argparse.Namespace, overrides: Sequence[str]) -> Iterator[None]:
    """Give Hydra its command line: it reads ``sys.argv``, and is set to raise errors rather than to print them."""
    argv, before = sys.argv, {name: os.environ.get(name) for name in ("HYDRA_FULL_ERROR", GIVEN_FULL_ERROR)}
    flags = _hydra_options(options)
    if options.multirun:
        flags.append("--multirun")
    for name in _SHOWS:
        value = getattr(options, name)
        if value:
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    if options.package:
        flags += ["--package", options.package]
    if options.resolve:
        flags.append("--resolve")
    if options.verbose:
        flags.append("hydra.verbose=true")
    sys.argv = [argv[0], *overrides, *flags]
    # processes that are started meanwhile, such as jobs of a sweep, inherit both
    os.environ.setdefault(GIVEN_FULL_ERROR, before["HYDRA_FULL_ERROR"] or "")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _hydra_options(options: argparse.Namespace) -> list[str]:
    """Return the options that say where configurations are, for Hydra."""
    given = {
        "config-dir": options.config_dir,
        "config-name": options.config_name,
        # relative to here: Hydra would take it from the folder of the module with @hydra.main, inside the package
        "config-path": options.config_path and str(Path(options.config_path).resolve()),
    }
    return [f"--{name}={value}" for name, value in given.items() if value]


def _shows(options: argparse.Namespace) -> bool:
    return bool(options.shell_completion or options.info or options.hydra_help)


def _config_dir(options: argparse.Namespace) -> Path | None:
    extra = Path(options.config_dir) if options.config_dir else None
    require(extra is None or extra.is_dir(), f"--config-dir: {extra} is not a folder.")
    return extra


def _own_folder(options: argparse.Namespace) -> Path | None:
    """Return the folder of the user's choices: beside the packaged ones, or in their place."""
    require(
        not (options.config_dir and options.config_path),
        "--config-dir adds a folder to the packaged configuration, --config-path replaces it. Give only one.",
    )
    own = _config_dir(options) or (Path(options.config_path) if options.config_path else None)
    require(own is None or own.is_dir(), f"--config-path: {own} is not a folder.")
    if own is not None:
        refuse_bombs(own)
    return own


def _hydras_directory(config: Config) -> bool:
    """Whether Hydra's own option for a job's directory names the run's: ``hydra.run.dir``, or that of a sweep.

    Raises:
        HarnessError: both were typed.
    """
    mine = HydraConfig.get()
    typed = any(override.startswith("hydra.run.dir=") for override in mine.overrides.hydra)
    require(
        # Lightning's own launcher gives its ranks one of Hydra's
        not (typed and config.run.dir is not None and mine.mode == RunMode.RUN) or "LOCAL_RANK" in os.environ,
        f"hydra.run.dir and run.dir={config.run.dir}: both name the run's directory. Remove one of them.",
    )
    given = typed or mine.run.dir != "."  # the packaged one; a file of the user's may have another
    return config.run.dir is None and (given or mine.mode == RunMode.MULTIRUN)


def _check_shown(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect beside those that print something."""
    require(options.cfg or not options.package, "--package: says which part --cfg prints. Add --cfg job.")
    printed = next((f"--{name.replace('_', '-')}" for name in _SHOWS if getattr(options, name)), None)
    require(not (options.json and printed), f"--json cannot be combined with {printed}, which prints Hydra's own text.")
