"""The same bits for any number of ranks, both ways to share the work, every batch setting, and after a kill."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from ade_harness.runtime.cluster import free_port

IMAGES = 14
PROTOCOL = ("inference=mmseg_whole_512", "inference.resize.side=64", "inference.resize.max_side=96")
OVERRIDES = (
    *PROTOCOL, f"dataset.limit={IMAGES}", "tracking=none", "runtime.accelerator=cpu", "runtime.workers=0",
    "run.overlays=0",
)  # fmt: skip
BATCHES = {"one": (), "views": ("inference.tta.flip=true", "inference.batch=4"), "images": ("inference.images=3",)}

Run = Callable[..., list[int]]


@pytest.fixture(scope="module")
def run(cache: Path) -> Iterator[Run]:
    """Run a command on some ranks; returns their exit codes."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forked_ranks.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def send(
        folder: Path, ranks: int, *overrides: str, kill: tuple[int, int] | None = None,
        overrides_of: list[list[str]] | None = None,
    ) -> list[int]:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        job = {
            "overrides": [*OVERRIDES, *overrides], "ranks": ranks, "cwd": str(folder), "port": free_port(), "kill": kill,
            "overrides_of": overrides_of,
        }  # fmt: skip
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield send
    process.stdin.close()
    process.wait(timeout=30)


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("rank*.log")))


def table(run_dir: Path) -> pd.DataFrame:
    return pd.read_parquet(run_dir / "ledger").sort_values("image_id").reset_index(drop=True)


def assert_same(folder: Path, expected: Path) -> None:
    found, first = table(folder / "run"), table(expected / "run")
    assert found.image_id.tolist() == first.image_id.tolist()  # each once
    assert found.label_hash.tolist() == first.label_hash.tolist()  # every pixel of every image
    matrices = [np.load(path / "run/confusion_matrix.npy") for path in (folder, expected)]
    assert np.array_equal(*matrices)


@pytest.fixture(scope="module")
def reference(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One rank, for each batch setting."""
    folders = {name: tmp_path_factory.mktemp(name) for name in BATCHES}
    for name, folder in folders.items():
        assert run(folder, 1, *BATCHES[name], "run.dir=run") == [0], logs(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "sharding", "ranks"), list(itertools.product(BATCHES, ("queue", "static"), (2, 3, 4)))
)
def test_same_bits(run: Run, reference: dict[str, Path], tmp_path: Path, batch: str, sharding: str, ranks: int) -> None:
    overrides = (*BATCHES[batch], f"runtime.sharding={sharding}", "run.dir=run")
    assert run(tmp_path, ranks, *overrides) == [0] * ranks, logs(tmp_path)
    assert_same(tmp_path, reference[batch])


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "sharding"), list(itertools.product(BATCHES, ("queue", "static"))))
def test_same_bits_after_a_kill(
    run: Run, reference: dict[str, Path], tmp_path: Path, batch: str, sharding: str
) -> None:
    """A rank is killed in the middle; the others notice by themselves, and another number of ranks goes on."""
    overrides = (*BATCHES[batch], f"runtime.sharding={sharding}", "run.dir=run")
    victim = {"one": 0, "views": 1, "images": 2}[batch]
    codes = run(tmp_path, 3, *overrides, "runtime.dead_after_s=5", kill=(victim, 1))
    assert codes[victim] == -9
    assert {code for rank, code in enumerate(codes) if rank != victim} == {76}, logs(tmp_path)
    kept = len(table(tmp_path / "run"))
    assert 0 < kept <= IMAGES  # others may empty the queue before they notice
    assert not (tmp_path / "run/metrics.json").exists()
    assert run(tmp_path, 2, *overrides) == [0, 0], logs(tmp_path)
    assert f"continuing: {kept} images are done" in logs(tmp_path)
    assert_same(tmp_path, reference[batch])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_more_ranks_than_images_are_left(run: Run, reference: dict[str, Path], tmp_path: Path, workers: int) -> None:
    overrides = ("run.dir=run", f"runtime.workers={workers}")
    assert run(tmp_path, 3, *overrides, "runtime.sharding=static") == [0, 0, 0], logs(tmp_path)  # each has done some
    sorted((tmp_path / "run/ledger").glob("*.parquet"))[0].unlink()
    left = IMAGES - len(table(tmp_path / "run"))
    assert run(tmp_path, left + 3, *overrides) == [0] * (left + 3), logs(tmp_path)
    assert_same(tmp_path, reference["one"])
    assert run(tmp_path, 2, *overrides) == [0, 0], logs(tmp_path)  # nothing is left at all
    assert_same(tmp_path, reference["one"])


# ranks that see different things


@pytest.mark.slow
def test_nodes_with_different_data_or_weights_are_refused(run: Run, tmp_path: Path, tiny_ade: Path) -> None:
    other = tmp_path / "other" / tiny_ade.name
    shutil.copytree(tiny_ade, other)
    overrides = (
        "model=predictions",
        f"model.path={tiny_ade}/annotations/validation",
        "dataset=ade20k",
        "dataset.limit=7",
    )
    roots = [[f"dataset.root={tiny_ade}"], [f"dataset.root={other}"]]
    assert run(tmp_path / "same", 2, *overrides, overrides_of=roots) == [0, 0], logs(tmp_path / "same")
    image = other / "images/validation/ADE_val_00001003.jpg"
    content = image.read_bytes()
    image.write_bytes(content + b"x")
    assert run(tmp_path / "size", 2, *overrides, overrides_of=roots) == [2, 2]
    text = logs(tmp_path / "size")
    assert "rank 1 on " in text
    assert " differs from rank 0 on " in text
    assert "the data set's names and sizes (sha256) is" in text
    image.unlink()
    (other / "annotations/validation/ADE_val_00001003.png").unlink()
    assert run(tmp_path / "ids", 2, *overrides, overrides_of=roots) == [2, 2]
    assert "the image ids (sha256) is" in logs(tmp_path / "ids")
    shutil.rmtree(other)
    assert run(tmp_path / "none", 2, *overrides, overrides_of=roots) == [2, 2]
    assert f"{other}: no such folder or zip" in logs(tmp_path / "none")
    assert "Traceback" not in logs(tmp_path / "none") + text


@pytest.mark.slow
def test_ranks_with_different_checkpoints_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\nclass Net(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, 150, 4, 4)\n"
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(torch.nn.Conv2d(3, 150, 4, 4).state_dict(), tmp_path / f"{seed}.safetensors")
    overrides = ("model=custom", "model._target_=net.Net", *PROTOCOL)
    own = [[f"model.checkpoint={seed}.safetensors"] for seed in (0, 1)]
    assert run(tmp_path, 2, *overrides, overrides_of=own) == [2, 2]
    assert "the checkpoint (sha256) is" in logs(tmp_path)
