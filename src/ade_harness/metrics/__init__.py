"""Counts to numbers: pure functions of integers, without files and without torch.distributed."""

from ade_harness.metrics.confusion import Convention, Scores, class_iou, mean_iou, scores

__all__ = ["Convention", "Scores", "class_iou", "mean_iou", "scores"]
