"""`ade_harness.evaluate`: the numbers of the command line, and a process that is as it was."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

import ade_harness as ade
from ade_harness.data.labels import NO_CLASS
from ade_harness.errors import HarnessError
from tests.api.networks import Breaks, Colours, Remembers
from tests.conftest import Done

OF_IMPORTS = (
    "PYTEST_CURRENT_TEST", "LD_LIBRARY_PATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
"""Variables that OpenCV, Lightning and torch set when they are imported."""
SMALL = {"dataset.images": 5, "metrics.resamples": 1000}


def state_of(network: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return what an evaluation has to leave alone."""
    modules = list(network.modules()) if network is not None else []
    parameters = list(network.parameters()) if network is not None else []
    return {
        "modes": [module.training for module in modules],
        "gradients": [p.requires_grad for p in parameters],
        "values": [p.detach().clone().numpy().tobytes() for p in parameters],
        "layout": [p.stride() for p in parameters],
        "device": [p.device for p in parameters],
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "threads": torch.get_num_threads(),
        "switches": (
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.is_grad_enabled(),
        ),
        "cwd": Path.cwd(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "environment": {k: v for k, v in os.environ.items() if k not in OF_IMPORTS},
        "hydra": (GlobalHydra.instance().hydra, ConfigStore.instance().repo),
        "alive": threading.active_count(),
    }  # fmt: skip


@pytest.fixture
def odd_state() -> Any:
    """Have every switch as no evaluation wants it."""
    backends = torch.backends
    before = backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32
    backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32 = False, True, True
    matmul, backends.cuda.matmul.allow_tf32 = backends.cuda.matmul.allow_tf32, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    GlobalHydra.instance().hydra = marker = object()  # the caller is a Hydra application
    yield
    assert GlobalHydra.instance().hydra is marker
    GlobalHydra.instance().hydra = None
    torch.use_deterministic_algorithms(False)
    backends.cudnn.deterministic, backends.cudnn.benchmark, backends.cudnn.allow_tf32 = before
    backends.cuda.matmul.allow_tf32 = matmul


@pytest.mark.usefixtures("odd_state")
def test_the_process_and_the_network_are_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    network = Colours()
    network.norm.eval()  # frozen statistics, in a network that trains
    network.layer.bias.requires_grad_(False)
    torch.rand(3), np.random.rand(3), random.random()
    before = state_of(network)
    result = ade.evaluate(network, dataset="demo", options={**SMALL, "inference.channels_last": True})
    assert state_of(network) == before
    assert capfd.readouterr() == ("", "")  # quiet unless asked
    assert result.images == 5
    broken = Breaks()
    before = state_of(broken)
    with pytest.raises(HarnessError, match=r"ADE_val_\d+: the model failed .*no such layer"):
        ade.evaluate(broken, dataset="demo", options=SMALL, progress=True)
    assert state_of(broken) == before


@pytest.mark.parametrize("kind", [Colours, Remembers])
def test_training_goes_on(kind: type[Colours]) -> None:
    """Nothing that the network keeps is an inference tensor, and nothing has lost its gradient."""
    network = kind()
    ade.evaluate(network, dataset="demo", options=SMALL, limit=2)
    network(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.fixture
def data(tiny_ade: Path, tmp_path: Path) -> Path:
    shutil.copy(Path(__file__).with_name("networks.py"), tmp_path / "networks.py")
    return tiny_ade


def test_a_network_in_memory_has_the_numbers_of_the_command_line(
    call: Callable[..., Done], data: Path, tmp_path: Path
) -> None:
    words = ("model=custom", "model._target_=networks.Colours", "dataset=ade20k", f"dataset.root={data}")
    done = call(*words, "inference=original_size", "tracking=none", "run.dir=run", "runtime.workers=0")
    assert done.code == 0, done.err
    run = ade.load_run(tmp_path / "run")
    network = Colours(seed=0)
    with torch.random.fork_rng(devices=[]):  # what the command line's seed makes of it
        torch.manual_seed(0)
        network = Colours()
    result = ade.evaluate(network, root=data, protocol="original_size")
    assert [row.label_hash for row in result.rows] == [row.label_hash for row in run.rows]
    assert np.array_equal(result.matrix, run.matrix)
    assert result.scores == run.scores
    assert result.interval == run.interval
    assert result.marks == run.marks
    frame = result.per_class
    assert frame.loc[0, "name"] == "wall"
    assert frame.intersection_pixels.sum() == np.trace(result.matrix[:, :-1])
    assert len(result.per_image) == 7
    named = ade.evaluate("demo", dataset="demo", options=SMALL)
    assert call("dataset.images=5", "metrics.resamples=1000", "tracking=none", "run.dir=named").code == 0
    assert named.to_dict() == ade.load_run(tmp_path / "named").to_dict()


def test_a_function_of_an_image(tiny_ade: Path) -> None:
    from PIL import Image

    from ade_harness.data.decode import decode_image

    folder = tiny_ade / "annotations/validation"
    truth = {}
    for path in sorted((tiny_ade / "images/validation").iterdir()):
        labels = np.asarray(Image.open(folder / f"{path.stem}.png")).astype(np.int64) - 1
        truth[decode_image(path.read_bytes(), path.name).tobytes()] = np.where(labels < 0, NO_CLASS, labels)

    def oracle(image: np.ndarray) -> np.ndarray:
        return truth[image.tobytes()]

    result = ade.evaluate(oracle, root=tiny_ade, workers=0)
    assert result.mIoU == 1.0
    assert "oracle" in result.label
    assert ade.evaluate(lambda image: torch.from_numpy(oracle(image)), root=tiny_ade).mIoU == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: image, r"returned uint8 \[\d+, \d+, 3\], expected integers"),
        (lambda image: image[..., 0] / 255, "returned float64"),
        (lambda image: np.full(image.shape[:2], 150), r"returned the label 150, expected 0 to 149, and 255"),
        (lambda image: np.full(image.shape[:2], -1), "returned the label -1"),
        (lambda image: 1 // 0, "the function failed .ZeroDivisionError"),
    ],
)
def test_what_a_function_may_not_return(function: Any, message: str) -> None:
    with pytest.raises(HarnessError, match=rf"ADE_val_00000001: .*{message}"):
        ade.evaluate(function, dataset="demo", options=SMALL)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Colours, {}, r"model is a type \(Colours\): pass an object of it"),
        (3, {}, "model is a int; expected an nn.Module"),
        ("segformer_b9", {}, "'segformer_b9': no such system, file or folder. Did you mean 'segformer_b"),
        (Colours(), {"checkpoint": "x.pth"}, "checkpoint: load it into the network before"),
        (Colours(), {"protocol": "slide"}, "inference=slide: unknown value"),
        (Colours(), {"options": {"inference.bach": 2}}, "inference.bach: no such option. Did you mean 'inference.batch'"),
        (Colours(), {"device": "gpu"}, "device='gpu'"),
        (Colours(), {"devices": 2, "device": "cuda:1"}, "device=cuda:1: with devices=2 each rank has its own"),
        (lambda image: image, {"devices": 2}, "devices=2: ranks are other processes, which cannot import this function"),
        (Colours(7), {}, "class map|channels"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_mistakes(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        ade.evaluate(model, **{"dataset": "demo", "options": SMALL, **options})


def test_a_network_on_no_device_is_named() -> None:
    with torch.device("meta"):
        network = torch.nn.Conv2d(3, 150, 1)
    with pytest.raises(HarnessError, match="weights are on meta"):
        ade.evaluate(network, dataset="demo", options=SMALL)


def test_evaluations_in_threads_do_not_disturb_each_other() -> None:
    network, other = Colours(), Colours(seed=1)
    expected = [ade.evaluate(n, dataset="demo", options=SMALL).to_dict() for n in (network, other)]
    before = state_of(network)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(ade.evaluate, n, dataset="demo", options=SMALL) for n in (network, other, network, other)]
        found = [job.result().to_dict() for job in jobs]
    assert found == [*expected, *expected]
    assert state_of(network) == before


def test_switches_that_do_not_fit_each_other_are_refused() -> None:
    inside, done = threading.Event(), threading.Event()

    def slow(image: np.ndarray) -> np.ndarray:
        inside.set()
        assert done.wait(60)
        return image[..., 0] % 150

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ade.evaluate, slow, dataset="demo", options=SMALL)
        assert inside.wait(60)
        with pytest.raises(HarnessError, match="another evaluation is under way in this process"):
            ade.evaluate(Colours(), dataset="demo", options={**SMALL, "inference.precision": "tf32"})
        done.set()
        assert job.result().images == 5
    ade.evaluate(Colours(), dataset="demo", options={**SMALL, "inference.precision": "tf32"})


def test_a_run_directory_where_it_is_asked_for(call: Callable[..., Done], tmp_path: Path) -> None:
    network = Colours()
    first = ade.evaluate(network, dataset="demo", options=SMALL, run_dir=tmp_path / "mine")
    again = ade.load_run(tmp_path / "mine")
    assert again.to_dict() == first.to_dict()
    assert [row.label_hash for row in again.rows] == [row.label_hash for row in first.rows]
    assert call("report", "mine").code == 0
    assert "finished" in call("status", "mine").out
    with pytest.raises(HarnessError, match="holds a run already"):
        ade.evaluate(network, dataset="demo", options=SMALL, run_dir=tmp_path / "mine")
    with pytest.raises(HarnessError, match="no such layer"):
        ade.evaluate(Breaks(), dataset="demo", options=SMALL, run_dir=tmp_path / "broken")
    assert json.loads((tmp_path / "broken/manifest.json").read_text())["status"] == "incomplete"
    assert "incomplete" in call("status", "broken").out
    done = call("resume", "mine")
    assert done.code == 2
    assert "Traceback" not in done.err
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.slow
def test_ranks_of_a_network_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Colours()
    one = ade.evaluate(network, dataset="demo", options=SMALL)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a training that this process is a rank of
    two = ade.evaluate(network, dataset="demo", options=SMALL, devices=2, device="cpu", workers=0)
    assert np.array_equal(one.matrix, two.matrix)
    assert {row.rank for row in two.rows} == {0, 1}
    assert one.scores == two.scores
    assert two.run_dir is None
    monkeypatch.setattr(Breaks, "__module__", "__main__")
    with pytest.raises(HarnessError, match="cannot import this Breaks of __main__"):
        ade.evaluate(Breaks(), dataset="demo", devices=2)
    monkeypatch.undo()
    with pytest.raises(HarnessError, match="no such layer"):
        ade.evaluate(Breaks(), dataset="demo", options=SMALL, devices=2, device="cpu", workers=0)
    network.hook = lambda: None  # type: ignore[assignment]
    with pytest.raises(HarnessError, match="this Colours cannot be pickled"):
        ade.evaluate(network, dataset="demo", devices=2)


def test_what_is_shown() -> None:
    result = ade.evaluate("demo", dataset="demo", options=SMALL)
    text, line, page = str(result), repr(result), result._repr_html_()
    assert text.startswith("demo network on demo, 5 of 5 images")
    assert f"{100 * result.mIoU:.2f}" in text
    assert f"{100 * result.mIoU:.2f}" in line
    assert f"<td>{100 * result.mIoU:.2f}</td>" in page
    for shown in (text, line, page):
        assert "DEMO: synthetic images" in shown
    assert result.verdict is None
    assert result.complete


def test_importing_costs_nothing() -> None:
    code = """
import sys
import ade_harness as ade
assert {"evaluate", "compare", "load_run", "load_model", "runs", "metrics", "errors"} <= set(dir(ade))
assert ade.errors.HarnessError and ade.metrics.scores and callable(ade.runs)
heavy = {"torch", "lightning", "pandas", "hydra", "transformers", "scipy"} & set(sys.modules)
assert not heavy, heavy
try:
    ade.evalute
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "'ade_harness' has no attribute 'evalute'" in done.stdout
