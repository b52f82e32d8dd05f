"""Make docs/report.png and docs/comparison.png: the real pages of two demo runs, in a headless browser.

python scripts/page_pictures.py        needs the development extras and chromium
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from ade_harness.cli.main import main

DOCS = Path(__file__).parents[1] / "docs"


def make_pages(folder: Path) -> tuple[Path, Path]:
    """Evaluate the demo, and its labels with one pixel in ten spoilt; return the pages."""
    overrides = ["tracking=none", "run.label_maps=all", "run.overlays=0"]
    run(*overrides, f"run.dir={folder / 'demo'}", "metrics.calibration=true")
    spoilt = folder / "spoilt"
    shutil.copytree(folder / "demo" / "label_maps", spoilt)
    rng = np.random.default_rng(0)
    for path in spoilt.glob("*.png"):
        labels = np.array(Image.open(path))
        labels[rng.random(labels.shape) < 0.1] = 1
        Image.fromarray(labels).save(path)
    label = "model.label=one label in ten replaced by wall"
    run(*overrides, "model=predictions", f"model.path={spoilt}", label, f"run.dir={folder / 'spoilt_run'}")
    run("report", str(folder / "demo"))
    page = folder / "comparison.html"
    run("compare", str(folder / "demo"), str(folder / "spoilt_run"), "--output", str(page))
    return folder / "demo" / "report.html", page


def run(*overrides: str) -> None:
    """Run a command; stop if it fails."""
    if main(overrides) != 0:
        sys.exit(f"failed: {' '.join(overrides)}")


def take_pictures(pages: tuple[Path, Path]) -> None:
    """Save the top of both pages."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page, name in zip(pages, ("report", "comparison"), strict=True):
            opened = browser.new_page(viewport={"width": 1240, "height": 1500})
            opened.goto(f"file://{page}")
            opened.wait_for_function("document.documentElement.dataset.ready === 'yes'")
            opened.wait_for_timeout(500)
            picture = DOCS / f"{name}.png"
            opened.screenshot(path=picture)
            with Image.open(picture) as taken:
                small = taken.convert("RGB").resize((930, 1125), Image.Resampling.LANCZOS)
            small.quantize(128).save(picture, optimize=True)
        browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        take_pictures(make_pages(Path(made)))
