"""The command `predict`: label maps and pictures of images without annotations."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ade_harness.api.predictors import Segmenter, read_image
from ade_harness.cli.answer import Answer
from ade_harness.config.arguments import refuse_idle
from ade_harness.config.compose import compose_config
from ade_harness.config.kinds import Gives, kind_of
from ade_harness.data.containers import MAX_FILE_BYTES
from ade_harness.data.factory import open_classes
from ade_harness.data.labels import NO_CLASS
from ade_harness.data.palettes import is_label_file
from ade_harness.errors import HarnessError, require
from ade_harness.files.atomic import replaced, write_json
from ade_harness.files.documents import read_json
from ade_harness.files.reading import read_regular
from ade_harness.inference.factory import open_network
from ade_harness.models.identity import state_hash
from ade_harness.report.overlays import draw_prediction
from ade_harness.runs.provenance import code_state
from ade_harness.runtime.cluster import resolve_devices
from ade_harness.runtime.console import make_console, print_error, print_fact, print_line
from ade_harness.runtime.notes import EXIT_MESSAGE
from ade_harness.runtime.progress_bar import ProgressReporter

_SUFFIXES = (".jpg", ".jpeg", ".png")
_RECORD = "predictions.json"
_MADE_BY = ("model", "protocol", "state_sha256", "dataset")
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
    paths = [given for given in options.arguments if "=" not in given or Path(given).expanduser().exists()]
    overrides = [given for given in options.arguments if given not in paths]
    require(
        any(override.lstrip("+").startswith("model=") for override in overrides),
        "predict: name a model: predict model=NAME IMAGE_OR_FOLDER. `models` lists them; model=demo, a small network"
        " that comes with the package, is there to try it.",
    )
    output = Path(options.output).expanduser()
    files = list(_images([Path(path).expanduser() for path in paths], output))
    require(bool(files), "predict: name an image or a folder of images: predict model=NAME IMAGE_OR_FOLDER.")
    refuse_idle(overrides, "predict")
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
    file = segmenter.facts.get("sha256")  # of what has no tensors in memory, such as ONNX
    made_by = {
        "model": cfg.model.name, "protocol": cfg.inference.name, "state_sha256": state_hash(segmenter.network),
        "dataset": segmenter.classes.dataset, **({"sha256": str(file)} if file else {}),
    }  # fmt: skip
    _mark_output(output, made_by, segmenter.facts)
    print_fact(console, "model", f"{cfg.model.name}, inference={cfg.inference.name}, {_weights(segmenter)}")
    for mark in _marks(segmenter):
        print_line(console, mark, style="bold yellow")
    failed, constant = _predict_all(segmenter, files, output, cfg.inference.exif)
    print_fact(console, "labels", str(output / "labels"))
    print_fact(console, "pictures", str(output / "pictures"))
    if constant:
        print_line(
            console,
            f"{len(constant)} of {len(files)} files are greyscale PNGs with few constant regions, such as"
            f" {constant[0]}: are they label maps? They were treated as images.",
            style="yellow",
        )
    if failed:
        left = f"\nand {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
        shown = "\n".join(list(failed.values())[:_SHOWN])
        print_error(f"error: {len(failed)} of {len(files)} images failed:\n{shown}{left}")
    content = {**made_by, "output": str(output), "images": [str(file) for file, _ in files if str(file) not in failed]}
    return Answer({**content, "failed": failed}, EXIT_MESSAGE if failed else 0)


def _predict_all(
    segmenter: Segmenter, files: Sequence[tuple[Path, str]], output: Path, exif: bool
) -> tuple[dict[str, str], list[str]]:
    """Return the message of each file that failed, and the files that look like label maps."""
    reporter = ProgressReporter(make_console(result=False), len(files), title="predicting")
    reporter.start()
    failed: dict[str, str] = {}
    constant: list[str] = []
    try:
        for done, (file, name) in enumerate(files, start=1):
            try:
                pixels = _read(file, exif)
                if file.suffix.lower() == ".png" and _is_flat(pixels):
                    constant.append(str(file))
                _write(segmenter, file, pixels, output, name)
            except HarnessError as error:
                failed[str(file)] = str(error)
            reporter.update(done)
    finally:
        reporter.close()
    return failed, constant


def _mark_output(output: Path, made_by: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """Write a record of the model into the folder of its predictions.

    Raises:
        HarnessError: it holds those of another one, or files of which nobody knows, or cannot be written.
    """
    path = output / _RECORD
    there = [output / folder for folder in ("labels", "pictures") if (output / folder).exists()]
    if path.exists():
        before = read_json(path, {**dict.fromkeys(_MADE_BY, str), "sha256?": str})
        keys = [*_MADE_BY, "sha256"]
        other = [f"{k} {before.get(k)}, now {made_by.get(k)}" for k in keys if before.get(k) != made_by.get(k)]
        require(
            not other,
            f"{output}: holds the predictions of another model ({'; '.join(other)}). Name another folder with"
            " --output, or remove this one.",
        )
    elif there:
        raise HarnessError(
            f"{there[0]}: exists already, and no {_RECORD} beside it names its model. Choose another folder"
            " with --output, or remove this one."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"--output {output}: cannot be written ({error.strerror or error}).") from error
    code = {key: value for key, value in code_state().items() if key in ("version", "commit", "dirty")}
    write_json(path, {**made_by, "weights": dict(facts), "code": code})


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
    if facts.get("weights") == "demo":
        marks.append(
            "DEMO: this network was trained on synthetic images only: its predictions on photographs are meaningless"
        )
    if facts.get("weights") == "random":
        marks.append("RANDOM WEIGHTS: the predictions say nothing about the model")
    if facts.get("random_keys"):
        marks.append("RANDOM LAYERS: the predictions say nothing about the model")
    return marks


def _weights(segmenter: Segmenter) -> str:
    """Return where the weights come from, as short text."""
    facts = segmenter.facts
    return str(facts.get("origin") or facts.get("checkpoint") or f"weights: {facts.get('weights')}")


def _read(file: Path, exif: bool) -> npt.NDArray[np.uint8]:
    """Return the pixels of a picture; raises HarnessError for a label map in colours, or what is no picture."""
    require(
        file.suffix.lower() != ".png" or not is_label_file(read_regular(file, MAX_FILE_BYTES)),
        f"{file}: is a label map (a PNG with the palette of a data set), not an image. Name image files only.",
    )
    return read_image(file, exif)[0]


def _is_flat(pixels: npt.NDArray[np.uint8]) -> bool:
    """Whether a picture is grey and nine of ten neighbours are equal: labels are so, hardly any photograph is."""
    grey = pixels[..., :1]
    return bool((pixels == grey).all()) and grey.shape[1] > 1 and bool((grey[:, 1:] == grey[:, :-1]).mean() > 0.9)


def _write(segmenter: Segmenter, file: Path, pixels: npt.NDArray[np.uint8], output: Path, name: str) -> None:
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
