"""Any transformers checkpoint for semantic or universal (mask classification) segmentation."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ade_harness.config.dataset import ADE20K_CLASSES
from ade_harness.config.model import NO_CLASS_NAMES, ModelConfig
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import file_hash
from ade_harness.files.logs import SILENT, log_level
from ade_harness.files.reading import place_or_id, require_no_pipes
from ade_harness.kernels.constants import constant
from ade_harness.models.checkpoint.strict import Strictness, require_all_keys
from ade_harness.models.formats.processor import Pixels, read_pixels
from ade_harness.models.loaded import LoadedModel, names_of, statistics
from ade_harness.models.outputs import MaskLogits

ONEFORMER_TASKS = {
    "semantic": (49406, 518, 10549, 533, 29119, 1550, 49407),
    "instance": (49406, 518, 10549, 533, 34572, 49407),
    "panoptic": (49406, 518, 10549, 533, 1072, 24755, 49407),
}
"""Task -> ids of OneFormer's text "the task is ..." in CLIP's vocabulary: no tokenizer is needed at run time."""
ONEFORMER_TEXT_LENGTH = 77
"""Length of the ids, padded with zeros."""


UNSUPPORTED = {
    "videomt": "labels clips of frames; an image has no frames",
}
"""Kinds of transformers' segmentation models that cannot be evaluated here, and why."""
_DIFFERENT = {
    "beit": (
        "transformers takes the features of other blocks than the official BEiT code: model=beit_l is the published"
        " network"
    ),
    "segformer": "its layer norms use another eps than the official code: model=segformer_b0 to b5 are published ones",
}
"""Where transformers computes something else than the official code."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own report of keys, since ours is stricter and stops, and the hub's words on retries."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with log_level("huggingface_hub", SILENT):
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def load_into_transformers(cls: Any, config: Any, state: Mapping[str, Tensor], keys: Strictness) -> nn.Module:
    """Build `cls` from `config` with the weights of `state`, in the names of the hub's files, strictly.

    transformers 5 renamed its modules and translates older names only inside ``from_pretrained``.
    """
    with _quiet():
        module, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _check_loading_info(info, replace(keys, of_file=_hub_names(module, keys)), len(state))
    loaded: nn.Module = module.eval()
    return loaded


def _hub_names(module: nn.Module, keys: Strictness) -> Callable[[str], str]:
    """Return what turns names of transformers' modules into the hub's, and those into the file's own."""
    own = module.state_dict()

    def in_the_file(key: str) -> str:
        from transformers.core_model_loading import revert_weight_conversion

        with suppress(Exception):  # of names alone: a message is no place to fail in
            key = next(iter(revert_weight_conversion(cast(Any, module), {key: own[key]})))
        return key if keys.of_file is None else keys.of_file(key)

    return in_the_file


def _check_loading_info(info: Mapping[str, Any], keys: Strictness, of_file: int | None = None) -> None:
    shapes = [
        f"{keys.both_names(k[0])} {list(k[1])} (the model has {list(k[2])})" if isinstance(k, tuple) else str(k)
        for k in info.get("mismatched_keys", ())
    ]
    require_all_keys(keys, info["missing_keys"], info["unexpected_keys"], shapes, of_file)


class SemanticModel(nn.Module):
    """A ``...ForSemanticSegmentation``: images [N, 3, H, W] to its logits [N, C, h, w]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, C, h, w]."""
        logits: Tensor = self.network(pixel_values=images).logits
        return logits


class DetrModel(nn.Module):
    """A ``DetrForSegmentation``, whose queries have other names."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> MaskLogits:
        """Return class logits [N, Q, C + 1] and mask logits [N, Q, h, w]."""
        output = self.network(pixel_values=images)
        return MaskLogits(output.logits, output.pred_masks)


def without_attention_masks(eomt: Any) -> None:
    """Switch the attention masks of transformers' EoMT off, by numbers of the host in place of a buffer.

    transformers reads the buffer in each layer, which would wait for the GPU.
    """
    blocks = len(eomt.attn_mask_probs)
    del eomt.attn_mask_probs
    eomt.attn_mask_probs = [0.0] * blocks


class UniversalModel(nn.Module):
    """A ``...ForUniversalSegmentation``: images [N, 3, H, W] to class and mask logits.

    transformers' own post-processing passes through 384 x 384, which changes the score: the protocol merges them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.is_oneformer = getattr(network.config, "model_type", None) == "oneformer"

    def forward(self, images: Tensor) -> MaskLogits:
        """Return class logits [N, Q, C + 1] and mask logits [N, Q, h, w]."""
        extra = {}
        if self.is_oneformer:
            task = ONEFORMER_TASKS["semantic"]
            ids = [*task, *[0] * (ONEFORMER_TEXT_LENGTH - len(task))]
            extra["task_inputs"] = constant((tuple(ids),), images.device, torch.int64).expand(images.shape[0], -1)
        output = self.network(pixel_values=images, **extra)
        return MaskLogits(output.class_queries_logits, output.masks_queries_logits)


def load_transformers(
    model_id: str,
    revision: str | None,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
) -> tuple[nn.Module, list[str] | None, Pixels | None, dict[str, str]]:
    """Load a checkpoint from the hub or a local folder.

    Returns:
        The module; its class names in channel order; what its preprocessor says of pixels, if it has one; where it
        came from.

    Raises:
        HarnessError: not found, no network, no segmentation model, or keys that do not fit.
    """
    from transformers import AutoConfig, AutoModelForSemanticSegmentation, AutoModelForUniversalSegmentation
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING,
        MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    )

    where = f"model.id={model_id}"
    wrap: type[UniversalModel] | type[SemanticModel] | type[DetrModel]
    with _quiet(), _explained(where):
        config = AutoConfig.from_pretrained(model_id, revision=revision, trust_remote_code=False)
        if config.model_type in UNSUPPORTED:
            raise HarnessError(f"{where}: {config.model_type} {UNSUPPORTED[config.model_type]}.")
        if type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING:
            auto, wrap = AutoModelForUniversalSegmentation, DetrModel if config.model_type == "detr" else UniversalModel
        elif type(config) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
            auto, wrap = AutoModelForSemanticSegmentation, SemanticModel
        else:
            raise HarnessError(
                f"{where}: a {config.model_type} checkpoint, which transformers has neither as semantic nor as"
                " universal segmentation model."
            )
        network, info = auto.from_pretrained(
            model_id,
            revision=revision,
            dtype=torch.float32,  # config.json may say half precision, to which a file of float32 would be rounded
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    filled = len(network.state_dict()) - len(info["missing_keys"])
    strictness = Strictness(where, tuple(allow_missing), tuple(allow_unexpected))
    _check_loading_info(info, strictness, filled + len(info["unexpected_keys"]))
    names = _names_in(config)
    commit = getattr(config, "_commit_hash", None)
    origin = {"origin": f"{model_id}@{commit}" if commit else model_id}
    if "attn_mask_probs" in dict(network.named_buffers()):
        without_attention_masks(network)  # as EoMT's official evaluation is; files do not always say so
    return wrap(network.eval()), names, read_pixels(model_id, revision, str(config.model_type)), origin


@contextmanager
def _explained(where: str) -> Iterator[None]:
    """Turn transformers' and the hub's many exceptions into one message."""
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:  # of the hub, of safetensors and pickle, and whatever a foreign configuration leads to
        pickled = isinstance(error, pickle.UnpicklingError | EOFError)  # its text advises to run code of the file
        text = "its .bin is no whole file of tensors" if pickled else f"{type(error).__name__}: " + str(error)
        text = " ".join(text.split())
        folder = Path(where.removeprefix("model.id="))
        raise HarnessError(
            f"{where}: cannot be loaded ({text[:400]}). {_inside(folder)}Expected a hub id that can be reached, or a"
            " folder with config.json and model.safetensors."
        ) from error


def _inside(folder: Path) -> str:
    """Return what to give in place of a folder that trainers write around, or beside, a network; "" for others."""
    if (folder / "adapter_config.json").is_file():
        return (
            "It holds an adapter of PEFT alone: merge it into its network first"
            " (PeftModel.from_pretrained(network, FOLDER).merge_and_unload().save_pretrained(OUT)). "
        )
    saved = [path.parent for path in folder.glob("checkpoint-*/config.json")] if folder.is_dir() else []
    steps = sorted((int(path.name[11:]), path) for path in saved if path.name[11:].isdecimal())
    return f"Its last checkpoint is {steps[-1][1]}: give that. " if steps else ""


def describe_network(network: nn.Module, cfg: ModelConfig) -> tuple[list[str] | None, list[str]]:
    """Return what a network of transformers in memory says of itself: class names in channel order, and notes.

    It came without its processor and is somebody's who goes on with it, so that what :func:`load` corrects is said.

    Args:
        network: any module; of one that is not transformers' nothing is known.
        cfg: the ``model`` node.
    """
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    config = getattr(network, "config", None)
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str) or not hasattr(config, "id2label"):
        return None, []
    mean, std = ("/".join(f"{v:g}" for v in values) for values in (cfg.input.mean, cfg.input.std))
    notes = [
        f"a network in memory has no preprocessor_config.json, so pixels were normalised with model.input's mean {mean}"
        f" and std {std}: options={{'model.input.mean': ...}} sets those that it was trained with"
    ]
    if kind in _DIFFERENT:
        notes.append(_DIFFERENT[kind])
    probabilities = getattr(network, "attn_mask_probs", None)
    if isinstance(probabilities, Tensor) and not probabilities.is_meta and bool(probabilities.any()):
        notes.append(
            "EoMT's official evaluation is without masked attention, and this network's attn_mask_probs are not 0:"
            " network.attn_mask_probs.zero_()"
        )
    return _names_in(config), notes


def _names_in(config: Any) -> list[str] | None:
    """Return the class names of a configuration in channel order; None if they are transformers' placeholders."""
    names = [str(config.id2label[i]) for i in sorted(config.id2label)] if config.id2label else None
    return None if names and all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


_NOT_DECISIVE = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")
"""Entries of a configuration that do not change what the network computes from the weights in memory."""


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load ``model.id``; raises as :func:`load_transformers`."""
    place = place_or_id(cfg.id or "")
    require_no_pipes(Path(place), f"model.id={cfg.id}")
    module, names, pixels, facts = load_transformers(
        place, cfg.revision, cfg.allow_missing_keys, cfg.allow_unexpected_keys
    )
    taken = {"mean": pixels.mean, "std": pixels.std, "bgr": pixels.bgr} if pixels else statistics(cfg)
    notes = [] if pixels else [_assumed(cfg)]
    files = _weight_files(Path(place))
    if files:  # one file, or the shards
        digests = [file_hash(f, "sha256") for f in files]
        facts["sha256"] = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    written = json.dumps({key: taken[key] for key in sorted(taken)}, default=list)  # of a file that is no weights
    facts["pixels_sha256"] = hashlib.sha256(written.encode()).hexdigest()
    network: Any = module.network
    settings = {k: v for k, v in network.config.to_dict().items() if k not in _NOT_DECISIVE}
    facts["config_sha256"] = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    channels = len(names) if names else None
    first = str((names or [""])[0]).strip().lower()
    if cfg.class_map == [None, *range(ADE20K_CLASSES)] and first not in NO_CLASS_NAMES:
        notes.append(
            f"of {ADE20K_CLASSES + 1} channels the first is taken for the background and left out, which its name does"
            " not say: model.class_map decides"
        )
    if network.config.model_type in _DIFFERENT:
        notes.append(f"model=hf: {_DIFFERENT[network.config.model_type]}")
    return LoadedModel(
        module, "pretrained", class_names=names_of(cfg, names), channels=channels, notes=tuple(notes), facts=facts,
        resample=pixels.resample if pixels is not None else None, **taken,
    )  # fmt: skip


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads from a folder; others may lie beside, such as training_args.bin."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        stem, suffix = name.split(".")
        if (folder / f"{name}.index.json").is_file():
            return sorted(folder.glob(f"{stem}-*.{suffix}"))
    return []


def _assumed(cfg: ModelConfig) -> str:
    """Say which statistics stand in for those of a preprocessor that is not there."""
    mean, std = ("/".join(f"{v:g}" for v in values) for values in (cfg.input.mean, cfg.input.std))
    return (
        f"model.id={cfg.id}: has no preprocessor_config.json, so pixels were normalised with model.input's mean {mean}"
        f" and std {std}: set those that it was trained with"
    )
