"""The command `resume`: a run goes on as its own config.yaml says, in the directory where it was started."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from operator import attrgetter
from pathlib import Path

from ade_harness.cli.answer import Answer
from ade_harness.cli.launch import launch
from ade_harness.cli.work import WORK, score_of, training_of
from ade_harness.config.compose import stored_config
from ade_harness.config.composed import Composed
from ade_harness.config.fields import place_keys
from ade_harness.config.schema import Config, TrackingKind
from ade_harness.errors import require
from ade_harness.files.reading import expanded
from ade_harness.runs.directory import PROBE, is_of_memory, read_manifest
from ade_harness.runs.record import config_and_owner
from ade_harness.runs.trust import require_trust
from ade_harness.runtime.console import print_error

_OLD_PROBE = (
    "{path}: this probe was begun before probes kept their configuration: give its `probe` command again, with"
    " run.dir={path}."
)


def run_resume(options: argparse.Namespace) -> Answer:
    """Continue a run as its own config.yaml says.

    Raises:
        HarnessError: no run, or a damaged one; or nothing was scored.
    """
    path = expanded(options.run)
    wrong = next((override for override in options.overrides if "=" not in override), None)
    require(wrong is None, f"{wrong!r}: expected key=value; resume takes one run directory.")
    for override in options.overrides:
        require(
            not override.lstrip("+~").startswith("hydra"),
            f"{override}: has no effect on a run that is resumed. Remove it.",
        )
        require(
            not override.lstrip("+~").startswith(("run.dir=", "run.root=")),
            f"{override}: a run is resumed in its own directory. Move it, or remove this.",
        )
    manifest = read_manifest(path)
    require(
        not is_of_memory(manifest),
        f"{path}: cannot be resumed: its model was in the memory of a Python process. Evaluate it again, into another"
        " folder.",
    )
    file = path / "config.yaml"
    if not file.exists():
        require(manifest.get("kind") != PROBE, _OLD_PROBE.format(path=path))
    content, own = config_and_owner(path, manifest)
    if not options.trust and not own:
        require_trust(content, str(path))
    # the directory of somebody else's run may be anywhere, with their settings files in it
    directory = Path(manifest.get("directory") or Path.cwd())
    if not own and not options.trust and directory != Path.cwd():
        print_error(f"{path} was not made by you on this machine: its relative paths are taken from {Path.cwd()}.")
        directory = Path.cwd()
    config = stored_config(content, options.overrides)
    if not own and not options.trust and config.tracking.kind == TrackingKind.wandb:
        # their tracking.json may name a run of this user's, which would be opened again and overwritten
        print_error(f"{path} was not made by you on this machine: it is not logged to W&B. --trust logs it.")
        config.tracking.kind = TrackingKind.none
    work = "probe" if manifest.get("kind") == PROBE else "evaluate"
    require(
        (work == "probe") == (config.probe is not None),
        f"{path}: is damaged: its manifest.json says {'a probe' if work == 'probe' else 'an evaluation'}, its"
        " config.yaml the other. Start a new run.",
    )
    with _where_it_was_started(directory, config, path, options.overrides):
        code, run_dir = launch(
            config, options.in_this_process, lambda found: WORK[work](Composed.from_config(config), found),
            {"work": work, "logging": None, "verbose": options.verbose},
        )  # fmt: skip
        return Answer((training_of if work == "probe" else score_of)(run_dir), code)


@contextmanager
def _where_it_was_started(there: Path, config: Config, path: Path, overrides: Sequence[str]) -> Iterator[None]:
    """Be in the directory where a run was started: its relative paths, and modules of its own, belong there.

    What is given now belongs to the present directory. A run that was moved to a machine without that directory is
    continued in the present one.
    """
    here = Path.cwd()
    config.run.dir = str(path)
    if there == here or not there.is_absolute() or not there.is_dir():
        if there != here:
            print_error(f"{path} was started in {there}, which is not here: its relative paths are taken from {here}.")
        yield
        return
    for key in {override.partition("=")[0] for override in overrides} & set(place_keys(Config)):
        node, _, name = key.rpartition(".")
        owner = attrgetter(node)(config)
        given = getattr(owner, name)
        if given is not None and expanded(given).exists():
            setattr(owner, name, str(expanded(given).absolute()))
    config.run.dir = str(path.absolute())
    print_error(f"relative paths of this run belong to {there}, where it was started.")
    with chdir(there):
        yield
