"""Networks of segmentation-models-pytorch (an extra): by architecture and encoder, or a folder that it saved."""

from __future__ import annotations

import inspect
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ade_harness.config.model import ModelConfig, Weights
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError, did_you_mean, require
from ade_harness.files.fetch import file_hash
from ade_harness.files.reading import place_or_id, require_no_pipes
from ade_harness.models.checkpoint.parts import read_part
from ade_harness.models.checkpoint.sources import choice_of, chosen_checkpoint, facts_of
from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.loaded import LoadedModel, names_of, statistics


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load ``model.architecture`` (``arch``, ``encoder_name`` and other arguments of smp's constructor).

    It gets a channel for each of `classes`, unless ``model.architecture.classes`` says otherwise.

    The weights are ``model.checkpoint``, strictly; or ``model.id`` names a folder or repository that smp's
    ``save_pretrained`` wrote, whose constructor and weights are taken. Pixel statistics are ``model.input``'s, by
    default ImageNet's, as those of most of smp's encoders.

    Raises:
        HarnessError: the extra is not installed, the architecture or encoder is unknown, or weights do not fit.
    """
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise HarnessError(
            f"model=smp: needs segmentation-models-pytorch ({error}): pip install 'ade-harness[smp]'."
        ) from error
    if cfg.id is not None:
        return _saved(cfg, smp)
    fields = dict(cfg.architecture)
    arch, encoder = fields.pop("arch", None), fields.pop("encoder_name", None)
    require(
        isinstance(arch, str) and isinstance(encoder, str),
        "model=smp: name the network: model.architecture.arch=unet model.architecture.encoder_name=resnet34,"
        " or model.id=FOLDER of a saved one.",
    )
    settings = {"classes": len(classes), **fields, "encoder_weights": None}  # the checkpoint has all weights
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            module: nn.Module = smp.create_model(str(arch), str(encoder), **settings).eval()
    except Exception as error:  # of many kinds: unknown names, impossible arguments
        text = " ".join(str(error).split())[:400]
        raise HarnessError(f"model.architecture={cfg.architecture}: smp cannot build it ({text}).") from error
    known = set(inspect.signature(type(module).__init__).parameters)
    unknown = sorted(fields.keys() - known) if not str(encoder).startswith("tu-") else []  # timm's take any
    require(not unknown, f"model.architecture: {arch} has no field {', '.join(unknown)}.{_nearest(unknown, known)}")
    if cfg.weights == Weights.random:
        return _loaded(cfg, module, "random", {"origin": f"random, seed {cfg.seed}"})
    checkpoint = chosen_checkpoint(cfg)
    require(
        checkpoint is not None,
        "model=smp: has no public weights. Give yours as model.checkpoint=PATH.",
    )
    assert checkpoint is not None
    own = module.state_dict()
    part = read_part(checkpoint.path, choice_of(cfg), lambda state: len(state.keys() & own.keys()))
    keys = Strictness(
        checkpoint.origin,
        tuple(cfg.allow_missing_keys),
        tuple(cfg.allow_unexpected_keys),
        of_file=part.name_in_file,
        prefix=part.prefix,
    )
    load_strictly(module, part.state, keys)
    return _loaded(cfg, module, "pretrained", facts_of(checkpoint, part))


def _nearest(unknown: list[str], known: set[str]) -> str:
    return did_you_mean(unknown[0], sorted(known)) if unknown else ""


def _saved(cfg: ModelConfig, smp: Any) -> LoadedModel:
    """Load what ``save_pretrained`` wrote, from a folder or the hub."""
    place = place_or_id(cfg.id or "")
    require_no_pipes(Path(place), f"model.id={cfg.id}")
    try:
        with redirect_stdout(StringIO()):  # it says from where it loads
            # its encoder's are among the saved weights; config.json may say that the hub has them
            module = smp.from_pretrained(place, revision=cfg.revision, strict=True, encoder_weights=None).eval()
    except Exception as error:  # of the hub, of smp and of torch
        text = " ".join(str(error).split())[:400]
        raise HarnessError(
            f"model.id={cfg.id}: smp cannot load it ({text}). Expected a folder or repository with config.json and"
            " model.safetensors, as smp's save_pretrained writes them."
        ) from error
    folder = Path(place)
    facts: dict[str, Any] = {"origin": place}
    if (folder / "config.json").is_file():  # what the constructor got beside the weights
        facts["config_sha256"] = file_hash(folder / "config.json", "sha256")
    if (folder / "model.safetensors").is_file():
        facts["sha256"] = file_hash(folder / "model.safetensors", "sha256")
    return _loaded(cfg, module, "pretrained", facts)


def _loaded(cfg: ModelConfig, module: nn.Module, weights: str, facts: dict[str, Any]) -> LoadedModel:
    mean, std = ("/".join(f"{v:g}" for v in values) for values in (cfg.input.mean, cfg.input.std))
    note = (
        f"model=smp: smp's files do not say how pixels were normalised; model.input's mean {mean} and std {std} were"
        " used (smp.encoders.get_preprocessing_params names an encoder's)"
    )
    return LoadedModel(module, weights, **statistics(cfg), class_names=names_of(cfg), notes=(note,), facts=facts)
