"""Weights that regenerate from a seed, by the rule of the golden files (see tests/golden/README.md)."""

from __future__ import annotations

import math
from zlib import crc32

import numpy as np
import torch


def draw(seed: int, key: str, shape: list[int]) -> np.ndarray:
    """Return float32 normal values that depend on seed and key alone."""
    generator = np.random.Generator(np.random.PCG64(crc32(f"{seed}:{key}".encode())))
    return generator.standard_normal(shape, np.float32)


def fill(seed: int, key: str, shape: list[int]) -> torch.Tensor:
    """Return one weight of a dense system."""
    values = draw(seed, key, shape)
    if key.endswith("running_mean"):
        values = 0.1 * values
    elif key.endswith("running_var"):
        values = 1 + 0.1 * np.abs(values)
    elif len(shape) <= 1:
        values = 1 + 0.1 * values if key.endswith("weight") else 0.1 * values
    elif shape[0] == 1:
        values = 0.2 * values
    else:
        values = values / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, np.float32))


_LARGER = ("query_feat", "query_embed", "queries", "level_e")
_SAMPLING = ("sampling_offsets", "attention_weights", ".offset.weight")


def fill_mask_system(seed: int, key: str, shape: list[int]) -> torch.Tensor:
    """Return one weight of a mask-classification system: queries are larger, and where they look varies more."""
    if len(shape) > 1 and (any(w in key for w in _LARGER) or key.endswith("network.q.weight") or key == "q.weight"):
        return torch.from_numpy(2 * draw(seed, key, shape))
    weight = fill(seed, key, shape)
    if len(shape) > 1 and shape[0] != 1 and any(word in key for word in _SAMPLING):
        return torch.from_numpy(2 * draw(seed, key, shape) / math.sqrt(math.prod(shape[1:])))
    return weight
