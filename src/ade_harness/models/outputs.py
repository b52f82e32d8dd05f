"""What networks return: scores per pixel, or mask classification."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ade_harness.errors import HarnessError


class MaskLogits(NamedTuple):
    """Mask classification: a class and a mask for each query."""

    classes: Tensor
    """float [N, Q, C + 1], the last is "no object"."""
    masks: Tensor
    """float [N, Q, h, w], before the sigmoid."""


def read_output(output: Any, what: str) -> Tensor | MaskLogits:
    """Find the scores in what a network returned.

    A :class:`MaskLogits`, or ``.class_queries_logits`` with ``.masks_queries_logits`` (transformers), or
    ``pred_logits`` with ``pred_masks`` in a dict (detectron2); else a tensor, ``.logits``, a dict's "logits", "out"
    or "sem_seg", or a first item.

    Raises:
        HarnessError: nothing of that kind is there; `what` names the image.
    """
    if isinstance(output, MaskLogits):
        return output
    if hasattr(output, "class_queries_logits") and hasattr(output, "masks_queries_logits"):
        return MaskLogits(output.class_queries_logits, output.masks_queries_logits)
    if isinstance(output, dict) and "pred_logits" in output and "pred_masks" in output:
        return MaskLogits(output["pred_logits"], output["pred_masks"])
    found = output
    if isinstance(found, dict):
        found = found.get("logits", found.get("out", found.get("sem_seg")))
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, list | tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 4:
        got = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        raise HarnessError(f"{what}: the model returned {got}, expected logits [N, C, h, w].")
    return found
