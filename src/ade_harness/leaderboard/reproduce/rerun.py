"""The command `reproduce`: run a run again, with its own commit, and compare image by image."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ade_harness.config.fields import PATHS
from ade_harness.config.kinds import Source, kind_of
from ade_harness.config.overrides import as_override_value, composed_values, unexpected_override
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_json
from ade_harness.files.escapes import escaped, one_line
from ade_harness.files.fetch import cache_dir
from ade_harness.leaderboard.reproduce.checkout import checked_out_code
from ade_harness.leaderboard.reproduce.comparison import LabelComparison, compare_runs, list_differences
from ade_harness.leaderboard.submission.bundle import RUN, bundle_problems, is_bundle, read_declaration
from ade_harness.models.checkpoint.public import hub_checkpoint, url_checkpoint
from ade_harness.runs.directory import new_run_name
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runs.matching import match_runs
from ade_harness.runs.provenance import code_state
from ade_harness.runs.record import is_own
from ade_harness.runs.trust import require_trust
from ade_harness.runtime.cluster import gpu_count
from ade_harness.runtime.console import print_fact, print_line

EXIT_DIFFERENT = 3
"""The run was repeated, and its labels are not the same."""
VERDICT = "reproduction.json"
_PLACES = (*PATHS, "model.id", "model.url", "model.source", "model.http.", "runtime.")
"""What may be elsewhere than in the first run; another value for anything else is another evaluation."""
_SHOWN = 12


def reproduce(
    console: Console, source: Path, output: Path | None, overrides: Sequence[str], trust: bool
) -> tuple[int, dict[str, Any] | None]:
    """Repeat a run or a submission and say whether the bits agree.

    Args:
        console: where to print.
        source: a run directory or a submission.
        output: of the new run, which continues one that was interrupted; None makes one below runs/.
        overrides: where things are on this machine (``dataset.root=...``, ``runtime.devices=8``).
        trust: also a submission that names code or an environment variable of this machine.

    Returns:
        The exit code, 0 if they do, else `EXIT_DIFFERENT` or the run's; what reproduction.json holds, if the run ended.

    Raises:
        HarnessError: it cannot be repeated: see the message. The exit code of a repetition that fails is passed on.
    """
    other = next((override for override in overrides if not override.startswith(_PLACES)), None)
    if other is not None:
        places = ", ".join(f"{place}*" if place.endswith(".") else place for place in _PLACES)
        why = "would change the evaluation"
        if other.startswith(("tracking", "run.")):
            why = "reruns are not tracked, and --output says where it goes"
        raise HarnessError(f"{other}: {why}. Allowed: {places}.")
    first = _read(source)
    repeat = first.manifest.get("repeat")
    if not repeat:
        raise HarnessError(f"{first.path}: its configuration cannot be written as overrides.")
    foreign = unexpected_override(repeat)
    if foreign is not None:
        raise HarnessError(
            f"{first.path}: damaged: manifest.json, repeat: {escaped(foreign)} is no override that decides the counts."
            " Restore it, or remove this directory."
        )
    if not trust and (is_bundle(source) or not is_own(first.path, first.manifest)):
        _check_trust(repeat, source)
    if is_bundle(source):
        own = trust or is_own(first.path, first.manifest)
        overrides = [*_fetched(source, first.config["model"]["kind"], overrides, own), *overrides]
    output = output or Path("runs") / new_run_name(f"{first.config['model']['name']}-again")
    trusted = trust or (not is_bundle(source) and is_own(first.path, first.manifest))
    with checked_out_code(first.manifest["code"], code_state(), trusted) as code:
        for remark in code.remarks:
            console.print(Text(f"Note: {one_line(remark)}.", style="yellow"))
        command = _command(first, repeat, overrides, output)
        print_fact(console, "repeats", str(first.path))
        print_fact(console, "command", shlex.join(["python", *command[1:]]))
        done = subprocess.run(command, env={**os.environ, **code.environment}, check=False)
    if done.returncode:
        print_line(
            console,
            f"The rerun ended with exit code {done.returncode}. Repeat the command with --output {output} to continue"
            " it.",
        )
        return (done.returncode if done.returncode > 0 else 128 - done.returncode), None
    second = load_run(output)
    comparison, changes = compare_runs(first, second), list_differences(first, second)
    content = {"of": str(source), **comparison.as_dict(), "changes": changes}
    write_json(output / VERDICT, content)
    _print(console, comparison, changes, first, second)
    print_fact(console, "written", str(output / VERDICT))
    return (0 if comparison.bit_identical else EXIT_DIFFERENT), content


def _read(source: Path) -> FinishedRun:
    if not is_bundle(source):
        return load_run(source)
    problems = bundle_problems(source)
    if problems:
        raise HarnessError(
            f"{source}: not a valid submission ({len(problems)} problems, the first: {problems[0]})."
            f" `python -m ade_harness submit --check {source}` lists them."
        )
    return load_run(source / RUN)


def _check_trust(repeat: Sequence[str], source: Path) -> None:
    """Refuse what the overrides of an untrusted run would do: they are used, and config.yaml may say something else."""
    for override in repeat:
        if "${" in override:
            raise HarnessError(
                f"{source}: was not made by you on this machine, and would read {override}. Add --trust."
            )
    nested: dict[str, Any] = {}
    for key, value in composed_values(repeat).items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    require_trust(nested, str(source))


def _fetched(folder: Path, kind: str, overrides: Sequence[str], trusted: bool) -> list[str]:
    """Fetch the file of a model that takes a path, unless a path is given.

    Raises:
        HarnessError: the submission is not trusted, so its address is not contacted; or the file cannot be had.
    """
    if kind_of(kind).source is not Source.file or any(override.startswith("model.path=") for override in overrides):
        return []
    source = read_declaration(folder)["references"][0]
    address, sha256 = source["address"], source["sha256"]
    if not trusted:
        raise HarnessError(
            f"{folder}: was not made by you on this machine, and would download {escaped(address)}. Give the file with"
            " model.path=FILE, or add --trust."
        )
    if address.startswith("hub:"):
        name, _, rest = address[4:].partition("@")
        revision, _, file = rest.partition("/")
        path = hub_checkpoint(name, file, revision, sha256, "model.path").path
    else:
        path = url_checkpoint(address, cache_dir() / "checkpoints", sha256, key="model.path").path
    return [f"model.path={as_override_value(str(path))}"]


def _command(first: FinishedRun, repeat: Sequence[str], overrides: Sequence[str], output: Path) -> list[str]:
    """Return the command that evaluates again; a later override of a key takes precedence."""
    given = {override.partition("=")[0]: override for override in [*repeat, *overrides]}
    device = first.manifest["device"]
    if "runtime.accelerator" not in given and (device == "cpu" or gpu_count() > 0):
        given["runtime.accelerator"] = f"runtime.accelerator={device}"
    given |= {"tracking": "tracking=none", "run.dir": f"run.dir={as_override_value(str(output))}"}
    return [sys.executable, "-m", "ade_harness", *given.values()]


def _print(
    console: Console, comparison: LabelComparison, changes: Sequence[str], first: FinishedRun, second: FinishedRun
) -> None:
    if changes:
        table = Table(title="differences from the first run", box=HORIZONTALS, show_header=False, title_justify="left")
        for change in changes[:_SHOWN]:
            table.add_row(Text(change))
        if len(changes) > _SHOWN:
            table.add_row(Text(f"... and {len(changes) - _SHOWN} more, in {VERDICT}"))
        console.print(table)
    if comparison.different:
        table = Table(title="images that differ most", box=HORIZONTALS, title_justify="left")
        for name in ("image", "pixels, at least", "of"):
            table.add_column(name, justify="left" if name == "image" else "right")
        for image in comparison.different[:_SHOWN]:
            table.add_row(Text(image.image_id), f"{image.pixels:,}", f"{image.of:,}")
        console.print(table)
    style = "bold green" if comparison.bit_identical else "bold yellow"
    console.print(Text(one_line(comparison.verdict), style=style), soft_wrap=True)
    sentence = None if comparison.bit_identical else _within(first, second)
    if sentence:
        console.print(Text(one_line(sentence)), soft_wrap=True)


def _within(first: FinishedRun, second: FinishedRun) -> str | None:
    """Say whether the difference is small beside what other images would do."""
    interval: Mapping[str, Any] | None = first.metrics["intervals"].get("mIoU")
    try:
        match_runs(first, second)
    except HarnessError as error:
        return str(error)
    if interval is None:
        return None
    inside = interval["low"] <= second.metrics["mIoU"] <= interval["high"]
    return (
        f"the second mIoU is {'inside' if inside else 'outside'} of the first one's {interval['level']:.0%} interval"
        f" {100 * interval['low']:.2f} to {100 * interval['high']:.2f}"
    )
