"""Plotly figures as plain JSON: data and layout without colours of text and background, which the page's theme sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ade_harness.data.labels import CONFIDENCE_BINS, Classes
from ade_harness.metrics.calibration import Calibration
from ade_harness.metrics.confusion import Floats, Matrix
from ade_harness.metrics.regions import BAND_EDGES

# Okabe and Ito's colours, which differ for every kind of colour vision; light enough for both themes
BLUE, ORANGE, GREEN, PURPLE, GREY = "#3d8fd1", "#d55e00", "#009e73", "#cc79a7", "#8a8a8a"

Figure = dict[str, Any]


def figure(data: list[dict[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    """Return a figure with titled axes."""
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for name in axes:
        axes[name] |= layout.pop(name, {})
    return {"data": data, "layout": {"margin": {"l": 60, "r": 20, "t": 20, "b": 50}, **axes, **layout}}


def rounded(values: Sequence[float | None] | Floats, digits: int = 4) -> list[float | None]:
    """Return numbers for JSON: short, and null for what is not defined."""
    return [None if v is None or not np.isfinite(v) else round(float(v), digits) for v in values]


def figure_text(name: str) -> str:
    """Return a name for a figure, where Plotly would read ``<b>`` and ``<a>`` as markup, ``&lt;`` as a character."""
    return name.replace("&", "&amp;").replace("<", "&lt;")


def class_iou_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw every class's IoU with its interval, best first; rows as in :mod:`ade_harness.report.contents`."""
    known = sorted((r for r in rows if r["IoU"] is not None), key=lambda r: -r["IoU"])
    iou = [100 * r["IoU"] for r in known]
    up = [100 * ((r["high"] if r["high"] is not None else r["IoU"]) - r["IoU"]) for r in known]
    down = [100 * (r["IoU"] - (r["low"] if r["low"] is not None else r["IoU"])) for r in known]
    bars = {
        "type": "bar",
        "x": [f"{figure_text(r['name'])} ({r['class']})" for r in known],
        "y": rounded(iou, 2),
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": rounded(up, 2),
            "arrayminus": rounded(down, 2),
            "thickness": 1,
            "width": 0,
            "color": GREY,
        },
        "marker": {"color": BLUE},
        "hovertemplate": "%{x}: %{y:.2f}<extra></extra>",
    }
    return figure(
        [bars], "class, best first", "IoU, percent", yaxis={"range": [0, 100]}, xaxis={"showticklabels": False}
    )


def image_figure(values: Floats) -> Figure:
    """Draw how the images' own mIoU is distributed."""
    bars = {
        "type": "histogram",
        "x": rounded(100 * values, 2),
        "xbins": {"start": 0, "end": 100, "size": 2.5},
        "marker": {"color": BLUE},
    }
    return figure([bars], "mIoU of an image alone, percent", "images", bargap=0.05)


def confusion_data(matrix: Matrix, classes: Classes) -> dict[str, Any]:
    """Return the matrix for the browser, which normalises it: its non-zero entries and the classes' names."""
    truth, prediction = np.nonzero(matrix)
    return {
        "names": [figure_text(name) for name in classes.names],
        "truth": truth.tolist(),
        "prediction": prediction.tolist(),
        "pixels": matrix[truth, prediction].tolist(),
    }


def reliability_figure(calibration: Calibration) -> Figure:
    """Draw accuracy over confidence, and where the pixels are."""
    confidence, accuracy = 100 * calibration.confidence, 100 * calibration.accuracy
    share = 100 * calibration.counts[:, 0] / max(int(calibration.counts[:, 0].sum()), 1)
    edges = (np.arange(CONFIDENCE_BINS) + 0.5) * 100 / CONFIDENCE_BINS
    return figure(
        [
            {
                "type": "bar",
                "x": rounded(edges, 2),
                "y": rounded(share, 3),
                "name": "share of pixels",
                "marker": {"color": GREY},
                "opacity": 0.5,
            },
            {
                "type": "scatter",
                "x": rounded(confidence, 3),
                "y": rounded(accuracy, 3),
                "mode": "lines+markers",
                "name": "accuracy",
                "line": {"color": BLUE},
            },
            {
                "type": "scatter",
                "x": [0, 100],
                "y": [0, 100],
                "mode": "lines",
                "name": "perfect calibration",
                "line": {"color": ORANGE, "dash": "dot"},
            },
        ],
        "confidence, percent",
        "percent",
        legend={"orientation": "h", "y": 1.15},
    )


def bands_figure(bands: np.ndarray) -> Figure:
    """Draw accuracy by distance from the truth's boundaries."""
    names = [f"up to {edge}" for edge in BAND_EDGES] + [f"over {BAND_EDGES[-1]}"]
    accuracy = np.divide(bands[:, 1], bands[:, 0], out=np.full(len(bands), np.nan), where=bands[:, 0] > 0)
    bars = {"type": "bar", "x": names, "y": rounded(100 * accuracy, 2), "marker": {"color": BLUE}}
    return figure([bars], "pixels from a boundary of the truth", "pixel accuracy, percent", yaxis={"range": [0, 100]})


def stages_figure(stages: dict[str, float]) -> Figure:
    """Draw the seconds of each stage, all ranks together."""
    names = sorted(stages, key=lambda n: stages[n])
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": rounded([stages[n] for n in names], 2),
        "y": names,
        "marker": {"color": BLUE},
    }
    return figure([bars], "seconds, all ranks together", "")


def ranks_figure(ranks: Sequence[dict[str, Any]]) -> Figure:
    """Draw how long each rank was busy, and how long it waited for the last one."""
    max_active_seconds = max((r["active_seconds"] for r in ranks), default=0.0)
    names = [f"rank {r['rank']}" for r in ranks]
    busy = [r["busy_seconds"] for r in ranks]
    idle = [max_active_seconds - r["active_seconds"] for r in ranks]
    return figure(
        [
            {"type": "bar", "x": names, "y": rounded(busy, 2), "name": "busy", "marker": {"color": BLUE}},
            {"type": "bar", "x": names, "y": rounded(idle, 2), "name": "idle at the end", "marker": {"color": ORANGE}},
        ],
        "",
        "seconds",
        barmode="stack",
        legend={"orientation": "h", "y": 1.15},
    )
