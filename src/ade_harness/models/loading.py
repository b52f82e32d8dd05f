"""One entry for every kind of network: configuration in, network with its facts out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ade_harness.config.kinds import Gives, kind_of
from ade_harness.config.model import BackboneSource, Dtype, ModelConfig, Weights
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.models.backbones.vit import Beit3Trunk
from ade_harness.models.checkpoint.family import Family, add_delta, random_network
from ade_harness.models.checkpoint.files import StateDict
from ade_harness.models.checkpoint.parts import Choice, Known, read_part
from ade_harness.models.checkpoint.sources import (
    backbone_checkpoint,
    choice_of,
    chosen_checkpoint,
    facts_of,
    head_facts,
    other_backbone,
    probed,
    require_timm,
)
from ade_harness.models.checkpoint.strict import Strictness, noting_left_over
from ade_harness.models.loaded import LoadedModel, anybodys_code, names_of, statistics
from ade_harness.models.registry import family_of, imported, named, systems
from ade_harness.runtime.lifetime import directory_kept

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_model(cfg: ModelConfig, threads: int = 1, classes: Classes | None = None) -> LoadedModel:
    """Build the network of ``cfg.model`` with its weights, on the CPU, in evaluation mode.

    Args:
        cfg: ``model`` node of the configuration.
        threads: of this process, for formats that have their own.
        classes: that a network is built for where its file does not say it; None are ADE20K's.

    Raises:
        HarnessError: anything that the user can fix: see the loaders; or the kind has no network.
    """
    kind = kind_of(cfg.kind)
    if kind.gives is Gives.labels:
        raise HarnessError(f"model={cfg.name}: gives label maps and has no network.")
    if cfg.dtype != Dtype.fp32 and kind.as_exported:
        raise HarnessError(
            f"model.dtype: a model of kind {cfg.kind} keeps the types of its file. Leave model.dtype out."
        )
    with directory_kept(), anybodys_code(kind.is_code, f"model._target_={cfg._target_}"):
        return _load(cfg, threads, classes or ade20k_classes())


def _load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    kind = kind_of(cfg.kind)
    is_system = kind.gives is Gives.family
    with torch.random.fork_rng(devices=[]), noting_left_over() as left:
        torch.manual_seed(cfg.seed)  # of layers that may be missing in the file
        model: LoadedModel = (
            _load_system(family_of(cfg.kind), cfg, classes) if is_system else imported(kind)(cfg, threads, classes)
        )
    random = _still_random(left.random, cfg)
    if random:
        model.facts["random_keys"] = random
    unused = [key for key in dict.fromkeys(left.unused) if any(fnmatchcase(key, p) for p in cfg.allow_unexpected_keys)]
    if unused:
        model.facts["unused_keys"] = unused
        named = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        model = replace(model, notes=(*model.notes, f"{len(unused)} weights of the file took no part ({named})"))
    model.module.eval()
    if cfg.dtype != Dtype.fp32 or not (kind.as_exported or kind.is_code):  # modules of the user's have their own types
        _convert(model.module, DTYPES[cfg.dtype])
    for parameter in model.module.parameters():  # ScriptModules have no requires_grad_ of their own
        parameter.requires_grad_(False)
    model.facts.setdefault("parameters", sum(p.numel() for p in model.module.parameters()))
    return model


def _still_random(missing: Sequence[str], cfg: ModelConfig) -> list[str]:
    """Return the keys that are missing because the user allowed it, each once."""
    return [
        key
        for key in dict.fromkeys(missing)
        if not key.endswith("num_batches_tracked") and any(fnmatchcase(key, p) for p in cfg.allow_missing_keys)
    ]


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert weights one after another: the peak is the converted model and one tensor, whatever the file's size.

    Files of halves or doubles too are what ``model.dtype`` says.
    """
    for part in module.modules():
        # running statistics need the precision, and autocast takes them as they are
        wanted = torch.float32 if isinstance(part, nn.modules.batchnorm._BatchNorm) else dtype
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != wanted:
                    tensor.data = tensor.data.to(wanted)


def _load_system(family: Family, cfg: ModelConfig, classes: Classes) -> LoadedModel:
    """Load a published system: of models/systems/."""
    if cfg.weights == Weights.random:
        module = random_network(family, cfg.architecture, cfg.seed, classes)
        facts = {"origin": f"random, seed {cfg.seed}"}
        return _system(cfg, module, "random", facts, classes)
    checkpoint = chosen_checkpoint(cfg)
    if checkpoint is None:
        raise HarnessError(
            f"model={cfg.name}: {cfg.missing or 'no public weights are known: give model.checkpoint=PATH.'}"
        )
    require_timm(cfg)
    known = _known(family, cfg, classes)
    trained = bool(probed(checkpoint.path))  # what the user chooses is then a part of the backbone's file
    part = read_part(checkpoint.path, Choice() if trained else choice_of(cfg), known)
    state, facts = part.state, facts_of(checkpoint, part)
    alone = _is_head_alone(family, state)
    notes: tuple[str, ...] = ()
    if alone or cfg.delta:
        why = (
            "the head alone" if alone else "differences from its backbone (a file of whole weights: model.delta=false)"
        )
        backbone = backbone_checkpoint(cfg, f"{checkpoint.origin}: this file holds {why}")
        below = read_part(backbone.path, choice_of(cfg) if trained else Choice(), known)
        state = {**below.state, **state} if alone else add_delta(family, state, below.state)
        facts |= {"backbone_origin": backbone.origin, "backbone_sha256": backbone.sha256}
        facts["sha256"] = hashlib.sha256(f"{checkpoint.sha256}{backbone.sha256}".encode()).hexdigest()
        facts["head_sha256"] = checkpoint.sha256
        facts |= {"backbone_part": str(below)} if str(below) else {}
        notes = other_backbone(checkpoint.path, backbone.sha256, below.place)
        facts |= {"other_backbone": notes[0]} if notes else {}
    keys = Strictness(
        facts["origin"], tuple(cfg.allow_missing_keys), tuple(cfg.allow_unexpected_keys), of_file=part.name_in_file,
        prefix=part.prefix,
    )  # fmt: skip
    if _is_backbone_alone(family, state, keys):
        raise HarnessError(f"{facts['origin']}: {_without_head(family, cfg)}")
    module = family.load(cfg.architecture, state, keys, classes, published=True)
    if isinstance(module, Beit3Trunk):
        raise HarnessError(
            f"{facts['origin']}: BEiT-3's encoder alone, without adapter and head. {cfg.missing or ''}"
            " An encoder goes with model.backbone_checkpoint=PATH, beside a head as model.checkpoint=PATH."
        )
    of_head = head_facts(checkpoint.path) if alone else {}
    loaded = _system(cfg, module, "pretrained", facts | of_head, classes)
    return replace(loaded, notes=(*loaded.notes, *notes), class_names=names_of(cfg, of_head.get("head_classes")))


def _known(family: Family, cfg: ModelConfig, classes: Classes) -> Known:
    """Return what counts the names of a state_dict that are the system's, by any code base or by its own module's.

    The module's own are asked for last: transformers has renamed parts of its networks since the hub's files were made,
    and a trainer writes today's names.
    """
    own: list[frozenset[str]] = []

    def known(state: StateDict) -> int:
        found = family.known(state)
        if 2 * found >= len(state):
            return found
        if not own:
            try:
                with torch.device("meta"):
                    names = list(family.load(cfg.architecture, None, Strictness(), classes).state_dict())
            except HarnessError:
                names = []
            inner = [name.partition(".")[2] for name in names]
            wraps = len({name.partition(".")[0] for name in names}) == 1
            own.append(frozenset(inner if wraps else names))  # a file has the names of what is wrapped
        return max(found, len(state.keys() & own[0]))

    return known


def _system(cfg: ModelConfig, module: nn.Module, weights: str, facts: dict[str, Any], classes: Classes) -> LoadedModel:
    size: Any = getattr(module, "fixed_size", None)
    of_timm = weights == "pretrained" and cfg.backbone.source == BackboneSource.timm and cfg.backbone_checkpoint is None
    notes = (
        (f"the backbone's weights, from timm's repository, are under the {cfg.backbone.license}",) if of_timm else ()
    )
    return LoadedModel(
        module, weights, **statistics(cfg), channels=len(classes), fixed_size=size, notes=notes, facts=facts
    )


def load_for_probe(cfg: ModelConfig, classes: Classes) -> LoadedModel:
    """Build a system with its backbone's public weights and a head that is still to be trained, for these classes.

    Raises:
        HarnessError: the model has no linear head, or there are no weights for its backbone.
    """
    kind = kind_of(cfg.kind)
    family = family_of(cfg.kind) if kind.gives is Gives.family else None
    if kind.probe is None and (family is None or not family.classifier.startswith("head.")):
        names = [name for name, kind in systems().items() if family_of(kind).classifier.startswith("head.")] + ["timm"]
        raise HarnessError(
            f"model={cfg.name}: has no linear head on a frozen backbone. Models to probe: {', '.join(names)}."
        )
    if cfg.weights != Weights.random:
        _check_probed(cfg)
    if kind.probe is not None:
        headless: LoadedModel = named(kind.probe)(cfg, classes)
        headless.module.eval()
        _convert(headless.module, DTYPES[cfg.dtype])
        return headless
    assert family is not None
    if cfg.weights == Weights.random:
        module = random_network(family, cfg.architecture, cfg.seed, classes).eval()
        return LoadedModel(module, "random", **statistics(cfg), facts={"origin": f"random, seed {cfg.seed}"})
    backbone = backbone_checkpoint(cfg, f"model={cfg.name}")
    keys = Strictness(backbone.origin, tuple(cfg.allow_missing_keys), tuple(cfg.allow_unexpected_keys), headless=True)
    part = read_part(backbone.path, choice_of(cfg), family.known)
    module = family.load(cfg.architecture, part.state, keys, classes, published=True).eval()
    _convert(module, DTYPES[cfg.dtype])
    return LoadedModel(module, "pretrained", **statistics(cfg), facts=facts_of(backbone, part))


def _check_probed(cfg: ModelConfig) -> None:
    if cfg.allow_missing_keys:
        raise HarnessError("model.allow_missing_keys: a probe needs a complete backbone. Leave it out.")
    if cfg.checkpoint is not None:
        raise HarnessError("model.checkpoint: probe makes it. The backbone's file is model.backbone_checkpoint=PATH.")


def _is_head_alone(family: Family, state: StateDict) -> bool:
    """Return whether a file holds a head and not the frozen backbone below it."""
    return bool(family.head) and all(k.startswith(family.head) for k in family.hub_names(state))


def _is_backbone_alone(family: Family, state: StateDict, keys: Strictness) -> bool:
    """Return whether a file holds nothing of the head, and nobody allowed that."""
    hub = family.hub_names(state)
    allowed = any(fnmatchcase(family.classifier, pattern) for pattern in keys.allow_missing)
    return family.classifier not in hub and not allowed and 2 * family.known(state) >= len(state) > 0


def _without_head(family: Family, cfg: ModelConfig) -> str:
    """Return what to do with the file of a backbone."""
    frozen = (
        "Give it as model.backbone_checkpoint=PATH, beside the head's file as model.checkpoint=PATH."
        if family.head
        else "Give the file of the whole system."
    )
    return f"a backbone alone, without a head ({family.classifier} is missing). {cfg.missing or frozen}"
