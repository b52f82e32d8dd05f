"""Experiment tracking: rank 0 only, after the result is on disk."""
