"""Log a score into the W&B run of a training: beside the checkpoint's losses, at its step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ade_harness.config.schema import TrackingConfig
from ade_harness.errors import HarnessError
from ade_harness.tracking.opening import PROJECT
from ade_harness.tracking.upload import user_settings

_TIMEOUT_S = 15


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
    from wandb.errors import CommError

    mine = user_settings()
    project, entity = cfg.project or mine.project or PROJECT, cfg.entity or mine.entity
    path = "/".join(part for part in (entity, project, cfg.run_id) if part)
    try:
        state = wandb.Api(timeout=_TIMEOUT_S).run(path).state
    except (CommError, ValueError) as error:
        raise HarnessError(
            f"tracking.run_id={cfg.run_id}: W&B has no run {path} ({' '.join(str(error).split())[:200]}). Give the"
            " last part of its page's address, and tracking.project and tracking.entity as that address has them"
        ) from error
    if state == "running":
        raise HarnessError(
            f"tracking.run_id={cfg.run_id}: that run is still running, and its process would overwrite what is added."
            " Log it once it has ended, or evaluate inside of the training (docs/python.md)"
        )
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
