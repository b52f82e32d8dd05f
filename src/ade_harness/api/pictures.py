"""Predictions of image files: label maps and pictures in a folder, with a record of the model that made them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ade_harness.api.predictors import Segmenter, read_image
from ade_harness.config.kinds import kind_of
from ade_harness.config.plain import as_dict
from ade_harness.config.schema import Config
from ade_harness.data.containers import MAX_FILE_BYTES
from ade_harness.data.image_files import FOLDERS, RECORD
from ade_harness.data.labels import NO_CLASS
from ade_harness.data.palettes import is_label_file
from ade_harness.errors import HarnessError, require
from ade_harness.files.atomic import replaced, write_json
from ade_harness.files.documents import read_json
from ade_harness.files.reading import read_regular
from ade_harness.models.identity import state_hash
from ade_harness.report.overlays import draw_prediction
from ade_harness.runs.directory import decisive, differences
from ade_harness.runs.provenance import code_state, computing_packages
from ade_harness.runs.record import decided_counts
from ade_harness.runtime.lifetime import directory_kept

_OF_ANNOTATIONS = ("dataset.", "metrics.")
"""Fields that no prediction reads: the names of classes are compared."""
_MADE_BY = ("model", "protocol", "state_sha256", "dataset")


_SHAPE: Any = {**dict.fromkeys(_MADE_BY, str), "sha256?": str, "setup?": dict, "sources?": {"*": str}}


@dataclass
class PredictedFiles:
    """What became of image files."""

    failed: dict[str, str] = field(default_factory=dict)
    """The message of each file that failed."""
    constant: list[str] = field(default_factory=list)
    """Greyscale PNGs with few constant regions: they may be label maps."""


def predict_files(
    segmenter: Segmenter, files: Sequence[tuple[Path, str]], output: Path, exif: bool, on_done: Callable[[int], None]
) -> PredictedFiles:
    """Write ``labels/NAME.png`` and ``pictures/NAME.png`` of every image.

    Args:
        segmenter: the model.
        files: images with the name of what is written, as :func:`ade_harness.data.image_files.find_images` yields them.
        output: an existing folder.
        exif: whether images are turned as their EXIF orientation says.
        on_done: called with the number of images that are done, failed ones too.
    """
    found = PredictedFiles()
    for done, (file, name) in enumerate(files, start=1):
        try:
            pixels = _read(file, exif)
            if file.suffix.lower() == ".png" and _is_flat(pixels):
                found.constant.append(str(file))
            with directory_kept():
                _write(segmenter, file, pixels, output.absolute(), name)
        except HarnessError as error:
            found.failed[str(file)] = str(error)
            for folder in FOLDERS:  # of what the file was before: it must not be taken for the present one's
                (output / folder / f"{name}.png").unlink(missing_ok=True)
        on_done(done)
    failed = {name for file, name in files if str(file) in found.failed}
    if failed:
        _forget(output, failed)
    return found


def _forget(output: Path, names: Collection[str]) -> None:
    """Take images that failed out of the record: nothing of them is there."""
    content = read_json(output / RECORD, dict)
    content["sources"] = {name: file for name, file in content.get("sources", {}).items() if name not in names}
    write_json(output / RECORD, content)


def describe_model(segmenter: Segmenter, cfg: Config) -> dict[str, Any]:
    """Return what identifies the model and protocol behind predictions.

    Args:
        segmenter: the model, before its first prediction.
        cfg: its configuration, all of which that decides labels stands under ``setup``.
    """
    facts = segmenter.facts
    file = facts.get("sha256")  # of what has no tensors in memory, such as ONNX
    names = list(segmenter.classes.names)
    setup = decisive({key: v for key, v in decided_counts(as_dict(cfg)).items() if not key.startswith(_OF_ANNOTATIONS)})
    also = {f"files.{name}": digest for name, digest in facts.get("files", {}).items()}
    also |= {name: facts[name] for name in ("source", "config_sha256", "pixels_sha256") if facts.get(name) is not None}
    return {
        "model": cfg.model.name, "protocol": cfg.inference.name,
        "state_sha256": state_hash(segmenter.network, kind_of(cfg.model.kind).is_code),
        "dataset": segmenter.classes.dataset, **({"sha256": str(file)} if file else {}),
        "setup": {**setup, **also, "classes": names, **computing_packages(), "torch": torch.__version__},
    }  # fmt: skip


def open_output(
    output: Path, made_by: Mapping[str, Any], facts: Mapping[str, Any], files: Sequence[tuple[Path, str]] = ()
) -> None:
    """Write a record of the model into the folder of its predictions.

    Args:
        output: the folder.
        made_by: as :func:`describe_model` says it.
        facts: of the weights.
        files: images with the name of what is written, as :func:`ade_harness.data.image_files.find_images` yields them.

    Raises:
        HarnessError: it holds predictions of another model, or of another image of the same name, or files of which
            nobody knows; or it cannot be written.
    """
    path, sources = output / RECORD, {}
    there = [output / folder for folder in FOLDERS if (output / folder).exists()]
    if path.exists():
        before = read_json(path, _SHAPE)
        then, now = ({k: made.get(k) for k in (*_MADE_BY, "sha256")} for made in (before, made_by))
        if "setup" in before:  # earlier versions did not write it
            then, now = {**then, **before["setup"]}, {**now, **made_by["setup"]}
            then.pop("dataset"), now.pop("dataset")  # a name; its classes are compared
        other = differences(then, now)[:8]
        sources = before.get("sources", {})
        require(
            not other,
            f"{output}: holds the predictions of another model or setup ({'; '.join(other)}). Name another folder with"
            " --output, or remove this one.",
        )
    elif there:
        raise HarnessError(
            f"{there[0]}: exists already, and no {RECORD} beside it names its model. Choose another folder"
            " with --output, or remove this one."
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"--output {output}: cannot be written ({error.strerror or error}).") from error
    new = {name: str(file.absolute()) for file, name in files}
    other_file = next((name for name, file in new.items() if sources.get(name, file) != file), None)
    require(
        other_file is None,
        f"{new.get(other_file or '')}: {output} holds the prediction of {sources.get(other_file or '')} under the same"
        " name. Name another folder with --output.",
    )
    code = {key: value for key, value in code_state().items() if key in ("version", "commit", "dirty")}
    write_json(path, {**made_by, "weights": dict(facts), "code": code, "sources": sources | new})


def prediction_marks(segmenter: Segmenter) -> list[str]:
    """Return what predictions must not be taken for."""
    facts = segmenter.facts
    marks = []
    if facts.get("weights") == "demo":
        marks.append(
            "DEMO: this network was trained on synthetic images only: its predictions on photographs are meaningless"
        )
    if facts.get("weights") == "random":
        marks.append("RANDOM WEIGHTS: not the predictions of a trained model")
    if facts.get("random_keys"):
        marks.append("RANDOM LAYERS: not the predictions of a trained model")
    return marks


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
