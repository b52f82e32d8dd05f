"""What a loader gives: a network, and what is known about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ade_harness.config.model import ModelConfig
from ade_harness.errors import HarnessError, text_of

UNBOUNDED = 1 << 40
"""Pixels that no image has on a side: a limit that is none."""


@dataclass(frozen=True)
class LoadedModel:
    """A network, ready to be called, and what is known about it."""

    module: nn.Module
    """Normalised images float32 [N, 3, H, W] to scores [N, C, h, w], or to mask classification (models/outputs.py)."""
    weights: str
    """pretrained, random, demo, or constructed (a custom model without a checkpoint)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool | None = None
    """Whether it takes BGR, with mean and std in that order; None: as ``model.input.channel_order`` says."""
    class_names: list[str] | None = None
    channels: int | None = None
    """Channels of the scores, if they are known before the first image."""
    fixed_size: tuple[int, int] | None = None
    """(height, width) of the only input it takes."""
    side_limits: tuple[tuple[int, int], tuple[int, int]] | None = None
    """Least and greatest height, and width, that it takes, if it says so."""
    squares: bool = False
    """Whether it takes inputs alone whose height is their width."""
    fixed_batch: int | None = None
    """Images per call if it takes no other number."""
    resample: str | None = None
    """The filter by which it says that images are resized, where that is not the bilinear one."""
    of_caller: bool = False
    """Whether somebody goes on with it, perhaps trains it: then nothing that it keeps may be an inference tensor."""
    notes: tuple[str, ...] = ()
    """What the user should know about the network."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the manifest: origin and sha256 of the weights, parameters."""


@contextmanager
def anybodys_code(is_code: bool, what: str) -> Iterator[None]:
    """Turn whatever the user's own code raises into one message.

    Args:
        is_code: whether it is the user's: errors of this package's pass.
        what: leads the message.

    Raises:
        HarnessError: in place of the error.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, HarnessError):
        raise
    except BaseException as error:  # a constructor, a property or an overridden method may raise anything
        if not is_code:
            raise
        reason = " ".join(f"{type(error).__name__}: {text_of(error)}".split()).rstrip(":")[:300]
        raise HarnessError(
            f"{what}: its code failed while it was loaded ({reason}). ADE_HARNESS_TRACEBACK=1 shows where."
        ) from error


def require_channels_first(shape: Sequence[Any], name: str) -> None:
    """Refuse a file whose input is not of three channels in the second place.

    Args:
        shape: of four sizes; one that may vary is no integer.
        name: leads the message.

    Raises:
        HarnessError: says what it takes; with channels last, how to change that.
    """
    if not isinstance(shape[1], int) or shape[1] == 3:
        return
    last = " Its channels are last, as TensorFlow's: convert it with channels first (tf2onnx: --inputs-as-nchw)."
    raise HarnessError(
        f"{name}: takes {[size if isinstance(size, int) else '?' for size in shape]}, expected RGB images [N, 3, H, W]."
        f"{last if shape[3] == 3 else ''}"
    )


def statistics(cfg: ModelConfig) -> dict[str, Any]:
    """Return mean and std of ``model.input`` as arguments of :class:`LoadedModel`."""
    return {"mean": tuple(cfg.input.mean), "std": tuple(cfg.input.std)}


def names_of(cfg: ModelConfig, carried: list[str] | None = None) -> list[str] | None:
    """Return the class names of a model's channels: ``model.class_names``, or those that its file carries."""
    return list(cfg.class_names) if cfg.class_names is not None else carried
