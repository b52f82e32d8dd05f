"""TorchScript files."""

from __future__ import annotations

import torch

from ade_harness.config.model import ModelConfig
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import file_hash
from ade_harness.models.checkpoint.sources import model_file
from ade_harness.models.loaded import LoadedModel, names_of, statistics


def load(cfg: ModelConfig, threads: int) -> LoadedModel:
    """Load ``model.path``; raises HarnessError if it is no TorchScript file."""
    path = model_file(cfg)
    try:
        module = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # torch's reader of a damaged file fails in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HarnessError(
            f"{path}: not a TorchScript file ({reason}). A state_dict goes with model=custom or a"
            " named model, as model.checkpoint=PATH."
        ) from error
    facts = {"origin": str(path), "sha256": file_hash(path, "sha256")}
    return LoadedModel(module, "pretrained", **statistics(cfg), class_names=names_of(cfg), facts=facts)
