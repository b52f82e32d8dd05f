"""The recipe of a probe: typed fields, and the learning rate at every step.

Sources: facebookresearch/dinov3 @ 6876159, dinov3/eval/segmentation (config-ade20k-linear-training.yaml, train.py,
schedulers.py, transforms.py); facebookresearch/dinov2's published configurations of its heads, which run on
mmsegmentation 0.27.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ade_harness.config.compose import conf_dir
from ade_harness.errors import HarnessError, did_you_mean


@dataclass
class ProbeConfig:
    """How a linear head is trained."""

    name: str = ""
    source: str = ""
    # optimisation: AdamW, cross-entropy averaged over all pixels of the crops, ignored ones too
    iterations: int = 40_000
    batch: int = 16  # crops of all ranks together
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-3
    schedule: str = "cosine"  # cosine (DINOv3) or poly (mmsegmentation: linear to zero)
    warmup: int = 1500  # iterations
    warmup_ratio: float = 1e-6
    dropout: float = 0.1  # of whole channels
    # crops
    side: int = 512  # short side before the random scale
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    crop: int = 512
    most_of_one_class: float = 0.75  # a crop with more of one class is drawn again, up to ten times
    flip: float = 0.5
    distortion: str = "dinov3"  # of colours: dinov3, mmseg, or none
    backend: str = "pillow"  # which library resizes: pillow (antialias) or opencv
    # running
    seed: int = 0
    save_every: int = 500  # iterations
    log_every: int = 50


def probe_recipes() -> list[str]:
    """Return the names in conf/probe."""
    return sorted(path.stem for path in (conf_dir() / "probe").glob("*.yaml"))


def read_recipe(name: str | None, words: Sequence[str]) -> DictConfig:
    """Return a recipe with changes.

    Args:
        name: of a file in conf/probe.
        words: ``probe.key=value``; ``probe=NAME`` goes before `name`.

    Raises:
        HarnessError: an unknown name or key, a wrong type, or a value out of range.
    """
    name = next((w.partition("=")[2] for w in words if w.startswith("probe=")), name)
    known = probe_recipes()
    if name is None or name not in known:
        raise HarnessError(f"probe={name}: no such recipe.{did_you_mean(name or '', known)} Known: {', '.join(known)}.")
    content = yaml.safe_load((conf_dir() / "probe" / f"{name}.yaml").read_text(encoding="utf-8"))
    changes = [w.removeprefix("probe.") for w in words if w.startswith("probe.")]
    fields = list(ProbeConfig.__dataclass_fields__)
    for change in changes:
        key = change.partition("=")[0]
        if key not in fields:
            raise HarnessError(f"probe.{key}: no such option.{did_you_mean(key, fields)} Known: {', '.join(fields)}.")
    try:
        recipe = OmegaConf.merge(OmegaConf.structured(ProbeConfig), content, OmegaConf.from_dotlist(changes))
    except OmegaConfBaseException as error:
        raise HarnessError(f"probe: {str(error).splitlines()[0]} Given: {' '.join(words)}") from error
    checked = cast(DictConfig, recipe)
    _check(checked)
    return checked


def _check(recipe: DictConfig) -> None:
    for key in ("iterations", "batch", "side", "crop", "save_every", "log_every"):
        if recipe[key] < 1:
            raise HarnessError(f"probe.{key}={recipe[key]}: at least 1 is needed.")
    for key, known in (
        ("schedule", ("cosine", "poly")),
        ("distortion", ("dinov3", "mmseg", "none")),
        ("backend", ("pillow", "opencv")),
    ):
        if recipe[key] not in known:
            hint = did_you_mean(recipe[key], known)
            raise HarnessError(f"probe.{key}={recipe[key]}: unknown.{hint} Known: {', '.join(known)}.")
    if len(recipe.scale) != 2 or not 0 < recipe.scale[0] <= recipe.scale[1]:
        raise HarnessError(f"probe.scale={list(recipe.scale)}: two numbers over 0 are needed, the smaller first.")
    if not 0 <= recipe.warmup < recipe.iterations:
        raise HarnessError(f"probe.warmup={recipe.warmup}: from 0 to below probe.iterations ({recipe.iterations}).")


def learning_rate(recipe: DictConfig, step: int) -> float:
    """Return the rate of an optimiser step, counted from 0.

    ``poly`` is mmsegmentation's: a straight line to zero, under a straight warm-up. ``cosine`` is DINOv3's: the same
    warm-up, then half a cosine over all iterations; its schedule stays one step behind, as theirs does.
    """
    n = step if recipe.schedule == "poly" else max(0, step - 1)
    total, warmup = recipe.iterations, recipe.warmup
    line = recipe.lr * (1 - n / total)
    if n < warmup:
        return float(line * (1 - (1 - n / warmup) * (1 - recipe.warmup_ratio)))
    if recipe.schedule == "poly":
        return float(line)
    return float(recipe.lr / 2 * (1 + math.cos(math.pi * (n + 1) / total)))
