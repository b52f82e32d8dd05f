"""A run directory as one Weights & Biases run. The directory is the truth: a failure here loses nothing.

Everything is first written offline, into the run directory, which needs no network; a process of its own with a time
limit (:mod:`ade_harness.tracking.upload`) then uploads it if W&B is online. So no server can slow an evaluation
down, and whatever a server does, the offline run is whole and can be uploaded later.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ade_harness.config.schema import TrackingConfig
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_json
from ade_harness.files.documents import read_json, read_yaml
from ade_harness.runs.directory import read_manifest
from ade_harness.runs.record import short_manifest
from ade_harness.runs.result import Result
from ade_harness.tracking.content import log_content
from ade_harness.tracking.upload import limits, upload, user_settings, wandb_mode

TRACKING = "tracking.json"
"""In the run directory: which W&B run it is."""
PROJECT = "ade20k"
"""Unless the configuration, WANDB_PROJECT or a settings file of W&B names another."""
_TAG_LENGTH = 64
_TITLE_LENGTH = 63


@dataclass(frozen=True)
class Entry:
    """How a run is found among others."""

    folder: Path
    job_type: str
    group: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """Nested: W&B shows and filters it as dotted keys, and asks for keys without dots of their own."""


def log_result(cfg: TrackingConfig, result: Result, config: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    """Log a finished evaluation: scores, tables, confusion matrix, overlays, page, ledger, checkpoint and data set.

    Args:
        cfg: the ``tracking`` node.
        result: the finished run.
        config: the resolved configuration.
        manifest: the run's record, without large texts.

    Returns:
        Where the run is (its address, or the folder to sync), or None if tracking failed or is disabled.
    """
    tags = (result.dataset, config["inference"]["name"], *_mark_tags(result.marks))
    entry = _entry(cfg, result.run_dir, "evaluate", config, manifest, tags)
    return _track(cfg, entry, lambda run: log_content(run, result, config, manifest))


def log_failure(cfg: TrackingConfig, folder: Path, why: str) -> str | None:
    """Log a run that ended without a score, as failed and with an alert.

    Args:
        cfg: the ``tracking`` node.
        folder: the run directory.
        why: the message that the user saw.

    Returns:
        As :func:`log_result`.
    """
    try:
        manifest = read_manifest(folder)
        config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    except HarnessError:
        return None  # the run directory itself is what failed
    manifest = short_manifest(manifest)
    job_type = "probe" if manifest.get("kind") == "probe" else "evaluate"
    tags = ("failed", *_mark_tags(manifest.get("marks", ())))

    def fill(run: Any) -> None:
        run.summary.update({"status": "failed", "reason": why})
        text = f"{why}\n\nWhat was counted is kept in {folder.resolve()}."
        run.alert(f"{folder.name} failed"[:_TITLE_LENGTH], text, level="ERROR")

    return _track(cfg, _entry(cfg, folder, job_type, config, manifest, tags), fill, exit_code=1)


def log_curve(
    cfg: TrackingConfig, folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]
) -> str | None:
    """Log a training as one W&B run; a failure loses nothing.

    Args:
        cfg: the ``tracking`` node.
        folder: of the run.
        rows: ``step`` and what was measured there.
        facts: for the run's configuration.

    Returns:
        As :func:`log_result`.
    """

    def fill(run: Any) -> None:
        for row in rows:
            run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        run.summary["status"] = "finished"

    return _track(cfg, Entry(folder, "probe", cfg.group, tuple(cfg.tags), facts), fill)


def run_id(folder: Path) -> str:
    """Return the W&B run id of a run directory: made once, so that every session of a run is one W&B run.

    Raises:
        HarnessError: it cannot be written.
    """
    known = read_tracking(folder).get("id")
    if isinstance(known, str) and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        return known
    made = uuid.uuid4().hex[:12]
    write_json(folder / TRACKING, {"id": made})
    return made


def read_tracking(folder: Path) -> dict[str, Any]:
    """Return the content of tracking.json: ``id``, and once it was uploaded ``url``; empty if there is none."""
    try:
        content: dict[str, Any] = read_json(folder / TRACKING, {"id?": str, "url?": str})
    except HarnessError:
        return {}
    return content


def _entry(
    cfg: TrackingConfig,
    folder: Path,
    job_type: str,
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    tags: Sequence[str],
) -> Entry:
    group = config.get("model", {}).get("name") or manifest.get("model", {}).get("name")
    return Entry(folder, job_type, group, (*cfg.tags, *tags), {**config, "provenance": dict(manifest)})


def _mark_tags(marks: Sequence[str]) -> tuple[str, ...]:
    return tuple(mark.split(":")[0].lower() for mark in marks)


def _track(cfg: TrackingConfig, entry: Entry, fill: Callable[[Any], None], exit_code: int = 0) -> str | None:
    mode = wandb_mode(cfg.mode)
    if mode == "disabled":
        return None
    try:
        offline = _write(cfg, entry, fill, exit_code)
    except Exception as error:  # whatever tracking does, the evaluation is done and on disk
        reason = str(error).splitlines()[0] if str(error) else ""
        _warn(f"W&B logging failed ({type(error).__name__}: {reason}). The run is whole in {entry.folder}.")
        return None
    if mode == "offline":
        return str(offline)
    done = upload(offline, cfg.timeout_s)
    if done.problem:
        _warn(f"W&B upload: {done.problem}. `wandb sync {offline}` does it later; the run is whole in {entry.folder}.")
    if done.url is None:
        return str(offline)
    try:
        write_json(entry.folder / TRACKING, {"id": run_id(entry.folder), "url": done.url})
    except HarnessError as error:
        _warn(f"W&B: {error}")
    return done.url


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _write(cfg: TrackingConfig, entry: Entry, fill: Callable[[Any], None], exit_code: int) -> Path:
    """Write the offline run, in place of an earlier one of this run directory; returns its folder."""
    import wandb

    root = entry.folder.resolve()  # wandb's service process may have another working directory
    mine = user_settings()
    identifier = run_id(root)
    earlier = list((root / "wandb").glob(f"offline-run-*-{identifier}"))
    with limits(), _staging(root / "wandb"):
        run = wandb.init(
            project=cfg.project or mine.project or PROJECT,
            entity=cfg.entity or mine.entity,
            id=identifier,
            group=cfg.group or mine.group or entry.group,
            job_type=entry.job_type,
            name=mine.name or root.name,
            notes=mine.notes,
            tags=[tag[:_TAG_LENGTH] for tag in dict.fromkeys((*entry.tags, *mine.tags)) if tag],
            config=dict(entry.config),
            dir=str(root),
            mode="offline",
            reinit="create_new",  # a run that the caller may have open is not ours
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, disable_job_creation=True,
                x_disable_stats=True,
            ),
        )  # fmt: skip
        written = Path(run.dir).parent
        try:
            fill(run)
        except BaseException:
            run.finish(exit_code=1)
            shutil.rmtree(written, ignore_errors=True)
            raise
        run.finish(exit_code=exit_code)
    for folder in earlier:  # the new one holds all that this run directory has
        if folder != written:
            shutil.rmtree(folder, ignore_errors=True)
    return written


@contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """Keep artifacts' files beside the offline run: wandb's own place is in the home of this machine's user."""
    data = folder / f"data-{uuid.uuid4().hex[:6]}"
    before, earlier = os.environ.get("WANDB_DATA_DIR"), list(folder.glob("data-*"))
    data.mkdir(parents=True)
    os.environ["WANDB_DATA_DIR"] = str(data)
    try:
        yield
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        raise
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
        else:
            os.environ["WANDB_DATA_DIR"] = before
    for old in earlier:
        shutil.rmtree(old, ignore_errors=True)
