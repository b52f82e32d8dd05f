"""Figures of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ade_harness.data.labels import Classes
from ade_harness.metrics.confusion import Matrix

_SIZE = (16, 15)
"""Inches."""
_MAX_NAME = 60


def save_confusion_matrix(path: Path, matrix: Matrix, classes: Classes, title: str) -> None:
    """Draw the matrix, rows normalised to 1, log colours; columns are predictions, the last one is "none"."""
    truth = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, truth, out=np.zeros(matrix.shape), where=truth > 0)
    names = [name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…" for name in classes.names]
    width, height = _SIZE
    beside = 0.6 + 0.045 * max(map(len, names))  # inches; matplotlib's own layouts draw all labels twice: 0.5 s more
    figure = Figure(figsize=_SIZE)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((beside / width, beside / height, 0.92 - beside / width, 0.97 - beside / height))
    bar = figure.add_axes((0.935, 0.25, 0.015, 0.5))
    shown = np.ma.masked_less(shares, 1e-4)
    image = axes.imshow(shown, norm=LogNorm(1e-4, 1), cmap=mpl.colormaps["cividis"].with_extremes(bad="white"))
    axes.set_xticks(range(len(names) + 1), [*names, "none"], rotation=90, fontsize=5)
    axes.set_yticks(range(len(names)), names, fontsize=5)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    axes.set_title(title)
    figure.colorbar(image, cax=bar, label="share of the ground truth's pixels (below 0.0001: white)")
    figure.savefig(path, dpi=110)
