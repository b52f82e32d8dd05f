"""The ``probe`` group: how a linear head is trained.

Sources: facebookresearch/dinov3 @ 6876159, dinov3/eval/segmentation (config-ade20k-linear-training.yaml, train.py,
schedulers.py, transforms.py); facebookresearch/dinov2's published configurations of its heads, which run on
mmsegmentation 0.27.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ade_harness.config.fields import MAX_SEED, MISSING, bounded, bounded_list
from ade_harness.config.inference import MAX_SIDE


class Schedule(StrEnum):
    """How the learning rate changes."""

    cosine = "cosine"  # DINOv3
    poly = "poly"  # mmsegmentation: linear to zero


class Distortion(StrEnum):
    """How colours are changed."""

    dinov3 = "dinov3"
    mmseg = "mmseg"
    none = "none"


class CropBackend(StrEnum):
    """Which library resizes."""

    pillow = "pillow"  # antialias
    opencv = "opencv"


@dataclass
class ProbeConfig:
    """How a linear head is trained."""

    name: str = MISSING
    source: str = ""
    # optimisation: AdamW, cross-entropy averaged over all pixels of the crops, ignored ones too
    iterations: int = bounded(40_000, at_least=1, at_most=100_000_000)
    batch: int = bounded(16, at_least=1, at_most=65_536)  # crops of all ranks together
    lr: float = bounded(1e-3, above=0, at_most=1000)
    betas: list[float] = bounded_list([0.9, 0.999], length=2, at_least=0, below=1)
    weight_decay: float = bounded(1e-3, at_least=0, at_most=1000)
    schedule: Schedule = Schedule.cosine
    warmup: int = bounded(1500, at_least=0, at_most=100_000_000)  # iterations
    warmup_ratio: float = bounded(1e-6, at_least=0, at_most=1)
    dropout: float = bounded(0.1, at_least=0, at_most=1)  # of whole channels
    # crops
    side: int = bounded(512, at_least=1, at_most=MAX_SIDE)  # short side before the random scale
    scale: list[float] = bounded_list([0.5, 2.0], length=2, above=0, ascending=True)
    crop: int = bounded(512, at_least=1, at_most=MAX_SIDE)
    # a crop with more of one class is drawn again, up to ten times
    most_of_one_class: float = bounded(0.75, above=0, at_most=1)
    flip: float = bounded(0.5, at_least=0, at_most=1)
    distortion: Distortion = Distortion.dinov3
    backend: CropBackend = CropBackend.pillow
    # running
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)
    save_every: int = bounded(500, at_least=1, at_most=100_000_000)  # iterations
    log_every: int = bounded(50, at_least=1, at_most=100_000_000)
