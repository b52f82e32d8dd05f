"""The command `predict`: label maps and pictures of images without annotations."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ade_harness.api.predictors import Segmenter, read_image
from ade_harness.cli.answer import Answer
from ade_harness.config.compose import compose_config
from ade_harness.config.kinds import Gives, kind_of
from ade_harness.data.labels import NO_CLASS
from ade_harness.data.opening import open_classes
from ade_harness.errors import HarnessError, require
from ade_harness.files.atomic import replaced
from ade_harness.inference.opening import open_network
from ade_harness.report.overlays import draw_prediction
from ade_harness.runtime.cluster import resolve_devices
from ade_harness.runtime.console import make_console, print_fact, print_line
from ade_harness.runtime.progress import ProgressReporter

_SUFFIXES = (".jpg", ".jpeg", ".png")


def run_predict(options: argparse.Namespace) -> Answer:
    """Predict every image that is named, or lies in a folder that is.

    Writes ``labels/NAME.png``, 8-bit with the data set's palette and ADE20K's values (0 none, 1..C), and
    ``pictures/NAME.png``, the image beside its prediction with a legend. Images that fail are named, and the rest is
    done.

    Raises:
        HarnessError: no image, or a mistake in the configuration; or images that failed.
    """
    paths = [given for given in options.arguments if "=" not in given or Path(given).expanduser().exists()]
    overrides = [given for given in options.arguments if given not in paths]
    output = Path(options.output).expanduser()
    files = list(_images([Path(path).expanduser() for path in paths], output))
    require(bool(files), "predict: name an image or a folder of images: predict model=NAME IMAGE_OR_FOLDER.")
    extra = Path(options.config_dir) if options.config_dir else None
    cfg = compose_config([*overrides, "tracking=none"], extra)
    require(
        kind_of(cfg.model.kind).gives is not Gives.labels,
        f"model={cfg.model.name}: gives label maps of a data set and has no network. Choose a model with one.",
    )
    console = make_console()
    torch.set_num_threads(cfg.runtime.threads)  # as an evaluation: the same labels
    accelerator, _ = resolve_devices(cfg.runtime)
    segmenter = Segmenter(open_network(cfg, open_classes(cfg.dataset)), cfg, torch.device(accelerator))
    for mark in _marks(segmenter):
        print_line(console, mark, style="bold yellow")
    reporter = ProgressReporter(console, len(files), title="predicting")
    reporter.start()
    failed: dict[str, str] = {}
    try:
        for done, (file, name) in enumerate(files, start=1):
            try:
                _write(segmenter, file, output, name, cfg.inference.exif)
            except HarnessError as error:
                failed[str(file)] = str(error)
            reporter.update(done)
    finally:
        reporter.close()
    print_fact(console, "labels", str(output / "labels"))
    print_fact(console, "pictures", str(output / "pictures"))
    if failed:
        shown = "\n".join(list(failed.values())[:5])
        raise HarnessError(f"{len(failed)} of {len(files)} images failed:\n{shown}")
    content = {"model": cfg.model.name, "protocol": cfg.inference.name, "output": str(output)}
    return Answer({**content, "images": [str(file) for file, _ in files]})


def _images(given: Sequence[Path], output: Path) -> Iterator[tuple[Path, str]]:
    """Yield each image with the name of what is written for it, the path below its folder; not what is in `output`.

    Raises:
        HarnessError: a path that is not there, a folder without images, or two images of one name.
    """
    seen: dict[str, Path] = {}
    for path in given:
        require(path.exists(), f"{path}: no such image or folder.")
        found = [path]
        if path.is_dir():
            made = output.resolve()  # by an earlier command
            below = (p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
            found = sorted(p for p in below if made not in p.resolve().parents)
        require(bool(found), f"{path}: no image is in there ({', '.join(_SUFFIXES)}).")
        for file in found:
            name = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").as_posix()
            require(
                name not in seen,
                f"{file}: would be written to the same files as {seen.get(name)}. Predict them in two commands.",
            )
            seen[name] = file
            yield file, name


def _marks(segmenter: Segmenter) -> list[str]:
    facts = segmenter.facts
    marks = []
    if facts.get("weights") == "random":
        marks.append("RANDOM WEIGHTS: the pictures say nothing about the model")
    if facts.get("random_keys"):
        marks.append("RANDOM LAYERS: the pictures say nothing about the model")
    return marks


def _write(segmenter: Segmenter, file: Path, output: Path, name: str, exif: bool) -> None:
    pixels, _ = read_image(file, exif)
    labels = segmenter.predict(pixels, str(file))
    values = np.where(labels == NO_CLASS, 0, labels + 1).astype(np.uint8)
    grey = Image.fromarray(values, mode="P")
    palette = np.zeros((256, 3), np.uint8)
    palette[1 : len(segmenter.classes) + 1] = segmenter.classes.colors
    grey.putpalette(palette.tobytes())
    pictures: dict[str, Any] = {"labels": grey, "pictures": draw_prediction(pixels, labels, segmenter.classes)}
    for folder, picture in pictures.items():
        path = output / folder / f"{name}.png"
        with replaced(path, durable=False) as temporary:
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(temporary, "PNG")
