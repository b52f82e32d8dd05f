"""The command `predict`: label maps and pictures of images without annotations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ade_harness.cli.answer import Answer
from ade_harness.config.arguments import model_is_open, refuse_idle
from ade_harness.config.compose import compose_config
from ade_harness.config.schema import Config
from ade_harness.data.image_files import find_images, unread_pictures
from ade_harness.errors import require
from ade_harness.files.reading import expanded
from ade_harness.runtime.console import make_console, print_error, print_fact, print_line
from ade_harness.runtime.notes import EXIT_MESSAGE
from ade_harness.runtime.progress_bar import ProgressReporter

if TYPE_CHECKING:
    from ade_harness.api.pictures import PredictedFiles
    from ade_harness.api.predictors import Segmenter

_SHOWN = 5


@dataclass(frozen=True)
class _Request:
    """What the command line asks for."""

    config: Config
    files: list[tuple[Path, str]]
    """Images with the name of what is written for each."""
    unread: list[Path]
    """Pictures beside them that are not read."""
    output: Path


def run_predict(options: argparse.Namespace) -> Answer:
    """Predict every image that is named, or lies in a folder that is.

    Writes ``labels/NAME.png``, 8-bit with the data set's palette and ADE20K's values (0 none, 1..C), and
    ``pictures/NAME.png``, the image beside its prediction with a legend, and ``predictions.json``: which model made
    them. Images that fail are named, and the rest is done; the exit code is then 2.

    Raises:
        HarnessError: no model or no image is named, a mistake in the configuration, or the folder holds the
            predictions of another model.
    """
    asked = _read_options(options)
    made_by, found = _predict(asked)
    files, output, failed = asked.files, asked.output, found.failed
    console = make_console()
    if len(failed) < len(files):
        print_fact(console, "labels", str(output / "labels"))
        print_fact(console, "pictures", str(output / "pictures"))
    _print_remarks(found.constant, asked)
    if failed:
        left = f"\nand {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        shown = "\n".join(list(failed.values())[:_SHOWN])
        print_error(f"error: {len(failed)} of {len(files)} images failed:\n{shown}{left}")
    content = {**made_by, "output": str(output), "images": [str(file) for file, _ in files if str(file) not in failed]}
    content["left_out"] = [str(file) for file in asked.unread]
    return Answer({**content, "failed": failed}, EXIT_MESSAGE if failed else 0)


def _read_options(options: argparse.Namespace) -> _Request:
    """Check all that can be checked without torch, whose import takes seconds; raises as :func:`run_predict`."""
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
    files, unread = find_images(given, output), unread_pictures(given, output)
    require(bool(files), "predict: name an image or a folder of images: predict model=NAME IMAGE_OR_FOLDER.")
    refuse_idle(overrides, "predict")
    return _Request(compose_config([*overrides, "tracking=none"], extra), files, unread, output)


def _predict(asked: _Request) -> tuple[dict[str, Any], PredictedFiles]:
    """Return what the model is, and what became of the files; raises as :func:`run_predict`."""
    import torch

    from ade_harness.api.pictures import describe_model, open_output, predict_files, prediction_marks
    from ade_harness.api.predictors import Segmenter
    from ade_harness.data.factory import open_classes
    from ade_harness.inference.factory import open_network
    from ade_harness.runtime.cluster import resolve_devices

    cfg, files = asked.config, asked.files
    torch.set_num_threads(cfg.runtime.threads)  # as an evaluation: the same labels
    accelerator, _ = resolve_devices(cfg.runtime)
    segmenter = Segmenter(open_network(cfg, open_classes(cfg.dataset)), cfg, torch.device(accelerator))
    made_by = describe_model(segmenter, cfg)
    open_output(asked.output, made_by, segmenter.facts, files)
    console = make_console()
    print_fact(console, "model", f"{cfg.model.name}, inference={cfg.inference.name}, {_weights(segmenter)}")
    for mark in prediction_marks(segmenter):
        print_line(console, mark, style="bold yellow")
    reporter = ProgressReporter(make_console(result=False), len(files), title="predicting")
    reporter.start()
    try:
        return made_by, predict_files(segmenter, files, asked.output, cfg.inference.exif, reporter.update)
    finally:
        reporter.close()


def _print_remarks(constant: Sequence[str], asked: _Request) -> None:
    """Print what among the files may not be meant."""
    console, unread = make_console(), asked.unread
    if constant:
        print_line(
            console,
            f"{len(constant)} of {len(asked.files)} files are greyscale PNGs with few constant regions, such as"
            f" {constant[0]}: are they label maps? They were treated as images.",
            style="yellow",
        )
    if unread:
        print_line(
            console,
            f"{len(unread)} other pictures were left out, such as {unread[0]}: only JPEG and PNG are read. Convert them"
            " to PNG, which changes no pixel.",
            style="yellow",
        )


def _weights(segmenter: Segmenter) -> str:
    """Return where the weights come from, as short text."""
    facts = segmenter.facts
    return str(facts.get("origin") or facts.get("checkpoint") or f"weights: {facts.get('weights')}")
