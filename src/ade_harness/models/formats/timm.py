"""A frozen timm backbone with a linear head: ``model=timm model.backbone=NAME``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ade_harness.config.model import ModelConfig, Weights
from ade_harness.data.labels import Classes
from ade_harness.errors import require
from ade_harness.models.backbones.timm import TimmFeatures, build_timm, known_names, pretrained_cfg, statistics_of
from ade_harness.models.checkpoint.parts import read_part
from ade_harness.models.checkpoint.public import Checkpoint, hub_checkpoint, local_checkpoint
from ade_harness.models.checkpoint.sources import (
    OF_BACKBONE,
    choice_of,
    facts_of,
    head_facts,
    other_backbone,
    timm_repository,
)
from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.heads.linear import LinearSegmenter
from ade_harness.models.loaded import LoadedModel, names_of

_HEAD = "head."


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load a head that ``probe model=timm`` trained, above its backbone's weights.

    Raises:
        HarnessError: no backbone or no head is named, timm does not know the backbone, or weights do not fit.
    """
    name = _name(cfg)
    if cfg.weights == Weights.random:
        return _loaded(
            cfg, name, _segmenter(cfg, name, None, classes), "random", {"origin": f"random, seed {cfg.seed}"}
        )
    require(
        cfg.checkpoint is not None,
        f"model=timm: has a linear head, which is trained first: `python -m ade_harness probe model=timm"
        f" model.backbone={name} dataset.root=PATH`. Give its file as"
        " model.checkpoint=PATH.",
    )
    checkpoint = local_checkpoint(cfg.checkpoint or "", cfg.checkpoint_sha256)
    part = read_part(checkpoint.path)  # as probe writes it; what the user chooses is a part of the backbone's file
    head = {key.removeprefix(_HEAD): value for key, value in part.state.items() if key.startswith(_HEAD)}
    require(
        len(head) == len(part.state),
        f"{checkpoint.origin}: expected a linear head alone (head.norm.*, head.classifier.*), as probe writes it; it"
        f" has {', '.join(sorted(k for k in part.state if not k.startswith(_HEAD))[:3])}.",
    )
    below = _backbone_file(cfg, name)
    of_backbone = read_part(below.path, choice_of(cfg), known_names(name))
    network = _segmenter(cfg, name, of_backbone.state, classes)
    keys = Strictness(checkpoint.origin, tuple(cfg.allow_missing_keys), tuple(cfg.allow_unexpected_keys))
    load_strictly(network.head, head, keys)
    facts = facts_of(checkpoint, part) | {"backbone_origin": below.origin, "backbone_sha256": below.sha256}
    if str(of_backbone):
        facts["backbone_part"] = str(of_backbone)
    facts["sha256"] = hashlib.sha256(f"{checkpoint.sha256}{below.sha256}".encode()).hexdigest()
    facts["head_sha256"] = checkpoint.sha256
    notes = other_backbone(checkpoint.path, below.sha256, of_backbone.place)
    facts |= {"other_backbone": notes[0]} if notes else {}
    of_head = head_facts(checkpoint.path)
    loaded = _loaded(cfg, name, network, "pretrained", facts | of_head)
    names = names_of(cfg, of_head.get("head_classes"))
    return replace(loaded, notes=(*loaded.notes, *notes), class_names=names or loaded.class_names)


def load_headless(cfg: ModelConfig, classes: Classes) -> LoadedModel:
    """Load a backbone with a head that is still to be trained; raises as :func:`load`."""
    name = _name(cfg)
    if cfg.weights == Weights.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            network = _segmenter(cfg, name, None, classes)
        return _loaded(cfg, name, network, "random", {"origin": f"random, seed {cfg.seed}"})
    below = _backbone_file(cfg, name)
    part = read_part(below.path, choice_of(cfg), known_names(name))
    return _loaded(cfg, name, _segmenter(cfg, name, part.state, classes), "pretrained", facts_of(below, part))


def _sections(cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``architecture.backbone`` and ``.head``, checked."""
    found = []
    for section, known in (("backbone", ("name", "img_size")), ("head", ("maps",))):
        given = cfg.architecture.get(section, {})
        where = f"model.architecture.{section}"
        require(isinstance(given, dict), f"{where}={given}: expected fields: {where}.{known[0]}=...")
        unknown = sorted(set(given) - set(known))
        require(not unknown, f"{where}: no such field: {unknown}. Known: {', '.join(known)}.")
        for field in ("img_size", "maps"):
            value = given.get(field)
            number = isinstance(value, int) and not isinstance(value, bool) and value > 0
            require(value is None or number, f"{where}.{field}={value}: expected a whole number from 1 up.")
        found.append(given)
    return found[0], found[1]


def _name(cfg: ModelConfig) -> str:
    name = _sections(cfg)[0].get("name")
    require(
        isinstance(name, str) and bool(name),
        "model=timm: name the backbone: model.backbone=NAME, such as vit_large_patch14_dinov2.lvd142m.",
    )
    return str(name)


def _segmenter(cfg: ModelConfig, name: str, state: Mapping[str, Tensor] | None, classes: Classes) -> LinearSegmenter:
    backbone, head = _sections(cfg)
    if state is not None:
        width = next((v for k, v in state.items() if k.startswith("head.norm.")), None)
        require(width is None, f"model.backbone_checkpoint: holds a head of ours (head.norm.*), not {name}.")
    features = build_timm(name, state, head.get("maps"), backbone.get("img_size"))
    return LinearSegmenter(features, pad=True, classes=len(classes))


def _backbone_file(cfg: ModelConfig, name: str) -> Checkpoint:
    """Return the backbone's weights: the user's file, or timm's on the hub."""
    if cfg.backbone_checkpoint is not None:
        return local_checkpoint(cfg.backbone_checkpoint, cfg.backbone.sha256, OF_BACKBONE)
    return hub_checkpoint(*timm_repository(name), cfg.backbone.revision, cfg.backbone.sha256, OF_BACKBONE)


def _loaded(cfg: ModelConfig, name: str, network: LinearSegmenter, weights: str, facts: dict[str, Any]) -> LoadedModel:
    backbone = network.backbone
    assert isinstance(backbone, TimmFeatures)
    mean, std = statistics_of(name)
    known = pretrained_cfg(name)
    notes: tuple[str, ...] = ()
    if known is not None and known.license and weights != "random" and cfg.backbone_checkpoint is None:
        facts = {**facts, "backbone_license": known.license}
        notes = (f"the backbone's weights are under the licence {known.license}",)
    fixed = None if backbone.side is None else (backbone.side, backbone.side)
    return LoadedModel(
        network,
        weights,
        tuple(mean),
        tuple(std),
        channels=network.head.classifier.out_channels,
        fixed_size=fixed,
        notes=notes,
        facts=facts,
    )
