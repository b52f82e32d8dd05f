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


def save_confusion_matrix(path: Path, matrix: Matrix, classes: Classes, title: str) -> None:
    """Draw the matrix, rows normalised to 1, log colours; columns are predictions, the last one is "none"."""
    truth = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, truth, out=np.zeros(matrix.shape), where=truth > 0)
    figure = Figure(figsize=(16, 15), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = np.ma.masked_less(shares, 1e-4)
    image = axes.imshow(shown, norm=LogNorm(1e-4, 1), cmap=mpl.colormaps["cividis"].with_extremes(bad="white"))
    names = classes.names
    axes.set_xticks(range(len(names) + 1), [*names, "none"], rotation=90, fontsize=5)
    axes.set_yticks(range(len(names)), names, fontsize=5)
    axes.set_xlabel("prediction")
    axes.set_ylabel("ground truth")
    axes.set_title(title)
    figure.colorbar(image, label="share of the ground truth's pixels (below 0.0001: white)", shrink=0.7)
    figure.savefig(path, dpi=110)
