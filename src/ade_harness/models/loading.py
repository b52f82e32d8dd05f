"""One entry for every kind of model: configuration in, network with its facts out."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from torch import nn

from ade_harness.config.model import CheckpointConfig, ModelConfig
from ade_harness.data.labels import NUM_CLASSES
from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.files.fetch import cache_dir, file_hash
from ade_harness.models.backbones.vit import Beit3Trunk
from ade_harness.models.checkpoint.family import Family, Keys, add_delta, quietly_random
from ade_harness.models.checkpoint.files import (
    Checkpoint,
    StateDict,
    hub_checkpoint,
    load_strictly,
    local_checkpoint,
    read_state_dict,
    url_checkpoint,
)
from ade_harness.models.formats.demo import load_demo_network
from ade_harness.models.formats.onnx import OnnxModel
from ade_harness.models.formats.transformers import load_transformers
from ade_harness.models.registry import FAMILIES, SYSTEMS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A network, ready to be called, and what is known about it."""

    module: nn.Module
    """Normalised images float32 [N, 3, H, W] to scores [N, C, h, w], or to mask classification (models/outputs.py)."""
    weights: str
    """pretrained, random, demo, or constructed (a custom model without a checkpoint)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: list[str] | None = None
    channels: int | None = None
    """Of the scores, if it is known before the first image."""
    fixed_size: tuple[int, int] | None = None
    """(height, width) of the only input it takes."""
    fixed_batch: int | None = None
    """Images per call if it takes no other number."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest: origin and sha256 of the weights, parameters."""


def load_model(cfg: ModelConfig, threads: int = 1) -> LoadedModel:
    """Build the network of ``cfg.model`` with its weights, on the CPU, in evaluation mode.

    Raises:
        HarnessError: anything that the user can fix: see the loaders.
    """
    loader = LOADERS.get(cfg.kind)
    if loader is None:
        raise HarnessError(
            f"model.kind={cfg.kind}: unknown.{did_you_mean(cfg.kind, LOADERS)} Known: {', '.join(LOADERS)}."
        )
    model = loader(cfg, threads)
    model.module.eval()
    if cfg.dtype != "fp32":
        _convert(model.module, DTYPES[cfg.dtype], cfg.kind)
    for parameter in model.module.parameters():  # ScriptModules have no requires_grad_ of their own
        parameter.requires_grad_(False)
    model.facts.setdefault("parameters", sum(p.numel() for p in model.module.parameters()))
    return model


def _convert(module: nn.Module, dtype: torch.dtype, kind: str) -> None:
    """Convert weights one after another: the peak is the converted model and one tensor, whatever the file's size."""
    if kind in ("onnx", "torchscript"):
        raise HarnessError(f"model.dtype: a model of kind {kind} keeps the types of its file. Leave model.dtype out.")
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            continue  # its running statistics need the precision, and autocast takes them as they are
        for tensors in (part._parameters, part._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.to(dtype)


def _statistics(cfg: ModelConfig) -> dict[str, Any]:
    return {"mean": tuple(cfg.input.mean), "std": tuple(cfg.input.std)}


def _names(cfg: ModelConfig, carried: list[str] | None = None) -> list[str] | None:
    return list(cfg.class_names) if cfg.class_names is not None else carried


def _checkpoint(cfg: ModelConfig) -> Checkpoint | None:
    """Return the weight file to load; None if there is none, or for random weights."""
    if cfg.weights == "random":
        return None
    if cfg.checkpoint is not None:
        return local_checkpoint(cfg.checkpoint, cfg.checkpoint_sha256)
    return _public_file(cfg, cfg.official, cfg.hub)


def _public_file(cfg: ModelConfig, official: CheckpointConfig, hub: CheckpointConfig) -> Checkpoint | None:
    """Fetch one of a model's public files, if it has one."""
    if official.url is not None and cfg.source != "hub":
        return url_checkpoint(official.url, cache_dir() / "checkpoints", official.sha256)
    if hub.hub_id is not None and cfg.source != "official":
        return hub_checkpoint(hub.hub_id, hub.filename or "", hub.revision, hub.sha256)
    if cfg.source is not None and (official.url or hub.hub_id):
        raise HarnessError(f"model.source={cfg.source}: {cfg.name} has no such file. Leave model.source out.")
    return None


def _facts(checkpoint: Checkpoint) -> dict[str, Any]:
    return {"origin": checkpoint.origin, "sha256": checkpoint.sha256}


def _load_demo(cfg: ModelConfig, threads: int) -> LoadedModel:
    return LoadedModel(
        load_demo_network(),
        "demo",
        **_statistics(cfg),
        channels=150,
        facts={"origin": "packaged demo network"},
    )


def _load_system(cfg: ModelConfig, threads: int) -> LoadedModel:
    """Load a system of the leaderboard: of models/systems.py."""
    family = FAMILIES[cfg.kind]
    if cfg.weights == "random":
        module = quietly_random(family, cfg.architecture, cfg.seed)
        facts = {"origin": f"random, seed {cfg.seed}"}
        return _system(cfg, module, "random", facts)
    checkpoint = _checkpoint(cfg)
    if checkpoint is None:
        raise HarnessError(
            f"model={cfg.name}: {cfg.missing or 'no public weights are known: give model.checkpoint=PATH.'}"
            " To try it without weights: model.weights=random."
        )
    state, facts = read_state_dict(checkpoint.path), _facts(checkpoint)
    alone = _is_head_alone(family, state)
    if alone or cfg.delta:
        why = (
            "the head alone" if alone else "differences from its backbone (a file of whole weights: model.delta=false)"
        )
        backbone = _backbone(cfg, f"{checkpoint.origin}: this file holds {why}")
        below = read_state_dict(backbone.path)
        state = {**below, **state} if alone else add_delta(family, state, below)
        facts |= {"backbone_origin": backbone.origin, "backbone_sha256": backbone.sha256}
        facts["sha256"] = hashlib.sha256(f"{checkpoint.sha256}{backbone.sha256}".encode()).hexdigest()
        facts["head_sha256"] = checkpoint.sha256
    keys = Keys(facts["origin"], tuple(cfg.allow_missing_keys), tuple(cfg.allow_unexpected_keys))
    module = family.load(cfg.architecture, state, keys)
    if isinstance(module, Beit3Trunk):
        raise HarnessError(
            f"{facts['origin']}: BEiT-3's encoder alone, without adapter and head. {cfg.missing or ''}"
            " An encoder goes with model.backbone_checkpoint=PATH, beside a head as model.checkpoint=PATH."
        )
    return _system(cfg, module, "pretrained", facts)


def _system(cfg: ModelConfig, module: nn.Module, weights: str, facts: dict[str, Any]) -> LoadedModel:
    size: Any = getattr(module, "fixed_size", None)
    return LoadedModel(module, weights, **_statistics(cfg), channels=NUM_CLASSES, fixed_size=size, facts=facts)


def load_for_probe(cfg: ModelConfig) -> LoadedModel:
    """Build a system with its backbone's public weights and a head that is still to be trained.

    Raises:
        HarnessError: the model has no linear head, or there are no weights for its backbone.
    """
    family = FAMILIES.get(cfg.kind)
    if family is None or not family.classifier.startswith("head."):
        names = [name for name, kind in SYSTEMS.items() if FAMILIES[kind].classifier.startswith("head.")]
        raise HarnessError(
            f"model={cfg.name}: has no linear head on a frozen backbone. Models to probe: {', '.join(names)}."
        )
    if cfg.weights == "random":
        module, facts = quietly_random(family, cfg.architecture, cfg.seed), {"origin": f"random, seed {cfg.seed}"}
        return LoadedModel(module.eval(), "random", **_statistics(cfg), facts=facts)
    if cfg.checkpoint is not None:
        raise HarnessError("model.checkpoint: probe makes it. The backbone's file is model.backbone_checkpoint=PATH.")
    backbone = _backbone(cfg, f"model={cfg.name}")
    keys = Keys(backbone.origin, tuple(cfg.allow_missing_keys), tuple(cfg.allow_unexpected_keys), headless=True)
    module = family.load(cfg.architecture, read_state_dict(backbone.path), keys).eval()
    if cfg.dtype != "fp32":
        _convert(module, DTYPES[cfg.dtype], cfg.kind)
    return LoadedModel(module, "pretrained", **_statistics(cfg), facts=_facts(backbone))


def _is_head_alone(family: Family, state: StateDict) -> bool:
    """Return whether a file holds a head and not the frozen backbone below it."""
    return bool(family.head) and all(k.startswith(family.head) for k in family.hub_names(state))


def _backbone(cfg: ModelConfig, why: str) -> Checkpoint:
    """Return the file of the frozen backbone below a head; `why` leads the message if there is none."""
    if cfg.backbone_checkpoint is not None:
        return local_checkpoint(cfg.backbone_checkpoint, cfg.backbone.sha256, "model.backbone_checkpoint")
    found = _public_file(cfg, cfg.backbone, cfg.backbone)
    if found is None:
        raise HarnessError(f"{why}. Give the backbone's file as model.backbone_checkpoint=PATH.")
    return found


def _load_hf(cfg: ModelConfig, threads: int) -> LoadedModel:
    module, names, statistics, facts = load_transformers(
        cfg.id or "", cfg.revision, cfg.allow_missing_keys, cfg.allow_unexpected_keys
    )
    mean, std = statistics or (list(cfg.input.mean), list(cfg.input.std))
    folder = Path(cfg.id or "")
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]) if folder.is_dir() else []
    if files:  # one file, or the shards; transformers prefers safetensors
        digests = [file_hash(f, "sha256") for f in files]
        facts["sha256"] = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return LoadedModel(
        module,
        "pretrained",
        tuple(mean),
        tuple(std),
        _names(cfg, names),
        len(names) if names else None,
        facts=dict(facts),
    )


def _load_custom(cfg: ModelConfig, threads: int) -> LoadedModel:
    target = cfg._target_ or ""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the console script does not
    try:
        get_object(target)
    except Exception as error:  # importing runs the user's code, which may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise HarnessError(
            f"model._target_={target}: cannot be imported ({reason}). Expected package.module.Name, importable from"
            f" {Path.cwd()} or installed."
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        try:  # Hydra's own rules: nested _target_, _partial_, _args_, and its list of functions that are refused
            module = instantiate({"_target_": target, "_convert_": "all", **cfg.kwargs})
        except InstantiationException as error:
            cause = error.__cause__ or error
            if isinstance(cause, TypeError):
                raise HarnessError(
                    f"model._target_={target}: does not take these arguments ({cause})."
                    " Set them as model.kwargs.NAME=VALUE."
                ) from error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            raise HarnessError(
                f"model._target_={target}: making it failed ({reason}). ADE_HARNESS_TRACEBACK=1 shows where."
            ) from error
    if not isinstance(module, nn.Module):
        raise HarnessError(f"model._target_={target}: gave a {type(module).__name__}, expected a torch.nn.Module.")
    checkpoint = _checkpoint(cfg)
    if checkpoint is None:
        weights = "random" if cfg.weights == "random" else "constructed"
        facts: dict[str, Any] = {"origin": f"{target}, as constructed (seed {cfg.seed})"}
    else:
        state = read_state_dict(checkpoint.path)
        load_strictly(module, state, checkpoint.origin, cfg.allow_missing_keys, cfg.allow_unexpected_keys)
        weights, facts = "pretrained", _facts(checkpoint)
    names = getattr(module, "class_names", None)
    return LoadedModel(module, weights, **_statistics(cfg), class_names=_names(cfg, names), facts=facts)


def _file(cfg: ModelConfig) -> Path:
    path = Path(cfg.path or "").expanduser()
    if not path.is_file():
        raise HarnessError(f"model.path={cfg.path}: no such file.")
    digest = cfg.checkpoint_sha256
    if digest is not None and file_hash(path, "sha256") != digest.lower():
        raise HarnessError(
            f"{path}: the sha256 is {file_hash(path, 'sha256')}, model.checkpoint_sha256 expects {digest}."
        )
    return path


def _load_torchscript(cfg: ModelConfig, threads: int) -> LoadedModel:
    path = _file(cfg)
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError, OSError) as error:
        raise HarnessError(
            f"{path}: not a TorchScript file ({str(error).splitlines()[0]}). A state_dict goes with model=custom or a"
            " named model, as model.checkpoint=PATH."
        ) from error
    facts = {"origin": str(path), "sha256": file_hash(path, "sha256")}
    return LoadedModel(module, "pretrained", **_statistics(cfg), class_names=_names(cfg), facts=facts)


def _load_onnx(cfg: ModelConfig, threads: int) -> LoadedModel:
    path = _file(cfg)
    module = OnnxModel(path, threads)
    facts = {"origin": str(path), "sha256": file_hash(path, "sha256"), "parameters": None}
    return LoadedModel(
        module,
        "pretrained",
        **_statistics(cfg),
        class_names=_names(cfg, module.class_names),
        channels=module.output_shape[1] if isinstance(module.output_shape[1], int) else None,
        fixed_size=module.fixed_size,
        fixed_batch=module.fixed_batch,
        facts=facts,
    )


LOADERS: dict[str, Callable[[ModelConfig, int], LoadedModel]] = {
    "demo": _load_demo,
    **dict.fromkeys(FAMILIES, _load_system),
    "hf": _load_hf,
    "custom": _load_custom,
    "torchscript": _load_torchscript,
    "onnx": _load_onnx,
}
