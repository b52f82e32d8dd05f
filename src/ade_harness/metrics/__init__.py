"""Counts to numbers: pure functions of integers, without files and without torch.distributed.

``SegmentationScores``, the metric for training loops, is imported when it is asked for: it needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ade_harness.metrics.confusion import Convention, Scores, class_iou, mean_iou, scores

if TYPE_CHECKING:
    from ade_harness.metrics.segmentation_scores import SegmentationScores

__all__ = ["Convention", "Scores", "SegmentationScores", "class_iou", "mean_iou", "scores"]


def __getattr__(name: str) -> Any:
    if name == "SegmentationScores":
        from ade_harness.metrics.segmentation_scores import SegmentationScores

        return SegmentationScores
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
