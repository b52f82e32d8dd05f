"""Well-formed files that say what cannot be: taken as what they are, or refused in one message."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k import open_ade20k
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.decode import decode_image, decode_labels, read_header
from ade_harness.data.labels import LabelStorage
from ade_harness.endpoint.client import Endpoint
from ade_harness.endpoint.predictor import EndpointPredictor, read_scores
from ade_harness.endpoint.service import make_server, open_service
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import extract
from ade_harness.inference.folder import FolderPredictor
from ade_harness.models.checkpoint.convert import convert
from ade_harness.models.checkpoint.parts import Choice
from tests.hostile import grammars
from tests.hostile.conftest import attack
from tests.hostile.test_documents import command
from tests.models.checkpoint.reading import read_state_dict

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (40, 60, 3)).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.slow
def test_pngs(seeds: range) -> None:
    def image(seed: int) -> None:
        data = grammars.png(seed)
        assert decode_image(data, "a").dtype == np.uint8
        assert read_header(data, "a")

    def labels(seed: int) -> None:
        kind = ("grey", "palette_index", "palette_colour", "uint16", "colour")[seed % 5]
        colors = tuple(ade20k_classes().colors) if kind.endswith("colour") else ()
        found = decode_labels(grammars.png(seed), "a", LabelStorage(kind, colors))
        assert found.dtype == np.uint8
        assert found.ndim == 2

    attack(seeds, image, "PNG of an image")
    attack(seeds, labels, "PNG of labels")


def test_jpegs(seeds: range) -> None:
    good = [encoded(PHOTO, "JPEG"), encoded(PHOTO, "JPEG", progressive=True), encoded(PHOTO.convert("L"), "JPEG")]

    def door(seed: int) -> None:
        data = grammars.jpeg(seed, good[seed % len(good)])
        height, width, _ = decode_image(data, "a").shape
        assert read_header(data, "a") == (height, width)

    attack(seeds, door, "JPEG")


def test_arrays(seeds: range, tmp_path: Path) -> None:
    predictor = FolderPredictor(tmp_path, "npy", ade20k_classes())

    def door(seed: int) -> None:
        (tmp_path / "a.npy").write_bytes(grammars.npy(seed))
        predictor.prepare("a", np.zeros((40, 60, 3), np.uint8))

    attack(seeds, door, "array of labels")
    attack(seeds, lambda seed: read_scores(grammars.npy(seed), 150, "a"), "array of scores")


@pytest.mark.slow
def test_archives(seeds: range, tiny_ade: Path, tmp_path: Path) -> None:
    files = {str(f.relative_to(tiny_ade.parent)): f.read_bytes() for f in sorted(tiny_ade.rglob("*.*"))}
    path, outside = tmp_path / "a.zip", set(tmp_path.iterdir())

    def reading(seed: int) -> None:
        path.write_bytes(grammars.archive(seed, files))
        dataset = open_ade20k(path)
        dataset.read_headers()
        dataset.load(0)

    def extracting(seed: int) -> None:
        path.write_bytes(grammars.archive(seed, files))
        extract(path, tmp_path / "extracted")

    attack(seeds, reading, "zip that is read in place")
    attack(seeds, extracting, "zip that is extracted")
    assert set(tmp_path.iterdir()) <= {*outside, path, tmp_path / "extracted"}
    assert not [p for p in (tmp_path / "extracted").rglob("*") if p.is_symlink()]


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
def test_weights(seeds: range, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pth'}"

    def reading(seed: int) -> None:
        path.write_bytes(grammars.safetensors(seed) if kind == "safetensors" else grammars.pickled(seed))
        for value in read_state_dict(path).values():
            assert isinstance(value, torch.Tensor)

    def converting(seed: int) -> None:
        path.write_bytes(grammars.pickled(seed))
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
        convert(path, tmp_path / "out.safetensors", Choice())

    attack(seeds, reading, kind)
    if kind == "pickle":
        attack(seeds, converting, "pickle that is converted")
    assert {p.name for p in tmp_path.iterdir()} <= {path.name, "out.safetensors"}  # nothing that it names was called


GROUPS = ("model", "dataset", "inference", "runtime", "run", "metrics", "tracking")


def keys() -> tuple[str, ...]:
    cfg = compose_config(["dataset=demo"])
    return tuple(f"{group}.{name}" for group in GROUPS for name in vars(getattr(cfg, group)))


@pytest.mark.slow
def test_overrides(seeds: range) -> None:
    known = keys()
    attack(seeds, lambda seed: compose_config([grammars.override(seed, known)]), "override")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["model", "dataset", "inference"])
def test_configuration_files_of_the_user(seeds: range, group: str, tmp_path: Path) -> None:
    (tmp_path / group).mkdir()
    names = tuple(vars(getattr(compose_config(["dataset=demo"]), group)))

    def door(seed: int) -> None:
        text = grammars.yaml_text(seed, names)
        (tmp_path / group / "mine.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        compose_config([f"{group}=mine", *(["dataset=demo"] if group != "dataset" else [])], extra=tmp_path)

    attack(seeds, door, f"{group} of the user")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ade_harness.cli.main import main
    from tests.cli.test_cli import FAST

    folder = tmp_path_factory.mktemp("good")
    assert main([*FAST, "dataset.images=2", f"run.dir={folder / 'run'}"]) == 0
    return folder / "run"


PROGRESS = {
    "done": 1, "images": 2, "images_per_second": 1.5, "seconds_left": 3.0, "updated": "2026-01-01T00:00:00+00:00", "warnings": ["slow"],
    "ranks": [{"rank": 0, "host": "a", "done": 1, "images_per_second": 1.5, "item": "ADE_val_00000001"}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["progress.json", ".lock", "tracking.json", "config.yaml", "submission.yaml"])
def test_files_beside_a_run(
    seeds: range, name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is not finished, its lock, what W&B was told of it, and what a bundle says of itself."""
    import shutil

    from tests.hostile.mutations import changed_document, damaged_bytes

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bundle" / "run"
    shutil.copytree(run, folder)
    if name in ("progress.json", ".lock"):
        (folder / "metrics.json").unlink()
    path = folder.parent / name if name == "submission.yaml" else folder / name
    good = {
        "progress.json": PROGRESS, ".lock": {"host": "a", "pid": 7, "started": 1.0, "command": ["x"]}, "tracking.json": {"id": "a" * 8, "name": "x"},
        "submission.yaml": {"schema": 1, "system": "s", "files": {"a": "b"}, "results": [{"metric": "mIoU", "value": 1.0}]},
    }.get(name)  # fmt: skip

    def door(seed: int) -> None:
        if name.endswith(".yaml") and seed % 2:
            text = grammars.yaml_text(seed, tuple(GROUPS) if good is None else tuple(good))
        elif good is None:
            text = yaml.safe_dump(changed_document(yaml.safe_load((run / name).read_text()), seed))
        else:
            text = json.dumps(changed_document(good, seed))
        data = text.encode("utf-8", "surrogatepass")
        path.write_bytes(damaged_bytes(data, seed) if seed % 5 == 0 else data)
        if name == "submission.yaml":
            command("submit", "--check", folder.parent)
        else:
            command("status", folder)

    attack(seeds, door, name)
    assert {p.name for p in tmp_path.iterdir()} == {"bundle"}


@pytest.fixture
def sender() -> Iterator[tuple[str, list[bytes]]]:
    """Yield the address of a server that sends the one item of a list, whatever it is asked, and closes."""
    item: list[bytes] = [b""]
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                try:
                    connection.recv(1 << 16)
                    connection.sendall(item[0])
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass  # a reset would take away what was sent
                except OSError:
                    pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", item
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def test_replies(seeds: range, sender: tuple[str, list[bytes]]) -> None:
    url, item = sender
    cfg = compose_config(["model=http", f"model.url={url}", "dataset=demo"])
    endpoint = Endpoint(url, 1.0, 0, None)
    predictor = EndpointPredictor(cfg.model, ade20k_classes(), endpoint, {}, "torch")
    labels = encoded(Image.fromarray(RNG.integers(0, 151, (40, 60)).astype(np.uint8)), "PNG")

    def door(seed: int) -> None:
        item[0] = grammars.reply(seed, labels, "image/png")
        found = endpoint.ask("POST", "predict", "a", {}, b"x", 1 << 20)
        predictor._labels(found, (40, 60), "a")

    attack(seeds, door, "HTTP reply")


@pytest.mark.slow
def test_the_grammars_are_wide() -> None:
    """Some of each are good, some are not: a grammar that makes only garbage would test the first line of a reader."""
    made: dict[str, Any] = {
        "png": lambda seed: decode_image(grammars.png(seed), "a"),
        "jpeg": lambda seed: decode_image(grammars.jpeg(seed, encoded(PHOTO, "JPEG")), "a"),
        "npy": lambda seed: read_scores(grammars.npy(seed), 150, "a"),
        "override": lambda seed, known=keys(): compose_config([grammars.override(seed, known)]),  # noqa: B008
    }
    for name, door in made.items():
        taken = 0
        for seed in itertools.islice(itertools.count(), 60):
            try:
                door(seed)
            except HarnessError:
                continue
            taken += 1
        assert 0 < taken < 60, name


def replies_of(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Yield status, type and body of each reply in what a server has sent; fails on what is no whole reply."""
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        assert first.startswith("HTTP/1.1 "), first
        headers = dict(line.split(": ", 1) for line in lines)
        if first.startswith("HTTP/1.1 100"):
            data = rest
            continue
        length = int(headers["Content-Length"])
        assert len(rest) >= length
        yield int(first.split()[1]), headers["Content-Type"], rest[:length]
        data = rest[length:]


def test_requests(seeds: range, capfd: pytest.CaptureFixture[str]) -> None:
    """Every request that is answered has a whole answer, each error in JSON, and the server goes on."""
    service = open_service(compose_config(["model=demo", "runtime.accelerator=cpu"]))
    server = make_server(service)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    image = encoded(PHOTO, "PNG")
    statuses: set[int] = set()

    def door(seed: int) -> None:
        with socket.create_connection(server.server_address[:2], timeout=15) as connection:
            with contextlib.suppress(OSError):  # the server may have hung up
                connection.sendall(grammars.request(seed, image))
                connection.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 16):
                    received += part
        for status, kind, body in replies_of(received):
            statuses.add(status)
            assert status != 500
            if status >= 400:
                assert kind == "application/json"
                assert b"\x1b" not in body
                assert json.loads(body)["error"]

    try:
        attack(seeds, door, "request", most_left=20)
        with socket.create_connection(server.server_address[:2], timeout=15) as connection:
            connection.sendall(b"GET /info HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        service.forward.shutdown()
    assert {200, 400, 404} <= statuses
    assert "serve: " not in capfd.readouterr().err
