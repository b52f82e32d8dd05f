"""Damaged images, labels, weights, exported models and archives: taken as what they are, or refused in one message."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k import open_ade20k
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.decode import decode_image, decode_labels, read_header
from ade_harness.data.labels import LabelStorage
from ade_harness.endpoint.client import Endpoint
from ade_harness.endpoint.http import Reply
from ade_harness.endpoint.predictor import EndpointPredictor, read_scores
from ade_harness.inference.folder import FolderPredictor
from ade_harness.models.loading import load_model
from tests.hostile.conftest import attack
from tests.hostile.mutations import damaged_bytes
from tests.models.checkpoint.reading import read_state_dict
from tests.models.test_loading import write_onnx

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8))
LABELS = RNG.integers(0, 151, (40, 60)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGES = [
    encoded(PHOTO, "JPEG"), encoded(PHOTO, "JPEG", progressive=True), encoded(PHOTO.convert("L"), "JPEG"),
    encoded(PHOTO.convert("CMYK"), "JPEG"), encoded(PHOTO, "PNG"), encoded(PHOTO.quantize(16), "PNG"),
    encoded(PHOTO.convert("RGBA"), "PNG"),
]  # fmt: skip


@pytest.mark.slow
def test_images(seeds: range) -> None:
    def door(seed: int) -> None:
        data = damaged_bytes(IMAGES[seed % len(IMAGES)], seed)
        assert decode_image(data, "a").dtype == np.uint8

    attack(seeds, door, "image")
    attack(seeds, lambda seed: read_header(damaged_bytes(IMAGES[seed % len(IMAGES)], seed), "a"), "header")


def test_labels(seeds: range) -> None:
    grey = encoded(Image.fromarray(LABELS), "PNG")
    palette = Image.fromarray(LABELS)
    palette.putpalette([v for value in range(256) for v in (value, value, value)])
    files = [(grey, "grey"), (encoded(palette, "PNG"), "grey"), (encoded(palette, "PNG"), "palette_colour"),
             (encoded(Image.fromarray(LABELS.astype(np.uint16)), "PNG"), "uint16"), (encoded(PHOTO, "PNG"), "colour")]  # fmt: skip

    def door(seed: int) -> None:
        data, kind = files[seed % len(files)]
        colors = tuple(ade20k_classes().colors) if kind == "colour" else ()
        found = decode_labels(damaged_bytes(data, seed), "a", LabelStorage(kind, colors))
        if kind != "colour" and found.shape == LABELS.shape:  # its checksums say that nothing of it was changed
            assert np.array_equal(found, LABELS), seed

    attack(seeds, door, "label file")


def test_arrays_of_labels(seeds: range, tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", LABELS.astype(np.int32))
    good = (tmp_path / "good.npy").read_bytes()
    predictor = FolderPredictor(tmp_path, "npy", ade20k_classes())

    def door(seed: int) -> None:
        (tmp_path / "a.npy").write_bytes(damaged_bytes(good[:200] if seed % 2 else good, seed))
        predictor.prepare("a", np.zeros((*LABELS.shape, 3), np.uint8))

    attack(seeds, door, "array")


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_checkpoints(seeds: range, tmp_path: Path, suffix: str) -> None:
    state = nn.Conv2d(3, 4, 3).state_dict()
    path = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif suffix == "safetensors":
        save_file(state, path)
    else:
        import pickle

        path.write_bytes(pickle.dumps({"model": {k: v.numpy() for k, v in state.items()}}))
    good = path.read_bytes()

    def door(seed: int) -> None:
        path.write_bytes(damaged_bytes(good, seed))
        read_state_dict(path)

    attack(seeds, door, suffix)


@pytest.mark.parametrize("kind", ["onnx", "torchscript", "exported"])
def test_exported_models(seeds: range, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"m.{kind}"
    if kind == "onnx":
        write_onnx(path, 5)
    elif kind == "exported":
        path = path.with_suffix(".pt2")
        torch.export.save(torch.export.export(nn.Conv2d(3, 5, 1), (torch.zeros(1, 3, 8, 8),)), path)
    else:
        torch.jit.script(nn.Conv2d(3, 5, 1)).save(str(path))  # type: ignore[no-untyped-call]
    good = path.read_bytes()
    cfg = compose_config([f"model={kind}", f"model.path={path}", "dataset=demo"]).model

    def door(seed: int) -> None:
        path.write_bytes(damaged_bytes(good, seed))
        load_model(cfg)

    # torch leaves the archive of one damaged program in thirty open; the process ends with the message
    attack(seeds, door, kind, len(seeds) // 20 + 2 if kind == "exported" else 2)


def test_zips(seeds: range, tiny_ade: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tiny_ade.rglob("*.*")):
            archive.write(file, file.relative_to(tiny_ade.parent))
    good = path.read_bytes()

    def door(seed: int) -> None:
        path.write_bytes(damaged_bytes(good, seed))
        dataset = open_ade20k(path)
        dataset.read_headers()
        dataset.load(0)

    attack(seeds, door, "zip")


def test_replies_of_endpoints(seeds: range) -> None:
    """A label PNG or scores that a server sends, damaged, of another size, or of another type."""
    cfg = compose_config(["model=http", "model.url=http://127.0.0.1:1", "dataset=demo"])
    predictor = EndpointPredictor(
        cfg.model, ade20k_classes(), Endpoint("http://127.0.0.1:1", 1.0, 0, None), {}, "torch"
    )
    labels = encoded(Image.fromarray(LABELS), "PNG")
    array = io.BytesIO()
    np.save(array, RNG.standard_normal((150, 10, 15)).astype(np.float16))
    scores = array.getvalue()

    def door(seed: int) -> None:
        if seed % 2:
            body = damaged_bytes(labels, seed)
            reply = Reply(200, "OK", {"content-type": "image/png"}, body)
            found = predictor._labels(reply, (40, 60), "a")
            assert found.shape == (40, 60)
        else:
            assert read_scores(damaged_bytes(scores, seed), 150, "a").shape[0] == 150

    attack(seeds, door, "reply")
