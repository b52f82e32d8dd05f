"""Read and check a submission made by somebody else: no code from it is executed, and nothing in it is believed."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

import ade_harness
from ade_harness.data.ade20k import validation_sizes
from ade_harness.errors import HarnessError
from ade_harness.files.documents import PlainLoader
from ade_harness.files.fetch import file_hash
from ade_harness.files.reading import read_regular
from ade_harness.leaderboard.submission.declaration import DECLARATION, declaration_problems, is_safe_override
from ade_harness.leaderboard.submission.scripts import script_files
from ade_harness.leaderboard.table import why_not_ranked
from ade_harness.metrics.bootstrap import bootstrap
from ade_harness.metrics.confusion import scores
from ade_harness.runs.directory import LEDGER, MANIFEST
from ade_harness.runs.exactness import check_rows
from ade_harness.runs.finished import FinishedRun, load_run

RUN = "run"
"""The folder of a submission that is a run directory: `report` and `compare` read it."""
_NEEDED = (f"{RUN}/{MANIFEST}", f"{RUN}/config.yaml", f"{RUN}/metrics.json")
_ALLOWED = re.compile(rf"[\w.-]+|{RUN}/[\w.-]+|{RUN}/{LEDGER}/[\w.-]+\.parquet")
_MAX_BYTES = 512 << 20
_MAX_TEXT_BYTES = 16 << 20
_MAX_FILES = 64
_MAX_DEPTH = 3
_MAX_RESAMPLES = 100_000


def is_bundle(folder: Path) -> bool:
    """Whether a folder says that it is a submission."""
    return (folder / DECLARATION).is_file()


def bundle_problems(folder: Path) -> list[str]:
    """Return everything that is wrong with a submission; nothing if it is valid.

    The files are compared with the list of hashes, the ledger with the official images, their sizes and the score, the
    script and the container with what this version makes of the declaration.

    Args:
        folder: of the submission.

    Raises:
        HarnessError: there is no such folder, or it cannot be read.
    """
    try:
        names, problems = _list_files(folder)
        if problems:
            return problems
        if DECLARATION not in names:
            return [f"{DECLARATION}: missing. `python -m ade_harness submit RUN --contact ...` makes a submission"]
        declaration = read_declaration(folder)
        problems = declaration_problems(declaration)
        if problems:
            return [f"{DECLARATION}: {_printable(problem)}" for problem in problems]
        problems = _file_problems(folder, names, declaration["files"])
        return [
            _printable(p)
            for p in problems or [*_script_problems(folder, declaration), *_run_problems(folder, declaration)]
        ]
    except HarnessError as error:
        return [_printable(str(error))]
    except OSError as error:
        raise HarnessError(f"{error.filename or folder}: cannot be read ({error.strerror or error}).") from error


def _printable(text: str) -> str:
    """Return one line without control characters, which could change what a terminal shows."""
    shown = re.sub(r"[^\x20-\x7e\u00a0-\uffff]", "?", text)
    return shown if len(shown) <= 400 else f"{shown[:400]}..."


def read_declaration(folder: Path) -> dict[str, Any]:
    """Read submission.yaml, which makes no objects.

    Raises:
        HarnessError: too large, or no mapping.
    """
    path = folder / DECLARATION
    try:
        content = yaml.load(read_regular(path, _MAX_TEXT_BYTES).decode("utf-8"), PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        raise HarnessError(f"{DECLARATION}: not valid YAML ({(str(error).splitlines() or ['damaged'])[0]}).") from error
    if not isinstance(content, dict):
        raise HarnessError(f"{DECLARATION}: expected a mapping.")
    return content


def _list_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of all files, and what must not be there."""
    if not folder.is_dir():
        raise HarnessError(f"{folder}: no such folder.")
    names: list[str] = []
    problems: list[str] = []
    for path, depth in _walk(folder, 1):
        name, mode = str(path.relative_to(folder)), path.lstat().st_mode
        if stat.S_ISDIR(mode) and depth <= _MAX_DEPTH:
            continue
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "neither a file nor a folder of a submission"
            problems.append(f"{_printable(name)}: is {kind}. A submission holds plain files alone")
        elif path.stat().st_size > (_MAX_BYTES if name.endswith(".parquet") else _MAX_TEXT_BYTES):
            problems.append(f"{_printable(name)}: is too large")
        names.append(name)
        if len(names) > _MAX_FILES:
            return names, [*problems, f"more than {_MAX_FILES} files"]
    return names, problems


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, int]]:
    """Yield everything below a folder; links are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        yield Path(entry.path), depth
        if entry.is_dir(follow_symlinks=False) and depth < _MAX_DEPTH:
            yield from _walk(Path(entry.path), depth + 1)


def _file_problems(folder: Path, names: list[str], listed: Mapping[Any, Any]) -> list[str]:
    """Compare the files with the declaration's list."""
    problems = []
    for name in listed:
        outside = not isinstance(name, str) or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts
        if outside or _ALLOWED.fullmatch(name) is None:
            problems.append(f"files: {name!r} is not the name of a file of a submission")
    if problems:
        return problems
    problems += [f"{name}: is not in the list of files" for name in names if name not in listed and name != DECLARATION]
    problems += [f"{name}: is missing" for name in (*listed, *_NEEDED) if name not in names]
    if problems:
        return problems
    for name, expected in listed.items():
        found = file_hash(folder / name, "sha256")
        if found != expected:
            problems.append(f"{name}: was changed: its sha256 is {found[:12]}, the list has {str(expected)[:12]}")
    return problems


def _script_problems(folder: Path, declaration: Mapping[str, Any]) -> list[str]:
    """Compare script, container and pins with what the declaration makes."""
    problems = []
    for name, text in script_files(declaration).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: is missing")
        elif path.read_bytes() != text.encode():
            version = declaration["code"]["version"]
            other = (
                ""
                if version == ade_harness.__version__
                else f" (it was made by version {version}, this is {ade_harness.__version__})"
            )
            problems.append(f"{name}: is not what {DECLARATION} gives{other}. Do not run it before you have read it")
    return problems


def _run_problems(folder: Path, declaration: Mapping[str, Any]) -> list[str]:
    """Compare the run's record with the official images and with the declaration."""
    try:
        run = load_run(folder / RUN)
        check_rows(run.rows, validation_sizes())
        return _record_problems(run, declaration)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        return [f"{RUN}: damaged, or of another version ({type(error).__name__}: {error})"]


def _same_interval(run: FinishedRun, results: Sequence[Mapping[str, Any]]) -> bool:
    """Compare the declared interval of mIoU with that of the ledger; small enough tolerance for another library."""
    wanted = run.config["metrics"]
    if not wanted["resamples"]:
        return not any("interval" in row for row in results)
    if not 0 < wanted["resamples"] <= _MAX_RESAMPLES:
        return False
    found = bootstrap(run.areas, wanted["resamples"], wanted["seed"]).intervals(wanted["level"])["mIoU"]
    ends = [found.low, found.high, found.level] if found else []
    return all(np.allclose([*row["interval"], row["level"]], ends, rtol=0, atol=1e-9) for row in results)


def _record_problems(run: FinishedRun, declaration: Mapping[str, Any]) -> list[str]:
    manifest, code = run.manifest, run.manifest["code"]
    ids, official = {row.image_id for row in run.rows}, validation_sizes()
    if ids != official.keys():
        missing, other = sorted(official.keys() - ids), sorted(ids - official.keys())
        text = f"{len(missing)} of 2,000 images are missing" if missing else f"{len(other)} images are unknown"
        return [f"{RUN}: {text}, such as {(missing or other)[0]}"]
    problems = []
    why = why_not_ranked(run)
    if why is not None:
        problems.append(f"{RUN}: {why}")
    if code.get("dirty"):
        problems.append(f"{RUN}: the code had uncommitted changes")
    if any(row.pixels.min(initial=0) < 0 for row in run.rows):
        problems.append(f"{RUN}: negative counts")
    found = scores(run.matrix).as_dict()
    data = hashlib.sha256("".join(f"{row.image_id} {row.all_files}\n" for row in run.rows).encode()).hexdigest()
    environment = {key: manifest["environment"].get(key) for key in ("python", "cpu", "gpus", "cuda", "driver")}
    declared = {key: declaration["environment"][key] for key in environment}
    digests = {manifest["model"].get(key) for key in ("sha256", "head_sha256", "backbone_sha256")}
    for what, equal in (
        ("the score", declaration["results"][0]["fraction"] == found["mIoU"]),
        ("the interval", _same_interval(run, declaration["results"])),
        ("the ledger's hash", declaration["ledger_sha256"] == run.ledger_hash),
        ("the data's hash", declaration["data_sha256"] == data == manifest["dataset"]["content_hash"]),
        ("the commit", declaration["code"]["commit"] == code["commit"]),
        ("the seeds", declaration["seeds"] == manifest["seeds"]),
        ("the command", declaration["command"] == manifest["repeat"]),
        ("the environment", declared == environment),
        ("the packages", declaration["environment"]["packages"] == manifest["environment"]["distributions"]),
        ("the weights' hash", all(r["sha256"] in (None, *digests) for r in declaration["references"])),
    ):
        if not equal:
            problems.append(f"{DECLARATION}: {what} is not the run's")
    problems += [f"{RUN}: its command has {w!r}" for w in manifest["repeat"] if not is_safe_override(w)]
    return problems
