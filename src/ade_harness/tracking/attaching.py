"""Log a score into the W&B run of a training: beside the checkpoint's losses, at its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ade_harness.config.schema import TrackingConfig, TrackingKind
from ade_harness.errors import HarnessError, require
from ade_harness.tracking.upload import limits, user_settings, wandb_mode
from ade_harness.tracking.wandb_run import PROJECT

_TIMEOUT_S = 15


class NoSuchRunError(HarnessError):
    """W&B knows no run of this id, or does not show it to this user."""


def require_attachable(cfg: TrackingConfig, ask: bool = True) -> None:
    """Refuse to begin an evaluation whose score is to be added to another run, if it is known that it cannot be.

    A run that is still running may have ended by then, and a server that does not answer may be back.

    Args:
        cfg: the ``tracking`` node.
        ask: also the server; one process of a run is enough.

    Raises:
        HarnessError: W&B is not online.
        NoSuchRunError: there is no such run.
    """
    if cfg.kind != TrackingKind.wandb or cfg.run_id is None:
        return
    mode = wandb_mode(cfg.mode)
    require(
        mode == "online",
        f"tracking.run_id={cfg.run_id}: a score can be added to a run only online, and W&B is {mode}. Set"
        " WANDB_API_KEY or run `wandb login`, or leave tracking.run_id out.",
    )
    if not ask:
        return
    try:
        with limits():
            _state(cfg)
    except NoSuchRunError:
        raise
    except Exception:  # of any kind: it is reported at the end, when the score is there
        return


def attached_run(cfg: TrackingConfig, folder: Path) -> Any:
    """Open a run that is there and has ended, to add to it.

    Its state stays what it was. Its configuration, tags and name are read first and kept.

    Args:
        cfg: the ``tracking`` node, with `run_id`.
        folder: of the evaluation, for W&B's files.

    Raises:
        HarnessError: there is no such run, or it is still running: its own process counts the lines of its history, and
            what another process adds would be overwritten.
        Exception: whatever wandb raises.
    """
    import wandb

    if _state(cfg) == "running":
        raise HarnessError(
            f"tracking.run_id={cfg.run_id}: that run is still running, and its process would overwrite what is added."
            " Log it once it has ended, or evaluate inside of the training (docs/python.md)"
        )
    entity, project = _place(cfg)
    return wandb.init(
        project=project,
        entity=entity,
        id=cfg.run_id,
        dir=str(folder.resolve()),
        mode="online",
        resume="must",
        reinit="create_new",
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, disable_job_creation=True,
            x_disable_stats=True, x_update_finish_state=False, init_timeout=30.0,
        ),
    )  # fmt: skip


def _place(cfg: TrackingConfig) -> tuple[str | None, str]:
    """Return entity and project."""
    mine = user_settings()
    return cfg.entity or mine.entity, cfg.project or mine.project or PROJECT


def _state(cfg: TrackingConfig) -> str:
    """Return the state of the run that a score is to be added to."""
    import wandb
    from wandb.errors import CommError

    path = "/".join(part for part in (*_place(cfg), cfg.run_id) if part)
    try:
        return str(wandb.Api(timeout=_TIMEOUT_S).run(path).state)
    except (CommError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        if "ould not find" not in reason:  # a server that is away, a key that is refused, a WANDB_BASE_URL that is none
            raise HarnessError(f"tracking.run_id={cfg.run_id}: W&B gave no information on {path} ({reason})") from error
        raise NoSuchRunError(
            f"tracking.run_id={cfg.run_id}: W&B has no run {path} ({reason}). Give the last part of its page's address,"
            " and tracking.project and tracking.entity as that address has them"
        ) from error
