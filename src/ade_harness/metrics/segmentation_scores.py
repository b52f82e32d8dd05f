"""The scores as a torchmetrics metric, for training loops: exact counts on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric

from ade_harness import kernels
from ade_harness.data.ade20k_labels import NUM_CLASSES
from ade_harness.data.labels import IGNORE_INDEX, MAX_CLASSES
from ade_harness.errors import ArgumentError
from ade_harness.metrics.confusion import Scores, area_scores, class_iou, mean_dice

_MAX_CLASSES = 2**14
"""Classes whose matrix takes 2 GiB."""
_SCORES = (*(field.name for field in fields(Scores)), "mean_dice")
_KERNELS = ("auto", "torch", "numba", "triton")


class SegmentationScores(Metric):
    """mIoU and the other scores from one int64 confusion matrix, summed exactly over batches and ranks.

    ::

        scores = SegmentationScores(num_classes=150)
        scores.update(logits, target)  # float [N, 150, h, w] and integers [N, H, W]
        self.log_dict(scores.compute())  # mIoU, mIoU_csail, ..., final_score
        scores.reset()  # at the end of an epoch: Lightning resets what is logged as a metric, not a dict of numbers

    Scores that are smaller than the target are upsampled and counted in one pass, with the labels that
    ``F.interpolate(logits, target.shape[-2:], mode="bilinear").argmax(1)`` gives, and without its memory.

    Args:
        num_classes: C.
        ignore_index: value of the target where nothing is counted, by default 255; None counts every pixel. To be given
            where 255 is a class.
        validate_args: look for targets that are neither a class nor `ignore_index`; on a GPU it waits for the device.
        score: name of one score, such as ``mIoU``: `compute` then returns that number alone, for
            ``self.log("val/mIoU", metric)`` and torchmetrics' MetricTracker.
        kernels_choice: ``auto``, ``torch``, ``numba`` or ``triton``: which implementation counts.
        options: of ``torchmetrics.Metric``, such as ``dist_sync_on_step``.

    Raises:
        ArgumentError: `num_classes`, `ignore_index` or `score` that make no sense; it is a ValueError.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound: float = 0.0
    plot_upper_bound: float = 1.0
    plot_legend_name = "Score"

    matrix: Tensor
    """int64 [C, C + 1]: annotated class, predicted class; the last column is none of them."""
    ignored: Tensor
    """Whether there is an `ignore_index`, and which. A state, since a MetricCollection lets metrics whose states are
    equal after the first batch share one: two that ignore different values may be, by then."""

    def __init__(
        self, num_classes: int = NUM_CLASSES, ignore_index: int | str | None = "default", validate_args: bool = True,
        kernels_choice: str = "auto", score: str | None = None, **options: Any,
    ) -> None:  # fmt: skip
        try:
            super().__init__(**options)
        except (ValueError, TypeError) as error:
            raise ArgumentError(f"torchmetrics.Metric: {error}") from error
        if kernels_choice not in _KERNELS:
            raise ArgumentError(f"kernels_choice={kernels_choice!r}: expected one of {', '.join(_KERNELS)}.")
        if score is not None and score not in _SCORES:
            raise ArgumentError(f"score={score!r}: expected one of {', '.join(_SCORES)}, or None for all.")
        if not _is_whole(num_classes) or num_classes < 1:
            raise ArgumentError(f"num_classes={num_classes!r}: expected a whole number from 1 up.")
        if num_classes > _MAX_CLASSES:
            raise ArgumentError(
                f"num_classes={num_classes}: its matrix would need {8 * num_classes**2 / 2**30:,.0f} GiB; at most"
                f" {_MAX_CLASSES:,} classes are counted."
            )
        if ignore_index == "default":
            if num_classes > IGNORE_INDEX:
                raise ArgumentError(
                    f"num_classes={num_classes}: {IGNORE_INDEX}, which is ignored by default, is one of the classes."
                    " Say ignore_index=VALUE, or None to count every pixel."
                )
            ignore_index = IGNORE_INDEX
        if ignore_index is not None and not _is_whole(ignore_index):
            raise ArgumentError(f"ignore_index={ignore_index!r}: expected a whole number, or None.")
        ignored_value = None if ignore_index is None else int(ignore_index)
        self.num_classes, self.ignore_index, self.validate_args = num_classes, ignored_value, validate_args
        self.kernels_choice, self.score = kernels_choice, score
        self.add_state("matrix", torch.zeros(num_classes, num_classes + 1, dtype=torch.int64), dist_reduce_fx="sum")
        ignored = torch.tensor([ignored_value is not None, ignored_value or 0], dtype=torch.int64)
        self.add_state("ignored", ignored, dist_reduce_fx="max")

    def set_dtype(self, dst_type: str | torch.dtype) -> SegmentationScores:
        """Keep the counts as they are: they are integers, and floats would round them."""
        return self

    # counting reads values, which no compiler can trace: a module that is compiled as a whole calls it as it is
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            preds: scores float [N, C, h, w] of any size, or labels, integers [N, H, W], where values outside of
                0..C-1 are void. Without N for one image. Scores are compared in float32.
            target: integers [N, H, W]: 0..C-1, or `ignore_index`.

        Raises:
            ArgumentError: other shapes or types; or, with `validate_args`, a target that is no class, or NaN or +inf
                among the scores. Then nothing of the batch is counted.
        """
        preds, target = self._batched(preds, target)  # of no image nothing is counted
        found = torch.zeros_like(self.matrix)
        for one, truth in zip(preds, target, strict=True):
            found += self._counts(one, truth)
        self.matrix = self.matrix + found  # a new one: the caller may be in inference mode, or may have been

    def _batched(self, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        for name, value in (("preds", preds), ("target", target)):
            if not isinstance(value, Tensor):
                raise ArgumentError(f"{name}: a {type(value).__name__}, expected a tensor.")
        for name, value in (("preds", preds), ("target", target)):
            if value.is_nested or value.layout != torch.strided or value.is_quantized:
                kind = "quantised" if value.is_quantized else str(value.layout).removeprefix("torch.")
                kind = "nested" if value.is_nested else kind
                raise ArgumentError(f"{name}: a {kind} tensor, expected a dense one (value.to_dense()).")
        if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
            raise ArgumentError(f"target is {target.dtype}, expected integers.")
        if preds.is_complex() or preds.dtype == torch.bool:
            raise ArgumentError(f"preds are {preds.dtype}, expected real scores or integer labels.")
        scores = preds.is_floating_point()
        if target.ndim == 2:
            preds, target = preds[None], target[None]
        expected = [len(target), self.num_classes, "h", "w"] if scores else list(target.shape)
        fits = preds.ndim == 4 and list(preds.shape[:2]) == expected[:2] if scores else preds.shape == target.shape
        if target.ndim != 3 or not fits or (len(target) and not preds.numel()):
            one = " Give target.squeeze(1)." if target.ndim == 4 and target.shape[1] == 1 else ""
            raise ArgumentError(
                f"preds are {preds.dtype} {list(preds.shape)} for a target of {list(target.shape)};"
                f" expected scores {expected if scores else [len(target), self.num_classes, 'h', 'w']} or integer"
                f" labels {list(target.shape)}.{one}"
            )
        if preds.device.type == "meta" or target.device.type == "meta":
            raise ArgumentError("preds or target are on the device meta: they have no values to count.")
        if preds.device != target.device:
            raise ArgumentError(f"preds are on {preds.device}, the target on {target.device}.")
        return preds, target

    def _counts(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Return int64 [C, C + 1] of one image."""
        classes = self.num_classes
        target, prediction = _wide(target), _wide(prediction)
        ignored = target == self.ignore_index if self.ignore_index is not None else torch.zeros_like(target).bool()
        known = (target >= 0) & (target < classes)
        if self.validate_args:
            wrong = ~known & ~ignored
            if bool(wrong.any()):
                raise ArgumentError(
                    f"the target holds {int(target[wrong][0])}, expected 0 to {classes - 1}"
                    f"{'' if self.ignore_index is None else f', or ignore_index={self.ignore_index}'}."
                )
        counted = known & ~ignored
        compact = classes <= MAX_CLASSES
        if prediction.is_floating_point():
            if self.validate_args and bool((prediction.isnan() | prediction.isposinf()).any()):
                raise ArgumentError("preds hold NaN or +inf: argmax would take them for the best class.")
            prediction = self._labels(prediction, target)
        if compact:  # the kernels count labels of one byte
            none = torch.full_like(target, IGNORE_INDEX)
            labels = torch.where((prediction >= 0) & (prediction < classes), prediction.to(target.dtype), none)
            with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]  # the GPU that is tried is that of the tensors
                chosen = kernels.select(self.kernels_choice, target.device.type)
            truth = torch.where(counted, target, none).to(torch.uint8)
            return chosen.count(labels.to(torch.uint8).contiguous(), truth.contiguous(), classes)
        labels = torch.where((prediction >= 0) & (prediction < classes), prediction, classes)[counted].long()
        pairs = target[counted].long() * (classes + 1) + labels
        return torch.bincount(pairs, minlength=classes * (classes + 1)).view(classes, classes + 1)

    def _labels(self, scores: Tensor, target: Tensor) -> Tensor:
        with torch.cuda.device_of(target):  # type: ignore[no-untyped-call]
            chosen = kernels.select(self.kernels_choice, target.device.type)
        size = (target.shape[0], target.shape[1])
        return chosen.label_map(scores.detach().float().resolve_neg().contiguous(), size).long()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def compute(self) -> Any:
        """Return every score by name, float64 (float32 on Apple's GPUs), 0..1, on the metric's device.

        They are those of :class:`ade_harness.metrics.confusion.Scores`, and `mean_dice`. Of a metric that was made with
        `score`, that one alone. All are NaN while no pixel is counted.
        """
        matrix = self._on_host()
        areas = np.ascontiguousarray(np.diagonal(matrix)), matrix.sum(1), matrix[:, :-1].sum(0)
        found: dict[str, Any] = {**area_scores(*areas), "mean_dice": mean_dice(matrix)}
        device = self.matrix.device  # of what Lightning is to compare over ranks
        dtype = torch.float32 if device.type == "mps" else torch.float64
        numbers = {name: torch.tensor(float(value), dtype=dtype, device=device) for name, value in found.items()}
        return numbers if self.score is None else numbers[self.score]

    def class_iou(self) -> Tensor:
        """Return IoU per class, float64 [C], 0..1; NaN for a class in neither truth nor predictions (of this rank)."""
        return torch.from_numpy(class_iou(self._on_host()))

    def _on_host(self) -> npt.NDArray[np.int64]:
        found: npt.NDArray[np.int64] = self.matrix.cpu().numpy()
        return found

    def plot(
        self, val: dict[str, Tensor] | Tensor | Sequence[dict[str, Tensor]] | Sequence[Tensor] | None = None,
        ax: Any = None,
    ) -> Any:  # fmt: skip
        """Plot one or several results of `compute`; returns matplotlib's figure and axis."""
        return self._plot(val, ax)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _wide(values: Tensor) -> Tensor:
    """Return integers of any type in one that torch compares, and that holds every number of a class."""
    if values.is_floating_point() or values.dtype in (torch.int32, torch.int64):
        return values
    return values.to(torch.int64 if values.dtype in (torch.uint32, torch.uint64) else torch.int32)
