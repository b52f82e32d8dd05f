"""Fixtures: small data sets in the official layout, and the real command line."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ade_harness.runtime.lazy_imports import import_lightning
from tests.faster_hydra import faster
from tests.warm import WarmPopen, stop_server

REPOSITORY = Path(__file__).parents[1]
os.environ["WANDB_SILENT"] = "true"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
for _key in ("WANDB_API_KEY", "ADE20K_ROOT"):
    os.environ.pop(_key, None)
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # more workers than cores: threads of one operation would wait for each other, spinning (half of all CPU time)
    torch.set_num_threads(1)
# What nohup, CI runners and shells in the background leave to their children is not what a user's terminal leaves.
for _signal in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, signal.default_int_handler if _signal == signal.SIGINT else signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
faster()
import_lightning()  # as a command does, before a test module imports it


def pytest_configure() -> None:
    """Let a test worker that ends itself say where: pytest only sees that it is gone, and has captured its words."""
    worker, stderr, leave = os.getpid(), os.dup(2), os._exit  # pytest captures the file descriptor later

    def exit_aloud(code: int) -> None:
        if os.getpid() == worker:  # forked children end so as a rule
            os.write(stderr, f"os._exit({code}) in a test worker:\n{''.join(traceback.format_stack())}".encode())
        leave(code)

    os._exit = exit_aloud  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """Let collections leave out what was imported, and come more rarely: a sixth of the time of what composes much."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: at the end both workers have small ones left."""
    for item in items:
        # a command in a process of its own takes seconds for its imports, a whole run of the demo takes more
        if not {"cli", "cold_cli", "demo"}.isdisjoint(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    for item in items:
        limit = item.get_closest_marker("timeout")
        if limit is not None and limit.args and limit.args[0] >= 900:  # one program of minutes for all its tests
            slow[item.path] = 1000
    items.sort(key=lambda item: -slow[item.path])  # stable: files stay together in their own order


@dataclass
class Done:
    """What a finished command left."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep synthetic data and downloads out of the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["ADE_HARNESS_CACHE"] = str(folder)
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    os.environ["HF_HOME"] = str(folder / "hub")
    yield folder
    stop_server()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave the number of threads as it was: commands set it, and it can change the last bits of sums."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    """Leave torch's switch of determinism as it was: the probe's training sets it, and it is the whole process's.

    Under it torchmetrics counts labels by a comparison of each pixel with each of 150 x 150 numbers: 60 GB an image.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Leave the root logger as it was: Hydra gives it a handler of the captured stream, which is closed afterwards."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def _runner(folder: Path, popen: type[subprocess.Popen[str]]) -> Callable[..., Done]:
    def run(*arguments: object, timeout: float = 240, **environment: str) -> Done:
        with popen(
            [sys.executable, "-m", "ade_harness", *map(str, arguments)],
            cwd=folder, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        return Done(process.returncode, out, err)

    return run


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Done]:
    """Run ``python -m ade_harness`` in `tmp_path`, in processes that have imported everything (tests/warm.py)."""
    return _runner(tmp_path, WarmPopen)


@pytest.fixture
def cold_cli(tmp_path: Path) -> Callable[..., Done]:
    """Run ``python -m ade_harness`` in `tmp_path`, started as a user starts it."""
    return _runner(tmp_path, subprocess.Popen)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command in this process (fast; one rank only)."""
    from ade_harness.cli.main import main

    def run(*arguments: object) -> Done:
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return run


def write_pair(root: Path, name: str, image: np.ndarray, annotation: np.ndarray) -> None:
    """Write one pair in the official layout."""
    for kind in ("images", "annotations"):
        (root / kind / "validation").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "images/validation" / f"{name}.jpg", quality=95)
    Image.fromarray(annotation).save(root / "annotations/validation" / f"{name}.png")


@pytest.fixture
def tiny_ade(tmp_path: Path) -> Path:
    """Make ADEChallengeData2016 with 7 small images of different sizes, under ids of the official set."""
    root = tmp_path / "ADEChallengeData2016"
    rng = np.random.default_rng(7)
    for index in range(7):
        height, width = 24 + 5 * index, 40 - 3 * index
        annotation = rng.integers(0, 151, (height // 4 + 1, width // 4 + 1)).astype(np.uint8)
        annotation = annotation.repeat(4, 0).repeat(4, 1)[:height, :width]
        image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        write_pair(root, f"ADE_val_{1000 + index:08d}", image, annotation)
    return root


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hostile", type=int, default=40, help="attacks of each kind in tests/hostile")
