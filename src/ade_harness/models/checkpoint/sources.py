"""Which weight file a configuration names: one of the user's own, or a public one."""

from __future__ import annotations

import json
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ade_harness.config.model import BackboneSource, CheckpointConfig, ModelConfig, Weights, WeightSource
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import cache_dir, file_hash
from ade_harness.files.reading import expanded, require_regular
from ade_harness.models.checkpoint.parts import Choice, Part
from ade_harness.models.checkpoint.public import Checkpoint, hub_checkpoint, local_checkpoint, url_checkpoint

OF_BACKBONE = "model.backbone_checkpoint"
"""The option by which a user gives a backbone's file."""


def chosen_checkpoint(cfg: ModelConfig) -> Checkpoint | None:
    """Return the weight file to load; None if there is none, or for random weights."""
    if cfg.weights == Weights.random:
        return None
    if cfg.checkpoint is not None:
        return local_checkpoint(cfg.checkpoint, cfg.checkpoint_sha256)
    return _public_file(cfg, cfg.official, cfg.hub)


def backbone_checkpoint(cfg: ModelConfig, why: str) -> Checkpoint:
    """Return the file of the frozen backbone below a head; `why` leads the message if there is none."""
    if cfg.backbone_checkpoint is not None:
        return local_checkpoint(cfg.backbone_checkpoint, cfg.backbone.sha256, OF_BACKBONE)
    if cfg.backbone.source == BackboneSource.timm:
        require_timm(cfg)
        assert cfg.backbone.timm is not None
        return hub_checkpoint(*timm_repository(cfg.backbone.timm), cfg.backbone.revision, None, OF_BACKBONE)
    found = _public_file(cfg, cfg.backbone, cfg.backbone, OF_BACKBONE)
    if found is None:
        raise HarnessError(f"{why}. Give the backbone's file as model.backbone_checkpoint=PATH.")
    return found


def require_timm(cfg: ModelConfig) -> None:
    """Raise HarnessError if a system's backbone is to come from timm, and timm has none such."""
    if cfg.backbone.source == BackboneSource.timm and cfg.backbone.timm is None:
        raise HarnessError(f"model.backbone.source=timm: timm has no such backbone for model={cfg.name}. Leave it out.")


def timm_repository(name: str) -> tuple[str, str]:
    """Return the hub's id and file of a timm model's weights.

    Args:
        name: with its tag, such as ``vit_large_patch14_dinov2.lvd142m``.

    Raises:
        HarnessError: timm does not know it, or knows no weights for it.
    """
    from timm.models import get_pretrained_cfg, list_pretrained

    try:
        known = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:  # no such architecture, or no such tag of it
        close = get_close_matches(name, list_pretrained(), 5)
        raise HarnessError(
            f"model.backbone={name}: timm knows no such backbone ({str(error).rstrip('.')})."
            f"{' Did you mean ' + ', '.join(close) + '?' if close else ''} timm.list_pretrained() lists them."
        ) from error
    if known is None or not known.hf_hub_id:
        raise HarnessError(
            f"{name}: timm knows no public weights of this name. Give a file as model.backbone_checkpoint=PATH."
        )
    return known.hf_hub_id, known.hf_hub_filename or "model.safetensors"


def _public_file(
    cfg: ModelConfig, official: CheckpointConfig, hub: CheckpointConfig, key: str = "model.checkpoint"
) -> Checkpoint | None:
    """Fetch one of a model's public files, if it has one; the user can give it as `key`."""
    if official.url is not None and cfg.source != WeightSource.hub:
        return url_checkpoint(official.url, cache_dir() / "checkpoints", official.sha256, key=key)
    if hub.hub_id is not None and cfg.source != WeightSource.official:
        return hub_checkpoint(hub.hub_id, hub.filename or "", hub.revision, hub.sha256, key)
    if cfg.source is not None and (official.url or hub.hub_id):
        raise HarnessError(f"model.source={cfg.source}: {cfg.name} has no such file. Leave model.source out.")
    return None


def choice_of(cfg: ModelConfig) -> Choice:
    """Return what the configuration says about the parts of a weight file."""
    return Choice(cfg.checkpoint_prefix, cfg.checkpoint_weights)


def facts_of(checkpoint: Checkpoint, part: Part | None = None) -> dict[str, Any]:
    """Return what the manifest keeps of a weight file, and of the part of it that was taken."""
    taken, place = (str(part), part.place) if part is not None else ("", "")
    found = {"origin": checkpoint.origin, "sha256": checkpoint.sha256, **({"part": taken} if taken else {})}
    return found | ({"part_place": place} if place else {})


def probed(head: Path) -> dict[str, Any]:
    """Return what `probe` has written into the file of a head; empty for a file of others."""
    try:
        with safe_open(head, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("probe", "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}  # of another format
    return about if isinstance(about, dict) else {}


def head_facts(head: Path) -> dict[str, Any]:
    """Return what a run has to know of a head that `probe` wrote: its classes, and whether it knows synthetic images.

    Args:
        head: its file.
    """
    about = probed(head)
    names = about.get("classes")
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return {**({"head_classes": names} if known else {}), **({"head_demo": True} if about.get("demo") is True else {})}


def other_backbone(head: Path, sha256: str | None, part: str = "") -> tuple[str, ...]:
    """Return a note if a head that `probe` wrote was trained above other weights of the backbone than it is now.

    Args:
        head: its file.
        sha256: of the backbone's file.
        part: which of its weights were taken: its place in the file.
    """
    about = probed(head)
    trained, of_file = about.get("backbone_sha256"), about.get("backbone_part")
    if trained not in (None, sha256):
        return (
            f"{head.name} was trained above another file of the backbone (sha256 {str(trained)[:12]}..., here"
            f" {str(sha256)[:12]}...): unless both hold the same weights, the score is meaningless",
        )
    if of_file is not None and trained == sha256 and of_file != part:
        return (
            f"{head.name} was trained above other weights of the backbone's file ({of_file or 'all of it'}; here"
            f" {part or 'all of it'}): the score is meaningless. model.checkpoint_weights and model.checkpoint_prefix"
            " choose them",
        )
    return ()


def model_file(cfg: ModelConfig) -> Path:
    """Return ``model.path``; raises HarnessError if it is not there, or not the file of ``checkpoint_sha256``."""
    path = expanded(cfg.path or "")
    require_regular(path, f"model.path={cfg.path}")
    digest = cfg.checkpoint_sha256
    if digest is not None and file_hash(path, "sha256") != digest.lower():
        raise HarnessError(
            f"{path}: the sha256 is {file_hash(path, 'sha256')}, model.checkpoint_sha256 expects {digest}."
        )
    return path


def not_that(path: Path, what: str, error: Exception, advice: str) -> HarnessError:
    """Return the error of a ``model.path`` that torch cannot read.

    Args:
        path: of the file.
        what: was expected, such as "a TorchScript file".
        error: of torch's reader, which fails in any way.
        advice: which other file is meant, such as "A state_dict goes"; how it is given follows.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return HarnessError(
        f"{path}: not {what} ({reason}). {advice} with model=custom or a named model, as model.checkpoint=PATH."
    )
