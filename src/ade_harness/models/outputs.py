"""What networks return: scores per pixel, or mask classification."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ade_harness.errors import HarnessError


class MaskLogits(NamedTuple):
    """Mask classification: a class and a mask for each query."""

    classes: Tensor
    """float [N, Q, C + 1], the last is "no object"."""
    masks: Tensor
    """float [N, Q, h, w], before the sigmoid."""


class LabelMap(NamedTuple):
    """Labels, of a network that ends in an argmax."""

    labels: Tensor
    """integers [N, h, w]."""

    def as_scores(self, channels: int, what: str) -> Tensor:
        """Return 1 for the label's channel and 0 for the others, float32 [N, channels, h, w].

        Their argmax is the labels, so that a protocol goes on with them as with any scores; where it enlarges or
        averages them, pixels vote. On a GPU, where nothing waits for a value, all scores of a label that is no channel
        are NaN, which is found at the end.

        Raises:
            HarnessError: a label that is no channel, on a CPU.
        """
        labels = self.labels.long()  # of uint16 torch knows no minimum
        every = torch.arange(channels, device=labels.device)
        scores = (labels[:, None] == every[:, None, None]).float()
        if labels.device.type != "cpu":
            wrong = (labels < 0) | (labels >= channels)
            return scores.masked_fill_(wrong[:, None], float("nan"))
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= channels:
            raise HarnessError(
                f"{what}: the model returned the label {low if low < 0 else high}, expected 0 to {channels - 1}, one of"
                " its channels for every pixel. Labels that mean other classes, or none, go by model.class_map; what"
                " numbers classes otherwise goes by model=predictions, as PNG files."
            )
        return scores


def read_output(output: Any, what: str) -> Tensor | MaskLogits | LabelMap:
    """Find the scores in what a network returned.

    A :class:`MaskLogits`, or ``.class_queries_logits`` with ``.masks_queries_logits``, or ``.logits`` with
    ``.pred_masks`` (transformers), or ``pred_logits`` with ``pred_masks`` in a dict (detectron2); else a tensor,
    ``.logits``, a dict's "logits", "out" or "sem_seg", or a first item. Integers [N, h, w] or [N, 1, h, w] are labels.

    Raises:
        HarnessError: nothing of that kind is there; `what` names the image.
    """
    if isinstance(output, MaskLogits):
        return MaskLogits(*(_checked(tensor, what) for tensor in output))
    if hasattr(output, "class_queries_logits") and hasattr(output, "masks_queries_logits"):
        return MaskLogits(_checked(output.class_queries_logits, what), _checked(output.masks_queries_logits, what))
    if isinstance(output, dict) and "pred_logits" in output and "pred_masks" in output:
        return MaskLogits(_checked(output["pred_logits"], what), _checked(output["pred_masks"], what))
    if isinstance(getattr(output, "pred_masks", None), Tensor) and isinstance(getattr(output, "logits", None), Tensor):
        return MaskLogits(_checked(output.logits, what), _checked(output.pred_masks, what))  # DETR's
    found = output
    if isinstance(found, dict):
        found = found.get("logits", found.get("out", found.get("sem_seg")))
    elif hasattr(found, "logits"):
        found = found.logits
    elif isinstance(found, list | tuple) and found:
        found = found[0]
    if _is_labels(found):
        return LabelMap(found[:, 0] if found.ndim == 4 else found)
    if isinstance(found, Tensor):
        _checked(found, what)
    if not isinstance(found, Tensor) or found.ndim != 4:
        got = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(output).__name__}"
        flat = isinstance(found, Tensor) and found.ndim == 3
        hint = " Labels are integers: .long(); scores have a batch dimension: [None]." if flat else ""
        if isinstance(output, dict):
            keys = ", ".join(repr(str(key))[:40] for key in list(output)[:8])
            hint = f" Its keys are {keys}; read are 'logits', 'out', 'sem_seg', and 'pred_logits' with 'pred_masks'."
        raise HarnessError(f"{what}: the model returned {got}, expected logits [N, C, h, w].{hint}")
    return found


def other_scores(output: Any) -> int:
    """Return how many items after the first of what a network returned look like scores of the same classes.

    :func:`read_output` takes the first of several, which is what most code bases return first; some put an auxiliary
    head there.
    """
    if not isinstance(output, list | tuple) or isinstance(output, MaskLogits) or hasattr(output, "logits"):
        return 0
    scores = [t for t in output if isinstance(t, Tensor) and t.ndim == 4 and t.is_floating_point()]
    if not scores or scores[0] is not output[0]:
        return 0
    return sum(t.shape[:2] == scores[0].shape[:2] for t in scores[1:])


def _is_labels(found: Any) -> bool:
    """Whether something is a map of integers rather than scores."""
    if not isinstance(found, Tensor) or found.is_nested or found.layout != torch.strided or found.is_quantized:
        return False
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return integers and (found.ndim == 3 or (found.ndim == 4 and found.shape[1] == 1)) and found.numel() > 0


def _checked(tensor: Any, what: str) -> Tensor:
    """Return scores; raises HarnessError for a tensor whose values are none."""
    if not isinstance(tensor, Tensor):
        raise HarnessError(f"{what}: the model returned a {type(tensor).__name__} where scores were expected.")
    if tensor.is_nested:
        raise HarnessError(f"{what}: the model returned a nested tensor; expected one tensor of scores [N, C, h, w].")
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        raise HarnessError(f"{what}: the model returned a sparse tensor ({tensor.layout}); expected dense scores.")
    if tensor.is_quantized or not tensor.is_floating_point():
        hint = " Labels are integers [N, h, w]." if not tensor.is_complex() else ""
        raise HarnessError(f"{what}: the model returned {kind} values, expected floating-point scores.{hint}")
    return tensor
