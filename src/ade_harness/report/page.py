"""Self-contained HTML pages: Jinja2 templates, Plotly inside the file, no network.

Names from runs, files and models are escaped by Jinja2; beyond that the page's Content-Security-Policy admits only the
scripts that are named by their hashes, so that text which slipped through could not run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

import ade_harness
from ade_harness.data.containers import MAX_FILE_BYTES
from ade_harness.data.decode import decode_image
from ade_harness.data.labels import Classes
from ade_harness.files.atomic import write_text
from ade_harness.files.reading import read_regular
from ade_harness.metrics.regions import SIZE_EDGES
from ade_harness.report import plots
from ade_harness.report.contents import SCORE_NAMES, RunContents, configuration, provenance
from ade_harness.report.examples import Example, data_url

_OVERLAY_SIDE = 1400
_MAX_OVERLAYS = 100


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("ade_harness.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )


def _asset(name: str) -> str:
    return files("ade_harness.report").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def render_page(
    template: str, title: str, marks: Sequence[str], classes: Classes, data: dict[str, Any], **values: Any
) -> str:
    """Return an HTML page.

    Args:
        template: name of a file in templates/.
        title: of the page.
        marks: what its numbers are not, shown above everything.
        classes: of the data set.
        data: for the page's script; any JSON.
        values: for the template.
    """
    scripts = [Markup(text) for text in (_plotly(), _asset("page.js"))]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts
    )
    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            marks=marks,
            data=data,
            css=Markup(_asset("page.css")),
            plotly=scripts[0],
            script=scripts[1],
            script_hashes=Markup(hashes),
            version=ade_harness.__version__,
            class_names=[*classes.names, "none"],
            **values,
        )
    )


def write_run_page(
    path: Path, contents: RunContents, worst: Sequence[Example], best: Sequence[Example], notes: Sequence[str]
) -> None:
    """Write the page of one run.

    Args:
        path: of the HTML file.
        contents: what it shows.
        worst: pictures of the worst images.
        best: of the best.
        notes: what the reader must know.

    Raises:
        HarnessError: the file cannot be written.
    """
    run = contents.run
    timings = run.manifest["timings"]
    figures = {
        "classes": plots.class_iou_figure(contents.classes),
        "images": plots.image_figure(contents.image_scores["mIoU"]),
        "stages": plots.stages_figure(timings["stages"]),
        "ranks": plots.ranks_figure(timings["ranks"]),
    }
    boundary_miou = None
    objects: list[tuple[str, list[int]]] = []
    if contents.calibration:
        figures["reliability"] = plots.reliability_figure(contents.calibration)
    if contents.regions:
        figures["bands"] = plots.bands_figure(contents.regions.bands)
        boundary = contents.regions.boundary_iou()
        boundary_miou = float(boundary[~np.isnan(boundary)].mean())
        names = [f"under {edge:,}" for edge in SIZE_EDGES] + [f"{SIZE_EDGES[-1]:,} and more"]
        objects = list(zip(names, contents.regions.objects.tolist(), strict=True))
    dataset = run.manifest["dataset"]
    page = render_page(
        "run.html.j2",
        f"{run.label} on {dataset['name']}",
        run.marks,
        run.classes,
        {"confusion": plots.confusion_data(contents.matrix, run.classes), "figures": figures},
        contents=contents,
        scores=contents.scores.as_dict(),
        score_names=SCORE_NAMES,
        pixels=int(contents.matrix.sum()),
        published=run.metrics.get("published"),
        verdict=run.metrics.get("reproduced"),
        convention=run.metrics["convention"],
        notes=[*run.metrics["notes"], *contents.notes, *notes],
        worst=worst,
        image_classes=[n for n in contents.run.classes.names if any(n in e.class_names for e in (*worst, *best))],
        best=best,
        overlays=[] if worst else _overlays(run.path),
        boundary_miou=boundary_miou,
        objects=objects,
        timings=timings,
        provenance=provenance(run),
        configuration=configuration(run),
    )
    write_text(path, page)


def _overlays(run_dir: Path) -> list[tuple[str, str]]:
    """Return the pictures that the run itself has drawn, as (image id, data URL)."""
    found = []
    folder = run_dir / "overlays"
    if folder.is_symlink():
        return []
    for path in sorted(folder.rglob("*.png"))[:_MAX_OVERLAYS]:
        if path.is_symlink():  # in a run directory of somebody else's it may lead to any picture of this user's
            continue
        picture = Image.fromarray(decode_image(read_regular(path, MAX_FILE_BYTES), str(path)))
        picture.thumbnail((_OVERLAY_SIDE, _OVERLAY_SIDE))
        found.append((path.relative_to(folder).with_suffix("").as_posix(), data_url(picture, "JPEG")))
    return found
