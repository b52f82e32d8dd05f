"""The command `submit`: a finished run in, a folder out that anybody can check and repeat."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from ade_harness.config.fields import PATHS
from ade_harness.config.kinds import Source, kind_of
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_json, write_text
from ade_harness.files.documents import yaml_text
from ade_harness.files.fetch import file_hash
from ade_harness.leaderboard.submission.bundle import RUN, bundle_problems
from ade_harness.leaderboard.submission.declaration import (
    DECLARATION,
    check_contact,
    check_repository,
    make_declaration,
)
from ade_harness.leaderboard.submission.public_files import PublicSource, check_public, overrides_for, sources_of
from ade_harness.leaderboard.submission.scripts import SCRIPT, script_files
from ade_harness.leaderboard.table import OTHER_DATASET, why_not_ranked
from ade_harness.runs.directory import LEDGER, MANIFEST
from ade_harness.runs.finished import FinishedRun
from ade_harness.runs.ledger import write_ledger
from ade_harness.runtime.console import make_console
from ade_harness.runtime.notes import resume_command

_KEPT = (
    "schema", "status", "started", "finished", "marks", "code", "seeds", "environment", "device", "kernels", "model",
    "dataset", "identity", "ledger", "timings", "failures",
)  # fmt: skip
"""Keys of the manifest that are kept: the rest is about the machine of the submitter."""


def listed(problems: Sequence[str]) -> str:
    """Number problems, a line each."""
    return "\n".join(f"  {number}. {text}" for number, text in enumerate(problems, 1))


def prepare(
    run: FinishedRun, options: Mapping[str, str], look: Callable[[PublicSource], PublicSource]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Decide whether a run can be submitted, and write what the submission says.

    Args:
        run: a finished run.
        options: flags of the command by name.
        look: checks that a source is public.

    Returns:
        The declaration without its ``files``, and the texts of its scripts.

    Raises:
        HarnessError: all reasons against it at once.
    """
    code, kind = run.manifest["code"], kind_of(run.config["model"]["kind"])
    problems = run_problems(run)
    repository = options.get("--repository", code.get("origin"))
    given = {role: options[f"--{role}"] for role in ("checkpoint", "backbone") if f"--{role}" in options}
    sources: list[PublicSource] = []

    def find() -> None:
        sources.extend(look(source) for source in sources_of(run, given))

    checks: tuple[Callable[[], None], ...] = (
        lambda: check_contact(options.get("--contact")), lambda: check_repository(repository), find,
    )  # fmt: skip
    for check in checks:
        try:
            check()
        except HarnessError as error:
            problems.append(str(error))
    if kind.is_code and "--model-code" not in options:
        problems.append(
            f"model._target_={run.config['model']['_target_']} is your own code: say where others find it:"
            " --model-code https://HOST/GROUP/NAME/tree/COMMIT."
        )
    if problems:
        raise HarnessError(f"{run.path}: cannot be submitted:\n" + listed(problems))
    about = {flag.strip("-").replace("-", "_"): value for flag, value in options.items()}
    repository = re.sub(r"^git@([\w.-]+):", r"https://\1/", str(repository))
    declaration = make_declaration(run, about, sources, repository, public_overrides(run, sources))
    return declaration, script_files(declaration)


def run_problems(run: FinishedRun) -> list[str]:
    """Return why a run's number is not one that a leaderboard takes; each with what to do."""
    problems, code = [], run.manifest["code"]
    why = why_not_ranked(run)
    if why is not None:
        advice = "evaluate all 2,000 validation images, with published weights"
        if why.startswith(OTHER_DATASET):
            advice = "evaluate the model on it (dataset=ade20k)"
        elif why.startswith("CHANGED"):
            advice = "evaluate again"
        elif why.startswith("PARTIAL"):
            again = resume_command(run.path)
            advice = f"`{again}` evaluates the failed images; or remove dataset.limit and dataset.ids"
        problems.append(f"{why}: {advice}.")
    if code["commit"] is None:
        problems.append("the run was made by an installed package, so there is no commit: evaluate in a git clone.")
    elif code["dirty"]:
        problems.append(
            f"the code had uncommitted changes ({run.path / 'code.diff'}): commit and push them, then evaluate again."
        )
    if not run.manifest.get("repeat"):
        problems.append("the configuration cannot be written as overrides: simplify its keys, evaluate again.")
    return problems


def public_overrides(run: FinishedRun, sources: Sequence[PublicSource]) -> list[str]:
    """Return the overrides that repeat a run anywhere: no paths and names of this machine, seeds spelled out."""
    local = {"checkpoint": "checkpoint", "backbone": "backbone_checkpoint", "endpoint": None}
    model = run.config["model"]
    taken_from = kind_of(model["kind"]).source
    overrides = [o for o in run.manifest["repeat"] if o.partition("=")[0] not in (*PATHS, "model.http.token_env")]
    for source in sources:
        from_disk = model.get(local[source.role]) is not None
        if from_disk or taken_from is Source.repository:
            new = overrides_for(source, taken_from)
            keys = {override.partition("=")[0] for override in new}
            overrides = [o for o in overrides if o.partition("=")[0] not in keys] + new
    seeds = run.manifest["seeds"]
    return [o for o in overrides if o.partition("=")[0] not in seeds] + [f"{key}={seed}" for key, seed in seeds.items()]


def build(run: FinishedRun, output: Path, declaration: dict[str, Any], texts: Mapping[str, str]) -> None:
    """Write a submission and check it as anybody else would; it gets its name only if it passes.

    Raises:
        HarnessError: it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".submission-") as temporary:
            folder = Path(temporary) / output.name
            (folder / RUN / LEDGER).mkdir(parents=True)
            _write_run(run, folder / RUN, declaration)
            for name, text in texts.items():
                write_text(folder / name, text)
            (folder / SCRIPT).chmod(0o755)
            names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            declaration["files"] = {name: file_hash(folder / name, "sha256") for name in names}
            write_text(folder / DECLARATION, yaml_text(declaration, allow_unicode=True))
            problems = bundle_problems(folder)
            if problems:  # what one cannot check oneself nobody can
                raise HarnessError(f"{run.path}: its submission would not pass its check:\n" + listed(problems))
            shutil.move(folder, output)
    except OSError as error:
        raise HarnessError(f"{output}: cannot be written ({error.strerror or error}).") from error


def _write_run(run: FinishedRun, folder: Path, declaration: Mapping[str, Any]) -> None:
    """Write the run's record without what is about its machine alone: host names, paths, the user."""
    hosts = {host: f"node{number}" for number, host in enumerate(sorted({row.host for row in run.rows}))}
    write_ledger(folder / LEDGER / "ledger.parquet", [replace(row, host=hosts[row.host]) for row in run.rows])
    places = {str(run.config["model"].get(key)): Path(str(run.config["model"].get(key))).name for key in _PATH_KEYS}
    places |= {str(run.manifest["dataset"]["root"]): "ADE20K_ROOT", str(Path.home()): "~"}
    # only whole paths: a relative path reveals nothing of a machine, and "data" is a word of many texts
    places = {path: name for path, name in places.items() if path.startswith("/") and path != "/"}
    manifest = {key: run.manifest[key] for key in _KEPT}
    manifest["command"] = ["python", "-m", "ade_harness", *declaration["command"]]
    manifest["repeat"] = list(declaration["command"])
    manifest["code"] = {k: v for k, v in manifest["code"].items() if k != "origin"}
    config = {group: run.config[group] for group in ("model", "dataset", "inference", "metrics", "runtime")}
    metrics = {**run.metrics, "notes": [_rename_hosts(note, hosts) for note in run.metrics["notes"]]}
    ranks = [{**share, "host": hosts.get(share["host"], "node")} for share in manifest["timings"]["ranks"]]
    manifest["timings"] = {**manifest["timings"], "ranks": ranks}
    write_json(folder / MANIFEST, _without(manifest, places))
    write_json(folder / "metrics.json", _without(metrics, places))
    write_text(folder / "config.yaml", yaml.safe_dump(_without(config, places), sort_keys=False))


_PATH_KEYS = tuple(key.partition(".")[2] for key in PATHS if key.startswith("model."))


def _rename_hosts(text: str, hosts: Mapping[str, str]) -> str:
    """Replace host names, as whole words."""
    for host, name in hosts.items():
        text = re.sub(rf"(?<![\w.-]){re.escape(host)}(?![\w-])", name, text)
    return text


def _without(content: Any, places: Mapping[str, str]) -> Any:
    """Replace paths of this machine in every text."""
    if isinstance(content, Mapping):
        return {key: _without(value, places) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without(value, places) for value in content]
    if isinstance(content, str):
        for path in sorted(places, key=len, reverse=True):
            content = content.replace(path, places[path])
    return content


def look_up(source: PublicSource) -> PublicSource:
    """Check that a source is public, with progress while its content is read."""
    columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = make_console(result=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"reading {source.role}", total=None)
        return check_public(source, True, lambda have, total: progress.update(task, completed=have, total=total))
