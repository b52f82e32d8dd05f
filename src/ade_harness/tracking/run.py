"""A run directory as one Weights & Biases run. The directory is the truth: a failure here loses nothing.

Online, the run is open while the evaluation works, in a process of its own (:mod:`ade_harness.tracking.live`). Where it
could not be opened, and with ``tracking.live=false``, everything is written offline at the end, into the run directory,
and a process with a time limit (:mod:`ade_harness.tracking.upload`) uploads it. So no server can slow an evaluation
down, and whatever a server does, what was logged is whole on disk and can be uploaded later.
"""

from __future__ import annotations

import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ade_harness.config.schema import TrackingConfig
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_json
from ade_harness.files.documents import read_json, read_yaml
from ade_harness.runs.directory import read_manifest
from ade_harness.runs.record import short_manifest
from ade_harness.runs.result import Result
from ade_harness.tracking.content import AddedContent, Content, CurveContent, FailedContent, FinishedContent
from ade_harness.tracking.live import LiveRun
from ade_harness.tracking.upload import Uploaded, limits, upload, wandb_mode
from ade_harness.tracking.wandb_run import Entry, open_run, staging

TRACKING = "tracking.json"
"""In the run directory: which W&B run it is."""


def begin_live(
    cfg: TrackingConfig, folder: Path, config: Mapping[str, Any], manifest: Mapping[str, Any],
    on_open: Callable[[str], None],
) -> LiveRun | None:  # fmt: skip
    """Open the W&B run of an evaluation or a training that begins; returns at once.

    Args:
        cfg: the ``tracking`` node.
        folder: the run directory.
        config: the resolved configuration.
        manifest: the run's record, without large texts.
        on_open: called in another thread with the run's address.

    Returns:
        The run, which :func:`log_result` or :func:`log_curve` ends; None where there is none: it is offline, disabled,
        or a score that is added to a training's run at the end.
    """
    if wandb_mode(cfg.mode) != "online" or not cfg.live or cfg.run_id is not None:
        return None
    entry = _entry(cfg, folder, _job_type(manifest), config, manifest, _mark_tags(manifest.get("marks", ())))
    return LiveRun(cfg, entry, run_id(folder), on_open)


def log_result(
    cfg: TrackingConfig, result: Result, config: dict[str, Any], manifest: dict[str, Any], live: LiveRun | None = None
) -> str | None:
    """Log a finished evaluation: scores, tables, confusion matrix, overlays, page, ledger, checkpoint and data set.

    Args:
        cfg: the ``tracking`` node.
        result: the finished run.
        config: the resolved configuration.
        manifest: the run's record, without large texts.
        live: of :func:`begin_live`.

    Returns:
        Where the run is (its address, or the folder to sync), or None if tracking failed or is disabled.
    """
    tags = (result.dataset, config["inference"]["name"], *_mark_tags(result.marks))
    entry = _entry(cfg, result.run_dir, "evaluate", config, manifest, tags)
    content = (
        FinishedContent(entry, result, manifest) if cfg.run_id is None else AddedContent(result, manifest, cfg.step)
    )
    return _track(cfg, entry, content, live)


def log_failure(cfg: TrackingConfig, folder: Path, why: str) -> str | None:
    """Log a run that ended without a score, as failed and with an alert.

    Args:
        cfg: the ``tracking`` node.
        folder: the run directory.
        why: the message that the user saw.

    Returns:
        As :func:`log_result`; None too for a score that was to be added to another run: that one has not failed.
    """
    if cfg.run_id is not None:
        return None
    try:
        manifest = read_manifest(folder)
        config = read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {}
    except HarnessError:
        return None  # the run directory itself is what failed
    manifest = short_manifest(manifest)
    tags = ("failed", *_mark_tags(manifest.get("marks", ())))
    entry = _entry(cfg, folder, _job_type(manifest), config, manifest, tags)
    return _track(cfg, entry, FailedContent(entry, why))


def log_curve(
    cfg: TrackingConfig, folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any],
    live: LiveRun | None = None,
) -> str | None:  # fmt: skip
    """Log a training as one W&B run; a failure loses nothing.

    Args:
        cfg: the ``tracking`` node.
        folder: of the run.
        rows: ``step`` and what was measured there.
        facts: for the run's configuration.
        live: of :func:`begin_live`.

    Returns:
        As :func:`log_result`.
    """
    entry = Entry(folder, "probe", cfg.group, tuple(cfg.tags), facts)
    return _track(cfg, entry, CurveContent(entry, tuple(rows)), live)


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


def _job_type(manifest: Mapping[str, Any]) -> str:
    return "probe" if manifest.get("kind") == "probe" else "evaluate"


def _mark_tags(marks: Sequence[str]) -> tuple[str, ...]:
    return tuple(mark.split(":")[0].lower() for mark in marks)


def _track(cfg: TrackingConfig, entry: Entry, content: Content, live: LiveRun | None = None) -> str | None:
    mode = wandb_mode(cfg.mode)
    if mode == "disabled":
        return None
    problem = None
    try:
        if mode == "online" and (cfg.live or cfg.run_id is not None):
            session = live or LiveRun(cfg, entry, run_id(entry.folder))
            ended = session.end(content, cfg.timeout_s, patient=cfg.run_id is not None)
            if ended.url is not None and not ended.problem:
                return _arrived(entry, ended.url)
            if cfg.run_id is not None:
                _warn(f"W&B: {ended.problem}. `resume {entry.folder}` tries it again; the run is whole.")
                return None
            problem = ended.problem if ended.url is not None else None
        # also of a live run that did not end: wandb writes its files every 15 seconds, so the rest is missing there
        offline = _write(cfg, entry, content)
    except Exception as error:  # whatever tracking does, the evaluation is done and on disk
        reason = " ".join(str(error).split())[:300]
        _warn(f"W&B logging failed ({type(error).__name__}: {reason}). The run is whole in {entry.folder}.")
        return None
    if mode == "offline":
        return str(offline)
    done = upload(offline, cfg.timeout_s) if problem is None else Uploaded(None, problem)
    if done.problem:
        _warn(f"W&B upload: {done.problem}. `wandb sync {offline}` does it later; the run is whole in {entry.folder}.")
    return _arrived(entry, done.url) if done.url is not None else str(offline)


def _arrived(entry: Entry, url: str) -> str:
    """Note where a run is; returns its address."""
    try:
        write_json(entry.folder / TRACKING, {"id": run_id(entry.folder), "url": url})
    except HarnessError as error:
        _warn(f"W&B: {error}")
    return url


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _write(cfg: TrackingConfig, entry: Entry, content: Content) -> Path:
    """Write the offline run, in place of an earlier one of this run directory; returns its folder."""
    root = entry.folder.resolve()
    identifier = run_id(root)
    earlier = list((root / "wandb").glob(f"offline-run-*-{identifier}"))
    with limits(), staging(root / "wandb"):
        run = open_run(cfg, entry, identifier)
        written = Path(run.dir).parent
        try:
            content.fill(run)
        except BaseException:
            run.finish(exit_code=1)
            shutil.rmtree(written, ignore_errors=True)
            raise
        run.finish(exit_code=content.exit_code)
    for folder in earlier:  # the new one holds all that this run directory has
        if folder != written:
            shutil.rmtree(folder, ignore_errors=True)
    return written
