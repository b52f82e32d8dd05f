"""Tensors into a file of safetensors, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import save_file

from ade_harness.files.atomic import replaced

if TYPE_CHECKING:
    from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors by name, with text beside them.

    Raises:
        HarnessError: the file cannot be written.
    """
    with replaced(path) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:  # of a folder that is not there, or a disk that is full
            raise OSError(str(error)) from error
