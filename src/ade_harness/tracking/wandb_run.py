"""Open a Weights & Biases run of a run directory."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ade_harness.config.schema import TrackingConfig
from ade_harness.tracking.upload import user_settings

PROJECT = "ade20k"
"""Unless the configuration, WANDB_PROJECT or a settings file of W&B names another."""
_TAG_LENGTH = 64
_QUIET = {"silent": True, "disable_git": True, "disable_code": True, "disable_job_creation": True}


@dataclass(frozen=True)
class Entry:
    """How a run is found among others."""

    folder: Path
    job_type: str
    group: str | None
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    """Nested: W&B shows and filters it as dotted keys, and asks for keys without dots of their own."""


def open_run(cfg: TrackingConfig, entry: Entry, identifier: str, watched: int | None = None) -> Any:
    """Open a W&B run, in place of one of this identifier.

    Args:
        cfg: the ``tracking`` node.
        entry: how it is found; its folder holds W&B's files.
        identifier: of the run.
        watched: the process whose use of the machine is shown, with what it prints: the run is online, and goes on
            where an earlier session of it has ended. None: the run is offline.

    Raises:
        Exception: whatever wandb raises: of a server that cannot be reached, or does not take the key.
    """
    import wandb

    root = entry.folder.resolve()  # wandb's service process may have another working directory
    mine = user_settings()
    live = {"console": "wrap", "x_stats_pid": watched, "x_stats_track_process_tree": True, "init_timeout": 30.0}
    settings = live if watched is not None else {"console": "off", "x_disable_stats": True}
    return wandb.init(
        project=cfg.project or mine.project or PROJECT,
        entity=cfg.entity or mine.entity,
        id=identifier,
        group=cfg.group or mine.group or entry.group,
        job_type=entry.job_type,
        name=mine.name or root.name,
        notes=mine.notes,
        tags=tags_of(entry),
        config=dict(entry.config),
        dir=str(root),
        mode="offline" if watched is None else "online",
        resume=None if watched is None else "allow",
        reinit="create_new",  # a run that the caller may have open is not ours
        settings=wandb.Settings(**_QUIET, **settings),
    )


def tags_of(entry: Entry) -> list[str]:
    """Return the tags of a run, and those that the user's environment gives every run."""
    return [tag[:_TAG_LENGTH] for tag in dict.fromkeys((*entry.tags, *user_settings().tags)) if tag]


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Keep artifacts' files beside the run: wandb's own place is in the home of this machine's user.

    Args:
        folder: ``wandb`` in the run directory.

    Yields:
        Where they are. What earlier runs have left there goes when this one is whole.
    """
    data = folder / f"data-{uuid.uuid4().hex[:6]}"
    before, earlier = os.environ.get("WANDB_DATA_DIR"), list(folder.glob("data-*"))
    data.mkdir(parents=True)
    os.environ["WANDB_DATA_DIR"] = str(data)
    try:
        yield data
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
