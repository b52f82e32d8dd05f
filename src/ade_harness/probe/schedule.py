"""The learning rate at every step."""

from __future__ import annotations

import math

from ade_harness.config.probe import ProbeConfig, Schedule


def learning_rate(recipe: ProbeConfig, step: int) -> float:
    """Return the rate of an optimiser step, counted from 0.

    ``poly`` is mmsegmentation's: a straight line to zero, under a straight warm-up. ``cosine`` is DINOv3's: the same
    warm-up, then half a cosine over all iterations; its schedule stays one step behind, as theirs does.
    """
    n = step if recipe.schedule == Schedule.poly else max(0, step - 1)
    total, warmup = recipe.iterations, recipe.warmup
    line = recipe.lr * (1 - n / total)
    if n < warmup:
        return float(line * (1 - (1 - n / warmup) * (1 - recipe.warmup_ratio)))
    if recipe.schedule == Schedule.poly:
        return float(line)
    return float(recipe.lr / 2 * (1 + math.cos(math.pi * (n + 1) / total)))
