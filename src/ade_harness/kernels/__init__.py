"""Scores to label maps to counts. `reference` is plain torch; faster implementations keep its interface."""

from ade_harness.kernels.reference import count, label_map

__all__ = ["count", "label_map"]
