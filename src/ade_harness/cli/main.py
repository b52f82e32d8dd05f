"""The command line: verbs, help, and the one place where errors become messages and exit codes.

Exit codes: 0 done; 2 something the user can mend, or Ctrl-C; 3 `reproduce` ran, and the labels are not the same; 75
asked to stop (SIGTERM, or the signal before a time limit), to be continued; 76 another rank was lost; 128 + N a rank
was killed by signal N; 1 a fault of this package or of a model's code (with its traceback).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ade_harness import __version__
from ade_harness.cli.commands import REPORTS, VERBS
from ade_harness.config.compose import as_dict, as_yaml, compose_probe
from ade_harness.config.schema import Config
from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.runtime.cluster import has_last_word
from ade_harness.runtime.console import print_line
from ade_harness.runtime.notes import EXIT_MESSAGE, EXIT_RANK_LOST, EXIT_STOPPED
from ade_harness.runtime.supervisor import resume_command

if TYPE_CHECKING:
    pass

HELP = """\
Evaluate scene parsing models on ADE20K: exact counts, any number of ranks.

  python -m ade_harness [evaluate] [key=value ...]     evaluate a model (no arguments: the embedded demo)
  python -m ade_harness resume RUN [key=value ...]     do what is missing of a run, on any number of ranks
  python -m ade_harness status RUN                     how far a run is, from any shell
  python -m ade_harness report RUN                     one HTML page that explains a run, for any browser
  python -m ade_harness compare RUN RUN [...]          do they differ? table, tests, page; also wandb:ENTITY/PROJECT/RUN
  python -m ade_harness probe model=NAME [key=value]   train a linear head on a frozen backbone (conf/probe)
  python -m ade_harness models                         the leaderboard's systems, and which can be run
  python -m ade_harness leaderboard [RUN ...]          published rows with your complete runs merged in; chart
  python -m ade_harness submit RUN --contact ADDRESS   what the leaderboard asks for, checked; --check DIR: somebody's
  python -m ade_harness reproduce RUN|SUBMISSION       run it again, with its own commit; are the bits equal?
  python -m ade_harness data download [--root DIR]     fetch ADEChallengeData2016.zip, check it, extract it
  python -m ade_harness data verify [ROOT]             read every pair and check it against the official list
  python -m ade_harness serve [key=value ...]          answer HTTP requests with a model (docs/endpoints.md)
  python -m ade_harness doctor                         what this machine can run

Most used options of evaluate
  model=NAME                    {models}
  model.path=PATH               the file (onnx, torchscript) or the folder of label PNGs (predictions)
  model.url=URL                 an endpoint that answers with label maps or scores (model=http)
  model.id=ID                   hub id or folder (model=hf)
  model._target_=pkg.mod.Net    your own nn.Module (model=custom), model.kwargs.NAME=VALUE its arguments
  model.checkpoint=PATH         a weight file of your own; model.weights=random model.seed=0 needs none
  model.backbone_checkpoint=PATH    the frozen backbone's, if that file holds a linear head alone
  model.class_map=[null,0,1]    per output channel: class 0..149, or null to leave it out
  dataset=ade20k dataset.root=PATH    folder or zip (or set ADE20K_ROOT); dataset.limit=N, dataset.ids=[...]
  inference=ss|ms               the model's own single-scale or multi-scale protocol, or one by name:
                                {inference}
  runtime.devices=N             ranks on this machine (GPUs, or CPU processes with runtime.accelerator=cpu)
  runtime.max_restarts=N        start all ranks again, up to N times, if one of them dies
  run.dir=PATH                  write there; a run that was interrupted continues there
  run.on_error=skip             leave out images that fail: a partial score, marked so
  tracking=none|wandb           W&B is offline unless a key is set

Options of probe: as evaluate, on dataset.split=training, and
  probe=NAME probe.KEY=VALUE    recipe and its fields: {probe}; `probe --cfg job` prints them
  run.dir=PATH                  write there; the same words continue a training that was interrupted

Flags of evaluate
  --cfg job                     print the composed configuration and stop
  --config-dir DIR              your own YAML files, such as DIR/model/mine.yaml
  -m, --multirun                run every combination of comma-separated values, one after another;
                                with hydra/launcher=slurm as SLURM jobs (conf/runtime/slurm.yaml, slurm/README.md)
  --list, --job N               with -m: print the combinations; run only the N-th, from 0 (for SLURM job arrays)
  --version, -h, --help

ADE_HARNESS_TRACEBACK=1 shows the traceback behind an error message.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: words of the command; None takes those of this process. A command that is given here is evaluated
            in this very process, on one rank; otherwise ranks are processes of their own.
    """
    return run_command(list(sys.argv[1:] if arguments is None else arguments), in_this_process=arguments is not None)


def run_command(words: list[str], in_this_process: bool = False) -> int:
    """Run one command as :func:`main` does; evaluate it with ranks that are processes, unless told otherwise."""
    try:
        return _dispatch(words, in_this_process)
    except HarnessError as error:
        if os.environ.get("ADE_HARNESS_TRACEBACK"):
            raise
        _print_error(f"error: {error}")
        return EXIT_MESSAGE
    except KeyboardInterrupt:
        _say_how_to_go_on("Interrupted")
        return EXIT_MESSAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `... | head` is no error
        return 0


def _print_error(text: str) -> None:
    print_line(Console(stderr=True), text)


_REQUEUE_WAIT_S = 120.0
"""For SLURM to end a job that it has taken back."""
_current_run: list[Path] = []
"""The run directory in use, for the message after Ctrl-C."""


def _say_how_to_go_on(why: str) -> None:
    """Print what to do after an end from outside; of several ranks the first speaks, or their supervisor."""
    if not has_last_word():
        return
    if not _current_run:
        _print_error(f"\n{why}: nothing was evaluated yet.")
    else:
        _print_error(f"\n{why}. The counts so far are kept; this continues:\n  {resume_command(_current_run[-1])}")


def _dispatch(words: list[str], in_this_process: bool) -> int:
    verb = words[0] if words and not words[0].startswith("-") and "=" not in words[0] else "evaluate"
    rest = words[1:] if words and words[0] == verb else words
    if "--version" in words:
        print(f"ade-harness {__version__}")
        return 0
    if verb in ("help",) or any(w in ("-h", "--help") for w in words):
        _print_help()
        return 0
    if verb in ("evaluate", "resume", "probe"):
        return {"evaluate": _evaluate, "resume": _resume, "probe": _probe}[verb](rest, in_this_process)
    if verb not in VERBS:
        raise HarnessError(f"{verb!r} is no verb.{did_you_mean(verb, VERBS)} Known: {', '.join(VERBS)}; see --help.")
    return _report(verb, rest)


def _report(verb: str, words: list[str]) -> int:
    """Run a verb that evaluates nothing; its module is imported only now."""
    from importlib import import_module

    from ade_harness.runtime.console import make_console

    if verb == "models":
        return _models(words)
    if verb == "compare":
        from ade_harness.cli.report import run_compare

        return run_compare(make_console(), words, _pull)
    module, function = REPORTS[verb]
    code: int = getattr(import_module(f"ade_harness.{module}"), function)(make_console(), words)
    return code


def _pull(name: str) -> Path:
    """Fetch a run from W&B; wandb is imported only for that."""
    from ade_harness.tracking.pull import pull_run

    return pull_run(name)


def _print_help() -> None:
    from ade_harness.config.compose import choices

    names = {kind: ", ".join(choices(kind)) for kind in ("model", "inference", "probe")}
    print(HELP.format(models=names["model"], inference=names["inference"], probe=names["probe"]), end="")


def _evaluate(words: list[str], in_this_process: bool) -> int:

    from ade_harness.config.compose import compose_config

    overrides, flags = _split_flags(words)
    extra = Path(flags["--config-dir"]) if "--config-dir" in flags else None
    if "--multirun" in flags:
        from ade_harness.cli.sweep import choose_job, list_sweep, run_sweep

        if "--list" in flags:
            return list_sweep(overrides)
        if "--job" in flags:
            return _evaluate(choose_job(overrides, extra, flags["--job"]), in_this_process)
        return run_sweep(overrides, extra, run_command)
    if "--job" in flags or "--list" in flags:
        raise HarnessError("--job and --list are about the combinations of a sweep: add -m.")
    cfg = compose_config(overrides, extra)
    if "--cfg" in flags:
        print(as_yaml(as_dict(cfg)), end="")
        return 0

    def command(run_dir: str | None) -> list[str]:
        kept = [w for w in words if run_dir is None or not w.startswith("run.dir=")]
        return [*kept, *([] if run_dir is None else [f"run.dir={run_dir}"])]

    return _run(cfg, command, in_this_process)


def _probe(words: list[str], in_this_process: bool) -> int:
    """Train a linear head."""
    overrides, flags = _split_flags(words)
    extra = Path(flags["--config-dir"]) if "--config-dir" in flags else None
    cfg = compose_probe(overrides, extra)
    if "--cfg" in flags:
        print(as_yaml(as_dict(cfg)), end="")
        return 0

    def train() -> None:
        from ade_harness.probe.training import train_probe
        from ade_harness.runtime.console import make_console

        train_probe(cfg, make_console(), _current_run.append)

    def command(run_dir: str | None) -> list[str]:
        kept = [w for w in words if run_dir is None or not w.startswith("run.dir=")]
        return ["probe", *kept, *([] if run_dir is None else [f"run.dir={run_dir}"])]

    return _run(cfg, command, in_this_process, train)


def _resume(words: list[str], in_this_process: bool) -> int:
    """Continue a run as its own config.yaml says."""
    from ade_harness.config.compose import stored_config
    from ade_harness.runs.directory import read_manifest

    folders = [w for w in words if "=" not in w]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise HarnessError("resume needs one run directory, such as `resume runs/20260102-030405_demo_a1b2c3`.")
    path = Path(folders[0]).expanduser()
    if read_manifest(path).get("kind") == "probe":
        raise HarnessError(f"{path}: is a probe: give its `probe` command again, with run.dir={path}.")
    try:
        text = (path / "config.yaml").read_text()
    except OSError as error:
        raise HarnessError(f"{path / 'config.yaml'}: cannot be read ({error.strerror}).") from error
    cfg = stored_config(text, [w for w in words if "=" in w])
    cfg.run.dir = str(path)
    return _run(cfg, lambda _: ["resume", *words], in_this_process)


def _run(
    cfg: Config,
    command: Callable[[str | None], list[str]],
    in_this_process: bool,
    work: Callable[[], None] | None = None,
) -> int:
    """Be a rank, or start and watch this node's ranks.

    Args:
        cfg: what to run.
        command: for a run directory (None: not known yet), the words that make a rank of it.
        in_this_process: never start others.
        work: of a rank; None evaluates.
    """
    from ade_harness.cli.failures import tell_failure, work_or_tell
    from ade_harness.runtime.cluster import REQUEUED, find_node, is_rank, requeue_slurm_job, resolve_devices
    from ade_harness.runtime.supervisor import Supervisor

    if in_this_process or is_rank() or not cfg.runtime.supervise:
        return work_or_tell(cfg, _current_run, lambda: _be_rank(cfg, work), _print_error)
    _, ranks = resolve_devices(cfg.runtime)
    node = find_node(cfg.runtime)
    start = [sys.executable, "-m", "ade_harness"]
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        _print_error(text)

    supervisor = Supervisor(lambda run_dir: [*start, *command(run_dir)], ranks, node, cfg.runtime.max_restarts, say)
    code = supervisor.run()
    if supervisor.run_dir is not None:
        _current_run.append(Path(supervisor.run_dir))
    if code in (EXIT_MESSAGE, EXIT_STOPPED) and supervisor.received is not None and node.rank == 0:
        _say_how_to_go_on("Interrupted" if supervisor.received == signal.SIGINT else "Stopped")
    if code not in (0, EXIT_STOPPED) and supervisor.received is None and node.rank == 0:
        tell_failure(cfg, _current_run[-1] if supervisor.run_dir else None, "\n".join(said), _print_error)
    if code == EXIT_STOPPED and cfg.runtime.requeue and supervisor.received == signal.SIGUSR1:
        if node.rank != 0:
            return 0  # a failure here would make srun kill node 0 before it has requeued the job
        told = requeue_slurm_job(cfg.runtime.slurm.most_requeues)
        _print_error(told)
        if told.endswith(REQUEUED):
            time.sleep(_REQUEUE_WAIT_S)
    return code


def _be_rank(cfg: Config, work: Callable[[], None] | None) -> int:
    from ade_harness.evaluation.outcome import run_session
    from ade_harness.runtime.coordination import RankLostError, StopRequestedError

    try:
        if work is not None:
            work()
        else:
            run_session(cfg, on_run_dir=_current_run.append)
    except StopRequestedError as stop:
        _say_how_to_go_on(str(stop).capitalize())
        return EXIT_MESSAGE if str(stop) == "interrupted" else EXIT_STOPPED
    except RankLostError as lost:
        _print_error(f"error: {lost}; what this rank counted is kept.")
        return EXIT_RANK_LOST
    return 0


def _split_flags(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separate key=value words from flags."""
    overrides: list[str] = []
    flags: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        if not word.startswith("-"):
            if not given and not word.startswith("~"):
                raise HarnessError(
                    f"{word!r} is neither a command nor key=value.{did_you_mean(word, VERBS)}"
                    " `python -m ade_harness --help` lists both."
                )
            overrides.append(word)
        elif name in ("-m", "--multirun"):
            flags["--multirun"] = ""
        elif name in ("--cfg", "-c"):
            flags["--cfg"] = value if given else next(rest, "job")
            if flags["--cfg"] != "job":
                raise HarnessError(f"--cfg {flags['--cfg']}: expected `--cfg job`.")
        elif name == "--list":
            flags["--list"] = ""
        elif name == "--job":
            flags["--job"] = value if given else next(rest, "")
        elif name in ("--config-dir", "-cd"):
            flags["--config-dir"] = value if given else next(rest, "")
            if not flags["--config-dir"]:
                raise HarnessError("--config-dir needs a folder, such as `--config-dir my_conf`.")
        else:
            known = ("--cfg", "--config-dir", "--multirun", "--job", "--list", "--help", "--version")
            raise HarnessError(f"{word}: no such flag.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return overrides, flags


def _models(words: Sequence[str]) -> int:
    if words:
        raise HarnessError(f"models takes no arguments, got {' '.join(words)}.")
    from ade_harness.cli.models import print_catalogue
    from ade_harness.config.compose import choices
    from ade_harness.runtime.console import make_console

    print_catalogue(make_console(), choices("model"))
    return 0
