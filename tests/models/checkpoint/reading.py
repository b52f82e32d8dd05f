"""What is in a weight file, without a choice of a part."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ade_harness.models.checkpoint.parts import read_part


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the weights of a file."""
    return dict(read_part(path).state)
