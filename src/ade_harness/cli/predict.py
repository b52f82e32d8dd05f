"""The command `predict`: label maps and pictures of images without annotations."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ade_harness.api.pictures import (
    describe_model,
    find_images,
    open_output,
    predict_files,
    prediction_marks,
    unread_pictures,
)
from ade_harness.api.predictors import Segmenter
from ade_harness.cli.answer import Answer
from ade_harness.config.arguments import model_is_open, refuse_idle
from ade_harness.config.compose import compose_config
from ade_harness.data.factory import open_classes
from ade_harness.errors import require
from ade_harness.files.reading import expanded
from ade_harness.inference.factory import open_network
from ade_harness.runtime.cluster import resolve_devices
from ade_harness.runtime.console import make_console, print_error, print_fact, print_line
from ade_harness.runtime.notes import EXIT_MESSAGE
from ade_harness.runtime.progress_bar import ProgressReporter

_SHOWN = 5


def run_predict(options: argparse.Namespace) -> Answer:
    """Predict every image that is named, or lies in a folder that is.

    Writes ``labels/NAME.png``, 8-bit with the data set's palette and ADE20K's values (0 none, 1..C), and
    ``pictures/NAME.png``, the image beside its prediction with a legend, and ``predictions.json``: which model made
    them. Images that fail are named, and the rest is done; the exit code is then 2.

    Raises:
        HarnessError: no model or no image is named, a mistake in the configuration, or the folder holds the
            predictions of another model.
    """
    paths = [given for given in options.arguments if "=" not in given or expanded(given).exists()]
    overrides = [given for given in options.arguments if given not in paths]
    extra = Path(options.config_dir) if options.config_dir else None
    require(
        any(override.lstrip("+").startswith("model=") for override in overrides) or model_is_open(overrides, extra),
        "predict: name a model: predict model=NAME IMAGE_OR_FOLDER. `models` lists them; model=demo, a small network"
        " that comes with the package, can be used to try the command.",
    )
    output = expanded(options.output)
    given = [expanded(path) for path in paths]
    files, unread = list(find_images(given, output)), unread_pictures(given, output)
    require(bool(files), "predict: name an image or a folder of images: predict model=NAME IMAGE_OR_FOLDER.")
    refuse_idle(overrides, "predict")
    cfg = compose_config([*overrides, "tracking=none"], extra)
    console = make_console()
    torch.set_num_threads(cfg.runtime.threads)  # as an evaluation: the same labels
    accelerator, _ = resolve_devices(cfg.runtime)
    segmenter = Segmenter(open_network(cfg, open_classes(cfg.dataset)), cfg, torch.device(accelerator))
    made_by = describe_model(segmenter, cfg)
    open_output(output, made_by, segmenter.facts, files)
    print_fact(console, "model", f"{cfg.model.name}, inference={cfg.inference.name}, {_weights(segmenter)}")
    for mark in prediction_marks(segmenter):
        print_line(console, mark, style="bold yellow")
    reporter = ProgressReporter(make_console(result=False), len(files), title="predicting")
    reporter.start()
    try:
        found = predict_files(segmenter, files, output, cfg.inference.exif, reporter.update)
    finally:
        reporter.close()
    failed = found.failed
    if len(failed) < len(files):
        print_fact(console, "labels", str(output / "labels"))
        print_fact(console, "pictures", str(output / "pictures"))
    if found.constant:
        print_line(
            console,
            f"{len(found.constant)} of {len(files)} files are greyscale PNGs with few constant regions, such as"
            f" {found.constant[0]}: are they label maps? They were treated as images.",
            style="yellow",
        )
    if unread:
        print_line(
            console,
            f"{len(unread)} other pictures were left out, such as {unread[0]}: only JPEG and PNG are read. Convert them"
            " to PNG, which changes no pixel.",
            style="yellow",
        )
    if failed:
        left = f"\nand {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        shown = "\n".join(list(failed.values())[:_SHOWN])
        print_error(f"error: {len(failed)} of {len(files)} images failed:\n{shown}{left}")
    content = {**made_by, "output": str(output), "images": [str(file) for file, _ in files if str(file) not in failed]}
    content["left_out"] = [str(file) for file in unread]
    return Answer({**content, "failed": failed}, EXIT_MESSAGE if failed else 0)


def _weights(segmenter: Segmenter) -> str:
    """Return where the weights come from, as short text."""
    facts = segmenter.facts
    return str(facts.get("origin") or facts.get("checkpoint") or f"weights: {facts.get('weights')}")
