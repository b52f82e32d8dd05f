"""Copy a finished run to Weights & Biases. The run directory is the truth: a failure here loses nothing."""

from __future__ import annotations

import json
import netrc
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ade_harness.report.figures import save_confusion_matrix
from ade_harness.report.result import Result, per_class_rows

_INIT_TIMEOUT_S = 30


def wandb_mode(configured: str | None) -> str:
    """Return online, offline or disabled: as configured, by WANDB_MODE, else online only if a key is set."""
    if configured is not None:
        return configured
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    return "online" if os.environ.get("WANDB_API_KEY") or _key_in_netrc() else "offline"


def _key_in_netrc() -> bool:
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return any("wandb" in host for host in netrc.netrc(path).hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def log_result(cfg: DictConfig, result: Result, config: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    """Log summary, per-class table, confusion matrix and overlays as one W&B run.

    Args:
        cfg: the ``tracking`` node.
        result: the finished run.
        config: the resolved configuration.
        manifest: the run's record, without large texts.

    Returns:
        Where the run is (URL, or the folder to sync), or None if tracking failed or is disabled.
    """
    mode = wandb_mode(cfg.mode)
    if mode == "disabled":
        return None
    for attempt in dict.fromkeys((mode, "offline")):  # a server that is down still leaves a run to sync later
        try:
            return _log(cfg, attempt, result, config, manifest)
        except Exception as error:  # whatever tracking does, the evaluation is done and on disk
            reason = str(error).splitlines()[0] if str(error) else ""
            warnings.warn(
                f"W&B {attempt} logging failed ({type(error).__name__}: {reason})."
                f" The run is whole in {result.run_dir}.",
                stacklevel=2,
            )
    return None


def log_curve(cfg: DictConfig, folder: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str | None:
    """Log a training as one W&B run; a failure loses nothing.

    Args:
        cfg: the ``tracking`` node.
        folder: of the run.
        rows: ``step`` and what was measured there.
        facts: for the run's configuration.

    Returns:
        Where the run is, or None.
    """
    mode = wandb_mode(cfg.mode)
    if mode == "disabled":
        return None
    try:
        import wandb

        run = wandb.init(
            project=cfg.project, entity=cfg.entity, group=cfg.group, job_type="probe", name=folder.name,
            tags=[*cfg.tags], config=dict(facts), dir=str(folder.resolve()), mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_TIMEOUT_S),
        )  # fmt: skip
        try:
            for row in rows:
                run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
            return run.url if mode == "online" else str(Path(run.dir).parent)
        finally:
            run.finish()
    except Exception as error:  # the head is on disk
        warnings.warn(
            f"W&B logging failed ({type(error).__name__}: {error}). The run is whole in {folder}.", stacklevel=2
        )
        return None


def _log(cfg: DictConfig, mode: Any, result: Result, config: dict[str, Any], manifest: dict[str, Any]) -> str | None:
    import wandb

    figure = result.run_dir / "confusion_matrix.png"
    title = " - ".join([f"{result.label} on {result.dataset}", *result.marks])
    save_confusion_matrix(figure, result.matrix, title)
    run = wandb.init(
        project=cfg.project,
        entity=cfg.entity,
        group=cfg.group or config["model"]["name"],
        job_type="evaluate",
        name=result.run_dir.name,
        tags=[*cfg.tags, result.dataset, *(m.split(":")[0].lower() for m in result.marks)],
        config={**config, "provenance": manifest},
        dir=str(result.run_dir.resolve()),  # its service process may have another working directory
        mode=mode,
        settings=wandb.Settings(silent=True, console="off", init_timeout=_INIT_TIMEOUT_S),
    )
    try:
        for key, value in result.metrics().items():
            run.summary[key] = json.dumps(value) if isinstance(value, list) else value
        run.summary["seconds"] = result.seconds
        rows = per_class_rows(result.matrix)
        table = wandb.Table(columns=list(rows[0]), data=[list(r.values()) for r in rows])
        pictures = sorted((result.run_dir / "overlays").glob("*.png"))
        run.log(
            {
                "per_class": table,
                "confusion_matrix": wandb.Image(str(figure)),
                **{f"overlays/{p.stem}": wandb.Image(str(p), caption=p.stem) for p in pictures},
            }
        )
        path = run.url if mode == "online" else str(Path(run.dir).parent)
    finally:
        run.finish()
    return path
