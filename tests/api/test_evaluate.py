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
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

import ade_harness as ade
from ade_harness import kernels
from ade_harness.api import evaluation
from ade_harness.data.labels import NO_CLASS
from ade_harness.errors import HarnessError
from ade_harness.evaluation import inline
from ade_harness.runs.progress import read_progress
from ade_harness.runs.progress import state_of as state_of_run
from tests.api.networks import Breaks, Colours, Remembers
from tests.conftest import REPOSITORY, Done
from tests.warm import WarmPopen

OF_IMPORTS = (
    "PYTEST_CURRENT_TEST", "LD_LIBRARY_PATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip
"""Variables that OpenCV, Lightning and torch set when they are imported."""
SMALL = {"dataset.images": 5, "metrics.resamples": 1000}


class Alive(frozenset):
    """Threads; as before if none is new. One that another test has left may end meanwhile."""

    def __eq__(self, before: object) -> bool:
        return isinstance(before, Alive) and self <= before

    __hash__ = frozenset.__hash__


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
        "alive": Alive(threading.enumerate()),
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


@pytest.mark.slow
def test_a_network_in_memory_has_the_numbers_of_the_command_line(
    call: Callable[..., Done], data: Path, tmp_path: Path
) -> None:
    overrides = ("model=custom", "model._target_=networks.Colours", "dataset=ade20k", f"dataset.root={data}")
    done = call(*overrides, "inference=original_size", "tracking=none", "run.dir=run", "runtime.workers=0")
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


@pytest.mark.usefixtures("odd_state")
@pytest.mark.slow
def test_loading_leaves_the_process_as_it_was() -> None:
    options = {
        "model._target_": "tests.api.networks.Draws",
        "model.weights": "random",
        "model.kwargs": {"leave": False},
    }
    before = state_of()
    ade.load_model("custom", options=options)
    assert state_of() == before
    with pytest.raises(HarnessError, match="called exit\\(0\\)|sys.exit"):
        ade.load_model("custom", options={**options, "model.kwargs": {"leave": True}})
    assert state_of() == before


@pytest.mark.parametrize(("held", "peak"), [((1000, 3000), 3000), ((3000, 3000), None)])
def test_the_gpus_peak_is_the_evaluations_own(
    held: tuple[int, int], peak: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the caller's process had held before is not the network's; its record is left as it is."""
    found = iter(held)
    monkeypatch.setattr(inline, "peak_bytes", lambda _: next(found))
    result = ade.evaluate(Colours(), dataset="demo", options={**SMALL, "dataset.images": 1, "metrics.resamples": 0})
    assert result.metrics["gpu_peak_bytes"] == peak


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
        ("nvidia/segformer-b0", {}, r"A repository of the hub: model='hf', options={'model.id': 'nvidia/segformer-b0'}"),
        ("segformer_b9", {}, "'segformer_b9': no such system, file or folder. Did you mean 'segformer_b"),
        (Colours(), {"checkpoint": "x.pth"}, "checkpoint: load it into the network before"),
        (Colours(), {"protocol": "slide"}, "inference=slide: unknown value"),
        (Colours(), {"options": {"inference.bach": 2}}, "inference.bach: no such option. Did you mean 'inference.batch'"),
        (Colours(), {"options": {"hydra.verbose": True}}, "options: hydra.verbose has no effect"),
        (Colours(), {"options": {"probe": "dinov3_linear"}}, "options: probe has no effect"),
        (Colours(), {"device": "gpu"}, "device='gpu'"),
        (Colours(), {"devices": 2, "device": "cuda:1"}, "device=cuda:1: with devices=2 each rank has its own"),
        (lambda image: image, {"devices": 2}, "devices=2: ranks are other processes, and a function runs in this one"),
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_directory_where_it_is_asked_for(call: Callable[..., Done], tmp_path: Path) -> None:
    network = Colours()
    first = ade.evaluate(network, dataset="demo", options=SMALL, run_dir=tmp_path / "mine")
    # as the page needs, and as it was: threads are the caller's
    assert len(list((tmp_path / "mine/label_maps").glob("*.png"))) == first.images
    config = yaml.safe_load((tmp_path / "mine/config.yaml").read_text())
    assert config["runtime"]["threads"] == torch.get_num_threads()
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


def test_other_shells_see_how_far_it_is_and_a_lost_directory_ends_it(tmp_path: Path) -> None:
    run, seen = tmp_path / "run", []

    def watched(image: np.ndarray) -> np.ndarray:
        if len(seen) == 2:
            progress = read_progress(run)
            assert progress is not None
            assert (progress["done"], progress["images"], progress["ranks"][0]["rank"]) == (1, 5, 0)
            assert state_of_run(run, "running") == "running"
        seen.append(image.shape)
        return image[..., 0] % 150

    ade.evaluate(watched, dataset="demo", options=SMALL, run_dir=run, workers=0)
    assert len(seen) == 5
    assert not (run / "progress.json").exists()

    def robbed(image: np.ndarray) -> np.ndarray:
        (tmp_path / "lost/.lock").write_text('{"token": "of another", "renewed": 1}')
        return image[..., 0] % 150

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ade_harness.runs.lock.RENEW_EVERY_S", -1.0)
        with pytest.raises(HarnessError, match="lost"):
            ade.evaluate(robbed, dataset="demo", options=SMALL, run_dir=tmp_path / "lost", workers=0)


@pytest.mark.slow
def test_ranks_of_a_network_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Colours()
    one = ade.evaluate(network, dataset="demo", options=SMALL)
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of a training that this process is a rank of
    two = ade.evaluate(network, dataset="demo", options=SMALL, devices=2, device="cpu", workers=0)
    assert np.array_equal(one.matrix, two.matrix)
    assert {row.rank for row in two.rows} == {0, 1}
    assert one.scores == two.scores
    assert two.run_dir is None
    monkeypatch.chdir(tmp_path)
    for devices, place in ((1, "here"), (2, "in_ranks")):
        kept = ade.evaluate(network, dataset="demo", options=SMALL, devices=devices, device="cpu", run_dir=place)
        assert kept.run_dir == tmp_path / place
    monkeypatch.setattr(Breaks, "__module__", "__main__")
    with pytest.raises(HarnessError, match="cannot import this Breaks of __main__"):
        ade.evaluate(Breaks(), dataset="demo", devices=2)
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "Popen", WarmPopen)
    with pytest.raises(HarnessError, match="no such layer"):
        ade.evaluate(Breaks(), dataset="demo", options=SMALL, devices=2, device="cpu", workers=0)
    network.hook = lambda: None  # type: ignore[assignment]
    with pytest.raises(HarnessError, match="this Colours cannot be pickled"):
        ade.evaluate(network, dataset="demo", devices=2)


@pytest.mark.slow
def test_a_compiled_network_is_evaluated_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    network = Colours()
    compiled: Any = torch.compile(network, backend="eager")
    found = ade.evaluate(compiled, dataset="demo", limit=1, options=SMALL)
    assert not [w for w in recwarn if "torch.compile" in str(w.message)]
    assert found.label == "Colours"
    plain = ade.evaluate(network, dataset="demo", limit=1, options=SMALL)
    assert np.array_equal(found.matrix, plain.matrix)
    assert found.metrics["flops"] == plain.metrics["flops"]


def test_a_default_device_of_torch_is_refused() -> None:
    torch.set_default_device("meta")
    try:
        with pytest.raises(HarnessError, match="default device is meta"):
            ade.evaluate(Colours(), dataset="demo", limit=1, options=SMALL)
        with pytest.raises(HarnessError, match="default device is meta"):
            ade.load_model("demo")
    finally:
        torch.set_default_device(None)


def test_messages_that_name_the_way_out(tmp_path: Path) -> None:
    torch.save(Colours().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(HarnessError, match=r"looks like a weight file; also give its system"):
        ade.evaluate(tmp_path / "weights.pth", dataset="demo")
    with pytest.raises(HarnessError, match=r"a function runs in this one\. devices=1"):
        ade.evaluate(lambda image: image[..., 0], dataset="demo", devices=2)
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(HarnessError, match=r"pointer\.pth: a Git LFS pointer"):
        ade.evaluate("segformer_b0", checkpoint=tmp_path / "pointer.pth", dataset="demo")


def test_a_network_with_two_heads_says_which_is_evaluated(tmp_path: Path) -> None:
    class Two(Colours):
        def forward(self, images: torch.Tensor) -> Any:
            scores = super().forward(images)
            return scores, scores.flip(1)

    torch.export.save(torch.export.export(Two().eval(), (torch.zeros(1, 3, 64, 64),)), tmp_path / "two.pt2")
    one = ade.evaluate(Colours(), dataset="demo", limit=1, options=SMALL)
    two = ade.evaluate(Two(), dataset="demo", limit=1, options=SMALL)
    assert np.array_equal(one.matrix, two.matrix)
    fitted = {**SMALL, "inference.resize.side": 64, "inference.resize.pad_to": [64, 64]}
    file = ade.evaluate(tmp_path / "two.pt2", dataset="demo", limit=1, options=fitted, protocol="fit_512")
    for found in (two, file):
        assert any("returns 2 scores of as many classes, of which the first is evaluated" in n for n in found.notes)
    assert not any("returns 2 scores" in note for note in one.notes)


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


SWITCHES = """
import os
import torch
import yaml
import ade_harness as ade
from tests.warm import import_all
import_all()

b = torch.backends
READ = [
    lambda: b.cuda.matmul.allow_tf32, lambda: b.cudnn.allow_tf32, torch.get_float32_matmul_precision,
    torch.get_num_threads, lambda: b.fp32_precision, lambda: b.cuda.matmul.fp32_precision,
    lambda: b.cudnn.conv.fp32_precision, lambda: b.cudnn.rnn.fp32_precision, lambda: b.mkldnn.matmul.fp32_precision,
]
SET = {
    "nothing": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allowed": lambda: setattr(b.cuda.matmul, "allow_tf32", True),
    "newer": lambda: setattr(b.cuda.matmul, "fp32_precision", "tf32"),
    "of convolutions": lambda: setattr(b.cudnn.conv, "fp32_precision", "ieee"),
    "general": lambda: setattr(b, "fp32_precision", "tf32"),
}

def state():
    found = []
    for read in READ:
        try:
            found.append(read())
        except RuntimeError:  # older and newer switches were mixed
            found.append("unreadable")
    return found

class Careless(torch.nn.Conv2d):
    def forward(self, images):
        torch.set_num_threads(3)
        assert not b.cuda.matmul.allow_tf32
        return super().forward(images)

for name, change in SET.items():  # each in a process of its own: nothing was computed yet, so that it can be forked
    child = os.fork()
    if child == 0:
        change()
        before = state()
        ade.evaluate(Careless(3, 150, 1), dataset="demo", limit=2, options={"metrics.resamples": 0})
        if state() != before:
            print(name, before, state(), flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_torchs_older_and_newer_switches_are_as_before() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("needs torch 2.9 or later: pip install 'torch>=2.9'")
    done = subprocess.run(
        [sys.executable, "-c", SWITCHES], capture_output=True, text=True, timeout=200, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_networks_that_share_a_module_are_evaluated_one_after_the_other() -> None:
    shared = torch.nn.Conv2d(3, 8, 3, padding=1)
    networks = [torch.nn.Sequential(shared, torch.nn.Conv2d(8, 150, 1)) for _ in range(2)]
    for network in networks:
        network.train()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: ade.evaluate(networks[n % 2], dataset="demo", options=SMALL), range(6)))
    assert all(module.training for network in networks for module in network.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices=0: expected a whole number from 1 up"),
        ({"devices": True}, "devices=True: expected a whole number"),
        ({"devices": "2"}, "devices='2': expected a whole number"),
        ({"workers": -1}, "workers=-1: expected a whole number from 0 up"),
        ({"device": "meta"}, "device='meta': unsupported device"),
        ({"device": 1.5}, "device=1.5: "),
        ({"device": "mps"}, "device='mps': "),
        ({"run_dir": 5}, "run_dir=5: expected a path"),
        ({"options": ["a=b"]}, "options=.*: expected a mapping"),
        ({"options": {"runtime.devices": 4}}, "runtime.devices is an argument from Python: devices="),
        ({"options": {"run.dir": "x"}}, "run.dir is an argument from Python: run_dir="),
        ({"options": {"runtime.threads": 2}}, "runtime.threads has no effect: .* torch.set_num_threads"),
        ({"options": {"run.on_error": "skip"}}, "run.on_error has no effect"),
        ({"options": {"runtime.sharding": "static"}}, "runtime.sharding has no effect"),
    ],
)
def test_arguments_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        ade.evaluate(Colours(), **{"dataset": "demo", "limit": 2, **arguments})


def test_a_function_has_no_protocol() -> None:
    def labels(image: np.ndarray) -> np.ndarray:
        return np.zeros(image.shape[:2], np.int64)

    with pytest.raises(HarnessError, match="protocol='mmseg_slide_512': has no effect: the model is a function"):
        ade.evaluate(labels, dataset="demo", limit=2, protocol="mmseg_slide_512")
    with pytest.raises(HarnessError, match="inference.precision has no effect: the model is a function"):
        ade.evaluate(labels, dataset="demo", limit=2, options={"inference.precision": "bf16"})


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    options = {"model.input.mean": np.array([1.0, 2.0, 3.0]), "model.input.std": torch.tensor([4.0, 5.0, 6.0])}
    found = ade.evaluate(Colours(), dataset="demo", limit=np.int64(2), options={**SMALL, **options})
    assert found.images == 2
    assert found == found  # noqa: PLR0124
    assert found != ade.evaluate(Colours(), dataset="demo", limit=2, options=SMALL)
    found.to_dict()["marks"].append("mine")
    assert "mine" not in found.metrics["marks"]


def test_a_run_directory_of_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ade.evaluate(Colours(), dataset="demo", run_dir="~/mine", options=SMALL)
    assert ade.load_run("~/mine").images == 5
    assert not (tmp_path / "~").exists()


def test_an_interrupted_evaluation_does_not_run_for_ever(tmp_path: Path) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ade.evaluate(interrupted, dataset="demo", run_dir=tmp_path / "run", options=SMALL)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["status"], manifest["failures"]) == ("incomplete", {"evaluate": "KeyboardInterrupt"})


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_not_cut(mode: str) -> None:
    with pytest.raises(HarnessError, match=rf"PIL's mode {mode}: expected 8 bits"):
        ade.load_model("demo")(Image.new(mode, (8, 8)))


def test_a_picture_that_is_cut_off_is_one_message(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    with Image.open(tmp_path / "a.png") as opened, pytest.raises(HarnessError, match="the image cannot be decoded"):
        ade.load_model("demo")(opened)


def test_nothing_is_advised_that_cannot_be() -> None:
    """A network in memory is gone for a later command, and so is a run that nobody asked to keep."""
    message = (
        "ADE_val_00000001: broken\nNo score: 3 of 4 images are counted. They are kept: after fixing this, `python -m"
        " ade_harness resume /tmp/x/run` evaluates the others; run.on_error=skip would leave out images that fail."
    )
    expected = "ADE_val_00000001: broken\nNo score: 3 of 4 images are counted."
    assert evaluation._without_resume(message) == expected
    stopped = "Stopped. Completed work is saved; to resume:\n  python -m ade_harness resume /tmp/x/run"
    assert evaluation._without_resume(stopped) == "Stopped."
    assert evaluation._without_resume("model=x: no such system.") == "model=x: no such system."


def test_kernels_that_cannot_be_used_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "unavailable_reason", lambda module, gpu: "no compiler")
    result = ade.evaluate("demo", dataset="demo", options=SMALL)
    assert "runtime.kernels=auto: plain torch is used, which is slower: no compiler" in result.notes


def test_the_manifest_says_what_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels and why they were not the compiled ones, deformable attention, torch's switches."""
    monkeypatch.setattr(kernels, "unavailable_reason", lambda module, gpu: "no compiler")
    monkeypatch.setattr(evaluation, "implementation_of", lambda network, device, dtype: "numba")
    ade.evaluate("demo", dataset="demo", options=SMALL, limit=2, run_dir=tmp_path / "run")
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["kernels"] == "reference"
    assert manifest["kernels_reason"] == "plain torch is used, which is slower: no compiler"
    assert manifest["model"]["deformable_attention"] == "numba"
    assert manifest["arithmetic"]["cudnn_deterministic"] is True
