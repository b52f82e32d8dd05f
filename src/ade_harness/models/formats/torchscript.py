"""TorchScript files."""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from pathlib import Path

import torch

from ade_harness.config.model import ModelConfig
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import file_hash
from ade_harness.models.checkpoint.sources import model_file, not_that
from ade_harness.models.loaded import LoadedModel, names_of, statistics

_MAX_BYTES = 64 << 20
"""The largest size of a network's code and of the pickles that describe its tensors; the tensors stand beside them."""


def _check(path: Path) -> None:
    """Look at an archive before torch does, which believes every length in it, and takes gigabytes for a damaged one.

    Raises:
        Exception: of zipfile or pickletools, of what is damaged; ValueError for a member that is too large.
    """
    with zipfile.ZipFile(path) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" in names and "constants.pkl" not in names:
            raise HarnessError(
                f"{path}: was written by torch.save, and is no TorchScript. From Python: torch.load it, and give the"
                " network. Weights go with their system (model=NAME model.checkpoint=PATH); `convert` takes the tensors"
                " out of a pickled network."
            )
        for member in archive.infolist():
            pickled = member.filename.endswith(".pkl")
            if (pickled or member.compress_type != zipfile.ZIP_STORED) and member.file_size > _MAX_BYTES:
                raise ValueError(f"{member.filename} has {member.file_size:,} bytes, more than {_MAX_BYTES:,}")
            if pickled:
                for _ in pickletools.genops(archive.read(member)):
                    pass  # lengths and the end are looked at; nothing is built


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load ``model.path``; raises HarnessError if it is no TorchScript file."""
    path = model_file(cfg)
    try:
        _check(path)
        with warnings.catch_warnings():  # torch calls all of TorchScript deprecated
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu")
    except HarnessError:
        raise
    except Exception as error:  # torch's reader of a damaged file fails in any way
        raise not_that(path, "a TorchScript file", error, "A state_dict goes") from error
    facts = {"origin": str(path), "sha256": file_hash(path, "sha256")}
    return LoadedModel(module, "pretrained", **statistics(cfg), class_names=names_of(cfg), facts=facts)
