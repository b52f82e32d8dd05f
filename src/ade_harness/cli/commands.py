"""The table of commands: name, help, arguments and function. Parsers, help and completion are built from it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ade_harness.config.dataset import Split
from ade_harness.config.model import CheckpointWeights
from ade_harness.errors import HarnessError, did_you_mean


class Argument:
    """One argument or option, as argparse's ``add_argument`` takes it."""

    def __init__(self, *names: str, **settings: Any) -> None:
        self.names = names
        self.settings = settings


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    """One name, or two: ``data verify``."""
    summary: str
    function: str
    """``module:function`` below this package, imported when the command is given: takes the parsed options."""
    arguments: tuple[Argument, ...] = ()
    details: str = ""
    """What its help prints after the options."""


_OVERRIDES = Argument("overrides", nargs="*", metavar="key=value", help="Hydra overrides of the configuration")
_RUN = Argument("run", metavar="RUN", help="a run directory")
_TRUST = "allow a run made by someone else to import code and use its URLs and environment variables"
_SPLITS, _WEIGHTS = [s.value for s in Split], [w.value for w in CheckpointWeights]
_CONFIG_DIR = Argument("-cd", "--config-dir", metavar="DIR", help="your own YAML files, such as DIR/model/mine.yaml")
_HYDRA = (
    _CONFIG_DIR,
    Argument("-cn", "--config-name", metavar="NAME", help="another primary configuration, such as one in --config-dir"),
    Argument("-cp", "--config-path", metavar="DIR", help="use this configuration folder instead of the packaged one"),
    Argument("-c", "--cfg", choices=("job", "hydra", "all"), help="print the composed configuration and exit"),
    Argument("-p", "--package", metavar="NODE", help="with --cfg: only this node, such as inference.tta"),
    Argument("--resolve", action="store_true", help="with --cfg: resolve interpolations"),
    Argument(
        "-i", "--info", nargs="?", const="all",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        help="print Hydra's information and exit",
    ),
    Argument("-sc", "--shell-completion", action="store_true", help="install=bash|zsh|fish: print a completion script"),
    Argument("--hydra-help", action="store_true", help="Hydra's own help"),
)  # fmt: skip
_SWEEP = (
    Argument(
        "-m", "--multirun", action="store_true",
        help="run a sweep: a,b  range(1,4)  glob(segformer*); hydra/launcher=slurm submits it",
    ),
    Argument("-r", "--run", action="store_true", help="run one configuration (default; Hydra's opposite of -m)"),
    Argument("--experimental-rerun", metavar="FILE", help="refused: it runs a pickle; use resume, or reproduce"),
    Argument("--list", action="store_true", help="with -m: print the jobs and exit"),
    Argument("--job", type=int, metavar="N", help="with -m: run only job N, from 0 (for SLURM job arrays)"),
)  # fmt: skip
_EVALUATE_DETAILS = """\
common overrides:
  model=NAME                    {model}
  model.path=PATH               the file (onnx, torchscript, exported) or the folder of label PNGs (predictions)
  model.url=URL                 an endpoint that answers with label maps or scores (model=http)
  model.id=ID                   hub id or folder (model=hf)
  model._target_=pkg.mod.Net    your own nn.Module (model=custom), model.kwargs.NAME=VALUE its arguments
  model.checkpoint=PATH         your own weight file; or model.weights=random model.seed=0
  model.backbone_checkpoint=PATH    the frozen backbone's weights, if the checkpoint has only the head
  model.class_map=[null,0,1]    per output channel: class 0..149, or null to leave it out
  dataset=ade20k dataset.root=PATH    folder or zip (or set ADE20K_ROOT); dataset.limit=N, dataset.ids=[...]
  inference=ss|ms               the model's own single-scale or multi-scale protocol, or one by name:
                                {inference}
  runtime.devices=N             ranks on this machine (GPUs, or CPU processes with runtime.accelerator=cpu)
  runtime.max_restarts=N        restart all ranks up to N times if one fails
  run.dir=PATH                  output directory; an interrupted run in it is resumed
  run.on_error=skip             skip images that fail; the score is marked PARTIAL
  tracking=none|wandb           W&B is offline unless a key is set
Paths and URLs need no Hydra quoting: model.checkpoint=/data/ep=99, v2 (1)/x.ckpt is one shell argument.
"""
_PROBE_DETAILS = """\
overrides: those of evaluate, with dataset.split=training, and
  probe=NAME                    recipe: {probe}; default: the model's own
  probe.KEY=VALUE               its fields: --cfg job --package probe prints them
  run.dir=PATH                  output directory; the same command resumes an interrupted training
"""

COMMANDS = (
    Command(
        "evaluate", "evaluate a model (default; no arguments: run the demo)",
        "evaluate:run_evaluate", (_OVERRIDES, *_SWEEP, *_HYDRA), _EVALUATE_DETAILS,
    ),
    Command(
        "resume", "evaluate the remaining images of a run, on any number of ranks", "resume:run_resume",
        (_RUN, _OVERRIDES, Argument("--trust", action="store_true", help=_TRUST)),
    ),
    Command(
        "predict", "predict label maps for unlabelled images", "predict:run_predict",
        (
            Argument(
                "arguments", nargs="+", metavar="KEY=VALUE|IMAGE|FOLDER",
                help="model options as for `evaluate`, then JPEG or PNG files or folders",
            ),
            Argument("--output", default="predictions", metavar="DIR", help="default: predictions"),
            _CONFIG_DIR,
        ),
    ),
    Command(
        "runs", "list runs in one table", "runs:run_runs",
        (
            Argument("folders", nargs="*", metavar="DIR", help="runs, or folders of runs; default: runs"),
            Argument("--sort", metavar="COLUMN", help="such as mIoU (best first); default: by date"),
            Argument("--reverse", action="store_true", help="sort the other way round"),
            Argument(
                "--where", action="append", default=[], metavar="CONDITION",
                help="only matching runs: COLUMN=VALUE (with *), !=, <, <=, >, >=, as in 'mIoU>0.4'; repeatable",
            ),
            Argument(
                "--output", action="append", default=[], metavar="FILE",
                help=".csv, .json or .md; repeatable",
            ),
        ),
    ),
    Command("status", "show the progress of a run", "status:run_status", (_RUN,)),
    Command(
        "report", "write a self-contained HTML report of a run", "report:run_report",
        (
            _RUN,
            Argument("--output", metavar="FILE", help="default: report.html in the run directory"),
            Argument("--scenes", metavar="FILE", help="sceneCategories.txt; default: beside the images"),
        ),
    ),
    Command(
        "compare", "compare runs: table, paired tests, HTML page", "report:run_compare",
        (
            Argument("runs", nargs="+", metavar="RUN", help="run directories, or wandb:ENTITY/PROJECT/RUN"),
            Argument("--output", metavar="FILE", help="the HTML file to write; default: comparison.html"),
            Argument("--resamples", type=int, metavar="N", help="number of bootstrap resamples, at least 100"),
        ),
    ),
    Command(
        "probe", "train a linear head on a frozen backbone", "evaluate:run_probe",
        (_OVERRIDES, Argument("-m", "--multirun", action="store_true", help=argparse.SUPPRESS), *_HYDRA), _PROBE_DETAILS
    ),
    Command(
        "models", "the leaderboard's systems, and which can be run", "models:run_models",
        (Argument("names", nargs="*", metavar="NAME", help="show details: source, protocols, how checked"),),
    ),
    Command(
        "leaderboard", "compare your complete runs with the published rows", "leaderboard:run_leaderboard",
        (
            Argument("runs", nargs="*", metavar="RUN", help="run directories; default: all below --root"),
            Argument("--root", metavar="DIR", help="folder of runs; default: runs"),
            Argument(
                "--output", action="append", default=[], metavar="FILE",
                help=".md, .csv, or the chart as .png, .svg, .pdf; repeatable",
            ),
        ),
    ),
    Command(
        "submit", "write a checked leaderboard submission, or check an existing one", "leaderboard:run_submit",
        (
            Argument("run", nargs="?", metavar="RUN", help="a complete run"),
            Argument("--check", metavar="DIR", help="check a submission; no code from it is executed"),
            Argument("--contact", metavar="ADDRESS", help="e-mail address or web page of the submitter"),
            Argument("--output", metavar="DIR", help="default: submission-RUN"),
            Argument("--checkpoint", metavar="URL", help="public location of the weights; default: from the run"),
            Argument("--backbone", metavar="URL", help="public location of the frozen backbone's weights"),
            Argument("--repository", metavar="URL", help="public repository of this code; default: the clone's origin"),
            Argument("--model-code", metavar="URL", help="public code of a model=custom, at a commit"),
            Argument("--system", metavar="NAME", help="name of the system in the leaderboard row"),
            Argument("--organization", metavar="NAME", help="organization in the leaderboard row"),
            Argument("--paper", metavar="URL", help="paper in the leaderboard row"),
            Argument("--no-network", action="store_true", help="do not check that files are public"),
        ),
    ),
    Command(
        "reproduce", "rerun a run or a submission at its own commit and compare bit by bit",
        "leaderboard:run_reproduce",
        (
            Argument("source", metavar="RUN|SUBMISSION", help="a run directory, or the folder of a submission"),
            _OVERRIDES,
            Argument("--output", metavar="DIR", help="directory of the new run; an interrupted one is resumed"),
            Argument("--trust", action="store_true", help=_TRUST),
        ),
    ),
    Command(
        "data download", "download ADEChallengeData2016.zip, verify and extract it", "data:run_download",
        (
            Argument("--root", metavar="DIR", help="default: the cache"),
            Argument("--url", metavar="URL", help="a mirror of the official archive"),
            Argument(
                "--source", choices=("archive", "hub"), default="archive",
                help="hub: the Parquet copy of the validation split on the hub, if the official host is down",
            ),
            Argument("--repository", metavar="ID", help="with --source hub: a copy other than the authors'"),
            Argument("--sha1", metavar="HEX", help="expected SHA-1 of the archive"),
            Argument("--zip-only", action="store_true", help="do not extract it"),
        ),
    ),
    Command(
        "data verify", "read every pair and check it against the official list", "data:run_verify",
        (
            Argument("root", nargs="?", metavar="ROOT", help="folder or zip; default: ADE20K_ROOT, ./data, the cache"),
            Argument("--split", default=Split.validation.value, choices=_SPLITS, help="dataset split"),
        ),
    ),
    Command(
        "serve", "answer HTTP requests with a model (docs/endpoints.md)", "serve:run_serve",
        (
            _OVERRIDES,
            Argument("--host", default="127.0.0.1", help="address to listen on"),
            Argument("--port", type=int, default=8000, help="0 chooses a free one"),
            Argument("--token-env", metavar="NAME", help="environment variable of the token that clients must send"),
            _CONFIG_DIR,
        ),
    ),
    Command(
        "convert",
        "convert a pickled checkpoint to safetensors without executing code from it",
        "convert:run_convert",
        (
            Argument("file", metavar="FILE", help="a torch file or pickle, as trainers write them"),
            Argument("output", metavar="OUT.safetensors", help="the file to write"),
            Argument("--weights", choices=_WEIGHTS, help="if it holds both EMA and trained weights"),
            Argument("--prefix", metavar="PREFIX", help="only weights with this name prefix, such as student."),
        ),
    ),
    Command(
        "workspace", "save a W&B view with the columns that matter, best mIoU first", "workspace:run_workspace",
        (
            Argument("entity", metavar="ENTITY", help="user or team"),
            Argument("project", metavar="PROJECT", help="W&B project, such as ade20k"),
            Argument("--name", default="ADE20K evaluations", metavar="NAME", help="name of the view"),
        ),
    ),
    Command("doctor", "check this machine's installation", "doctor:run_doctor"),
)  # fmt: skip
EVERYWHERE = (
    Argument("-q", "--quiet", action="store_true", help="results and errors only"),
    Argument("-v", "--verbose", action="store_true", help="debug messages, and tracebacks behind errors"),
    Argument("--json", action="store_true", help="one JSON object on stdout; everything else on stderr"),
)
COMMAND_NAMES = tuple(dict.fromkeys(command.name.split()[0] for command in COMMANDS))


class _Parser(argparse.ArgumentParser):
    given: Sequence[str] = ()

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and know what was given for the message of a mistake."""
        self.given = list(args or ())
        return super().parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        _, _, name = self.prog.partition("ade_harness ")
        flags = [flag for action in self._actions for flag in action.option_strings]
        if "arguments are required" in message:  # argparse looks for these first, and counts optional ones among them
            unknown = [text for text in self.given if text.startswith("--") and text.partition("=")[0] not in flags]
            message = f"unrecognized arguments: {' '.join(unknown)}" if unknown else message.replace(", key=value", "")
        unknown = message.removeprefix("unrecognized arguments: ").split()
        hint = did_you_mean(unknown[0], flags) if message.startswith("unrecognized") else ""
        raise HarnessError(f"{name}: {message}.{hint} `python -m ade_harness {name} --help` lists its options.")


def find_command(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """Return the command that arguments begin with (``evaluate`` if they name none), and the other arguments.

    Raises:
        HarnessError: no such command.
    """
    plain = [given for given in arguments[:2] if not given.startswith("-") and "=" not in given]
    if not arguments or not plain or arguments[0] != plain[0] or arguments[0].startswith("~"):
        return COMMANDS[0], list(arguments)
    for number in (2, 1):
        for command in COMMANDS:
            if command.name == " ".join(arguments[:number]):
                return command, list(arguments[number:])
    below = [c.name for c in COMMANDS if c.name.startswith(f"{arguments[0]} ")]
    if below:
        given = arguments[1] if len(arguments) > 1 else ""
        ends = [name.split()[1] for name in below]
        shown = " ".join([arguments[0], *([given] if given else [])])
        raise HarnessError(f"{shown}: expected {' or '.join(below)}.{did_you_mean(given, ends)}")
    raise HarnessError(
        f"{arguments[0]!r} is neither a command nor a key=value override.{did_you_mean(arguments[0], COMMAND_NAMES)}"
        f" Commands: {', '.join(COMMAND_NAMES)}; see --help."
    )


def parser_of(command: Command, choices: dict[str, str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of one command.

    Args:
        command: of the table.
        choices: texts for ``{placeholders}`` in its details; None leaves the details out.
    """
    parser = _Parser(
        prog=f"python -m ade_harness {command.name}",
        description=command.summary,
        epilog=command.details.format(**choices) if choices is not None else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for argument in (*command.arguments, *EVERYWHERE):
        parser.add_argument(*argument.names, **argument.settings)
    return parser


def overview() -> str:
    """Return the help of all commands together."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [f"  {command.name:{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "Evaluate semantic segmentation models on ADE20K: exact counts, bit-identical on any number of ranks.",
            "",
            "usage: python -m ade_harness [COMMAND] [arguments]",
            "",
            "commands:",
            *lines,
            "",
            "`python -m ade_harness COMMAND --help` lists the options of a command; --version prints the version.",
        ]
    )
