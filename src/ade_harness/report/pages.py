"""The commands `report` and `compare`: finished runs in, a table and a self-contained page out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_text
from ade_harness.files.reading import expanded, read_regular
from ade_harness.report.contents import run_contents
from ade_harness.report.examples import Samples, kept_images, make_examples, measure_regions, reopen_dataset
from ade_harness.report.page import render_page, write_run_page
from ade_harness.report.plots import figure_text
from ade_harness.report.ranking import Ranking, format_p_value
from ade_harness.runs.finished import FinishedRun
from ade_harness.runtime.limits import usable_cores

PAGE = "report.html"
COMPARISON_PAGE = "comparison.html"
_PICTURES = 12
_SCENES = "sceneCategories.txt"
_MAX_SCENES_BYTES = 10_000_000


def write_report(
    console: Console, run: FinishedRun, page: Path, scenes: str | None = None, boundaries: bool = True
) -> None:
    """Write the page of one run.

    Args:
        console: for progress.
        run: what it shows.
        page: of the file.
        scenes: file of the images' scenes; None looks beside the images.
        boundaries: look at boundaries and objects too, if all label maps were kept; 0.1 s per image.

    Raises:
        HarnessError: the page cannot be written, or a file that it needs is damaged.
    """
    dataset, missing = reopen_dataset(run)
    notes = [] if missing is None else [f"No pictures: the data set cannot be opened ({missing})"]
    samples = Samples(dataset) if dataset else None
    regions = None
    if samples is not None and boundaries:
        regions = measure_regions(run, samples, usable_cores(), _progress(console, "boundaries and objects"))
    contents = run_contents(run, _read_scenes(scenes, run), regions)
    values = contents.image_scores["mIoU"]
    kept = kept_images(run)
    labelled = contents.areas.truth.sum(1) > 0  # an image without a labelled pixel is neither good nor bad
    order = [i for i in np.argsort(values, kind="stable") if contents.areas.ids[i] in kept and labelled[i]]
    captions = [(contents.areas.ids[i], f"mIoU {100 * values[i]:.1f}") for i in order]
    number = min(_PICTURES, len(captions) // 2)
    worst, best = captions[:number], captions[::-1][:number]
    pictures = [make_examples([("prediction", run)], samples, chosen) if samples else [] for chosen in (worst, best)]
    write_run_page(page, contents, pictures[0], pictures[1], notes)


def write_comparison_page(path: Path, ranking: Ranking, level: float) -> None:
    """Write the page of several runs; raises HarnessError if the file cannot be written."""
    dataset, missing = reopen_dataset(ranking.runs[0].run)
    examples: list[list[Any]] = []
    for pair in ranking.pairs:
        named = [(ranking.runs[i].name, ranking.runs[i].run) for i in (pair.first, pair.second)]
        kept = set.intersection(*(kept_images(run) for _, run in named))
        moved = [
            (i, f"contribution to ΔmIoU {100 * v:+z.4f}")
            for i, v in pair.changed_images(len(pair.comparison.ids))
            if i in kept
        ]
        examples.append(make_examples(named, Samples(dataset), moved[:_PICTURES]) if dataset else [])
    notes = [] if missing is None else [f"No pictures: the data set cannot be opened ({missing})"]
    pairs = [
        {
            "first": pair.first,
            "second": pair.second,
            "classes": [
                {"class": c, "first": d.first, "second": d.second, "significant": d.significant(level)}
                for c, d in pair.comparison.classes.items()
            ],
        }
        for pair in ranking.pairs
    ]
    page = render_page(
        "compare.html.j2",
        f"{len(ranking.runs)} runs compared",
        [f"{ranked.name}: {mark}" for ranked in ranking.runs for mark in ranked.run.marks],
        ranking.runs[0].run.classes,
        {"names": [figure_text(name) for name in ranking.runs[0].run.classes.names], "pairs": pairs},
        ranking=ranking,
        examples=examples,
        notes=notes,
        level=level,
        format_p_value=format_p_value,
    )
    write_text(path, page)


def _read_scenes(path: str | None, run: FinishedRun) -> dict[str, str] | None:
    """Read ADE20K's sceneCategories.txt: a line of "image id scene" for each image.

    Args:
        path: of the file; None looks beside the images.
        run: whose data set it may lie in.
    """
    file = expanded(path) if path else Path(str(run.manifest["dataset"]["root"])) / _SCENES
    if path is None and not file.is_file():
        return None
    try:
        text = read_regular(file, _MAX_SCENES_BYTES).decode("utf-8")
        lines = [line.split() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise HarnessError(f"{file}: cannot be read ({error}).") from error
    wrong = next((line for line in lines if len(line) < 2), None)
    if wrong is not None:
        raise HarnessError(f"{file}: expected lines of `image_id scene`, found {' '.join(wrong)!r}.")
    return {line[0]: " ".join(line[1:]) for line in lines}


def _progress(console: Console, what: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    if not console.is_terminal:
        return lambda items, _: items
    return lambda items, total: track(items, what, total=total, console=console)
