"""The command line: verbs, help, and the one place where errors become messages and exit codes.

Exit codes: 0 done; 2 something the user can mend, or Ctrl-C; 1 a fault of this package (with its traceback).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ade_harness import __version__
from ade_harness.errors import HarnessError, did_you_mean

HELP = """\
Evaluate scene parsing models on ADE20K: exact counts, any number of ranks.

  python -m ade_harness [evaluate] [key=value ...]     evaluate a model (no arguments: the embedded demo)
  python -m ade_harness models                         the leaderboard's systems, and which can be run
  python -m ade_harness data download [--root DIR]     fetch ADEChallengeData2016.zip, check it, extract it
  python -m ade_harness data verify [ROOT]             read every pair and check it against the official list
  python -m ade_harness doctor                         what this machine can run

Most used options of evaluate
  model=NAME                    {models}
  model.path=PATH               the file (onnx, torchscript) or the folder of label PNGs (predictions)
  model.id=ID                   hub id or folder (model=hf)
  model._target_=pkg.mod.Net    your own nn.Module (model=custom), model.kwargs.NAME=VALUE its arguments
  model.checkpoint=PATH         a weight file of your own; model.weights=random model.seed=0 needs none
  model.class_map=[null,0,1]    per output channel: class 0..149, or null to leave it out
  dataset=ade20k dataset.root=PATH    folder or zip (or set ADE20K_ROOT); dataset.limit=N, dataset.ids=[...]
  inference=NAME                {inference}
  runtime.devices=N             ranks on this machine (GPUs, or CPU processes with runtime.accelerator=cpu)
  run.dir=PATH                  write there; a run that was interrupted continues there
  tracking=none|wandb           W&B is offline unless a key is set

Flags of evaluate
  --cfg job                     print the composed configuration and stop
  --config-dir DIR              your own YAML files, such as DIR/model/mine.yaml
  -m, --multirun                run every combination of comma-separated values, one after another
  --version, -h, --help

ADE_HARNESS_TRACEBACK=1 shows the traceback behind an error message.
"""

VERBS = ("evaluate", "models", "data", "doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except HarnessError as error:
        if os.environ.get("ADE_HARNESS_TRACEBACK"):
            raise
        _errors().print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        if _is_main():
            _errors().print(_interrupted(words), markup=False, highlight=False, soft_wrap=True)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `... | head` is no error
        return 0


def _errors() -> Console:
    return Console(stderr=True)


def _is_main() -> bool:
    from ade_harness.runtime.trainer import is_main_process

    return is_main_process()


_current_run: list[Path] = []
"""The run directory in use, for the message after Ctrl-C."""


def _interrupted(words: Sequence[str]) -> str:
    if not _current_run:
        return "\nInterrupted: nothing was evaluated yet."
    command = " ".join(["python -m ade_harness", *(w for w in words if not w.startswith("run.dir="))])
    return f"\nInterrupted. The counts so far are kept; this continues:\n  {command} run.dir={_current_run[-1]}"


def _dispatch(words: list[str]) -> int:
    verb = words[0] if words and not words[0].startswith("-") and "=" not in words[0] else "evaluate"
    rest = words[1:] if words and words[0] == verb else words
    if "--version" in words:
        print(f"ade-harness {__version__}")
        return 0
    if verb in ("help",) or any(w in ("-h", "--help") for w in words):
        _print_help()
        return 0
    if verb == "models":
        return _models(rest)
    if verb == "data":
        from ade_harness.data_cli import run_data

        return run_data(rest)
    if verb == "doctor":
        from ade_harness.doctor import run_doctor
        from ade_harness.report.terminal import make_console

        return run_doctor(make_console())
    if verb != "evaluate":
        raise HarnessError(f"{verb!r} is no verb.{did_you_mean(verb, VERBS)} Known: {', '.join(VERBS)}; see --help.")
    return _evaluate(rest)


def _print_help() -> None:
    from ade_harness.config import choices

    print(HELP.format(models=", ".join(choices("model")), inference=", ".join(choices("inference"))), end="")


def _evaluate(words: list[str]) -> int:
    from omegaconf import OmegaConf

    from ade_harness.config import compose_config

    overrides, flags = _split_flags(words)
    extra = Path(flags["--config-dir"]) if "--config-dir" in flags else None
    if "--multirun" in flags:
        return _multirun(overrides, extra)
    cfg = compose_config(overrides, extra)
    if "--cfg" in flags:
        print(OmegaConf.to_yaml(cfg, resolve=True), end="")
        return 0
    from ade_harness.session import run_session

    run_session(cfg, on_run_dir=_current_run.append)
    return 0


def _multirun(overrides: list[str], extra: Path | None) -> int:
    """Run every combination in a process of its own: one failure or one model's memory never reaches the next."""
    import subprocess

    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ade_harness.config import compose_config

    batches = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    jobs = [job for batch in batches for job in batch]
    for job in jobs:
        compose_config(list(job), extra)  # all mistakes before the first job
    flags = ["--config-dir", str(extra)] if extra else []
    codes = []
    for number, job in enumerate(jobs, start=1):
        print(f"[{number} of {len(jobs)}] {' '.join(job)}", flush=True)
        codes.append(subprocess.run([sys.executable, "-m", "ade_harness", *job, *flags], check=False).returncode)
    failed = [" ".join(job) for job, code in zip(jobs, codes, strict=True) if code]
    if failed:
        raise HarnessError(f"{len(failed)} of {len(jobs)} runs failed: {'; '.join(failed)}")
    return 0


def _split_flags(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate key=value words from flags."""
    overrides: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
        elif name in ("-m", "--multirun"):
            flags["--multirun"] = ""
        elif name in ("--cfg", "-c"):
            flags["--cfg"] = value if given else next(rest, "job")
            if flags["--cfg"] != "job":
                raise HarnessError(f"--cfg {flags['--cfg']}: expected `--cfg job`.")
        elif name in ("--config-dir", "-cd"):
            flags["--config-dir"] = value if given else next(rest, "")
            if not flags["--config-dir"]:
                raise HarnessError("--config-dir needs a folder, such as `--config-dir my_conf`.")
        else:
            known = ("--cfg", "--config-dir", "--multirun", "--help", "--version")
            raise HarnessError(f"{word}: no such flag.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return overrides, flags


def _models(words: Sequence[str]) -> int:
    if words:
        raise HarnessError(f"models takes no arguments, got {' '.join(words)}.")
    from ade_harness.config import choices
    from ade_harness.leaderboard.catalogue import print_catalogue
    from ade_harness.report.terminal import make_console

    print_catalogue(make_console(), choices("model"))
    return 0
