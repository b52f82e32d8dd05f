"""What was really loaded decides whether counts may be added up; layers that stay random are never silent."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.errors import HarnessError
from ade_harness.models.identity import _imports_of, companion_hashes, source_hash, state_hash
from ade_harness.models.loading import load_model
from ade_harness.models.outputs import MaskLogits, read_output
from ade_harness.runs.ledger import read_rows, write_ledger
from tests.cli.test_cli import FAST, Call, one_message


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(2, 2, bias=False))


def test_the_hash_of_a_state_is_that_of_every_tensor() -> None:
    first = state_hash(network())
    assert first == state_hash(network())
    changes: list[Callable[[Any], Any]] = [
        lambda m: m[0].weight.data.view(torch.int32)[0, 0].bitwise_xor_(1),  # one bit
        lambda m: m[0].bias.data.neg_(),
        lambda m: m[1].running_var.mul_(2),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m[2].to(torch.bfloat16),
        lambda m: m.register_buffer("table", torch.zeros(3), persistent=False),
        lambda m: setattr(m[2], "weight", nn.Parameter(m[2].weight.data.reshape(4, 1))),
        lambda m: m.append(nn.Identity()),
    ]
    hashes = []
    for change in changes:
        changed = network()
        change(changed)
        hashes.append(state_hash(changed))
    assert hashes[-1] == first  # no tensor of its own
    assert len({first, *hashes[:-1]}) == len(changes)


@pytest.mark.slow
def test_numbers_that_a_network_keeps_are_hashed_in_any_nesting() -> None:
    def hashed(value: Any) -> str:
        kept = network()
        kept.kept = value
        return state_hash(kept, attributes=True)

    values: list[Any] = [
        0, 1, True, 0.5, -0.0, [0, 1], [1, 0], [[0, 1]], (0, 1, [2]), {"a": 0}, {"b": 0}, {"a": {"b": [1]}}, 2**70, float("nan"),
        [torch.zeros(1), 3], [torch.zeros(1), 4], np.float32(3),
    ]  # fmt: skip
    assert len({hashed(value) for value in values}) == len(values)
    assert hashed([0, 1]) == hashed([0, 1])
    assert hashed("a text") == hashed(None) == hashed([])  # paths and names may differ between machines
    around: list[Any] = [1, {"b": 2}]
    around += [around] * 1000  # holds itself: visited once
    many = list(range(1_000_000))
    assert len({hashed(around), hashed(many), hashed(many[:-1])}) == 3


def test_tensors_of_every_kind_are_hashed() -> None:
    kinds = nn.Module()
    kinds.register_buffer("none", None)
    for number, value in enumerate(
        (torch.tensor(3), torch.zeros(0), torch.ones(2, 2).T[:1], torch.ones(2, dtype=torch.bool), torch.eye(2).to_sparse(),
         torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.float8_e4m3fn))
    ):  # fmt: skip
        kinds.register_buffer(f"b{number}", value)
    assert state_hash(kinds) == state_hash(kinds)
    assert state_hash(torch.jit.script(network())) == state_hash(network())


# what a run is continued with


@pytest.fixture
def project(tmp_path: Path) -> Any:
    """Write a model in two files, which reads its weights in its constructor."""
    (tmp_path / "my_net.py").write_text(
        "import torch\nfrom my_parts import Layer\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = Layer()\n"
        "        self.layer.load_state_dict(torch.load('own.pth'))\n"
        "        self.shift = [torch.load('plain.pth')]\n"
        "        import json, pathlib\n        self.numbers = json.loads(pathlib.Path('numbers.json').read_text())\n"
        "    def forward(self, x):\n"
        "        import late\n        return self.layer(x) + self.shift[0] + self.numbers['a'][0] + late.ZERO\n"
    )
    (tmp_path / "late.py").write_text("from later import ZERO\n")
    (tmp_path / "later.py").write_text("ZERO = 0\n")
    (tmp_path / "numbers.json").write_text('{"a": [0.0, 1]}')
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside/__init__.py").write_text("A = 1\n")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/__init__.py").write_text("")
    (tmp_path / "packed/net.py").write_text("import beside\nfrom my_net import Net\n\nclass Packed(Net):\n    pass\n")
    torch.save(torch.zeros(1), tmp_path / "plain.pth")
    torch.save(torch.zeros(1), tmp_path / "global.pth")
    (tmp_path / "my_parts.py").write_text(
        "import torch\n\nGLOBAL = torch.load('global.pth')\n\nclass Layer(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, 150, 4, 4)\n"
    )
    torch.save(nn.Conv2d(3, 150, 4, 4).state_dict(), tmp_path / "own.pth")
    yield tmp_path
    forget()


def forget() -> None:
    for name in ("my_net", "my_parts", "beside", "packed", "packed.net", "late", "later"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("my_net.py", "code.model_source"),
        ("my_parts.py", "code.model_source"),
        ("own.pth", "model.state_sha256"),
        ("plain.pth", "model.state_sha256"),
        ("global.pth", "model.state_sha256"),  # loaded where the module is imported
        ("beside/__init__.py", "code.model_source"),
        ("late.py", "code.model_source"),  # imported by the forward, when it is called
        ("later.py", "code.model_source"),
        ("numbers.json", "model.state_sha256"),
        ("nothing", None),
    ],
)
def test_a_run_is_not_continued_with_another_model(call: Call, project: Path, change: str, key: str | None) -> None:
    overrides = (
        "model=custom",
        "model._target_=packed.net.Packed",
        "dataset.images=2",
        *FAST,
        "run.dir=run",
        "metrics.resamples=0",
    )
    assert call(*overrides).code == 0
    path = project / change
    if change.endswith(".py"):
        path.write_text(path.read_text() + "# another line\n")
    elif change == "numbers.json":
        path.write_text('{"a": [0.5, 1]}')
    elif change in ("plain.pth", "global.pth"):
        torch.save(torch.ones(1), path)
    elif change.endswith(".pth"):
        torch.save(nn.Conv2d(3, 150, 4, 4).state_dict(), path)
    forget()
    done = call(*overrides)
    if key is None:
        assert done.code == 0, done.err
    else:
        one_message(done, f"Different: {key}: was ")


def lose_a_row(run: Path, **changed: Any) -> None:
    """Leave a run as a kill leaves it: without its last image, and without a score."""
    rows, _ = read_rows(run / "ledger")
    for segment in (run / "ledger").iterdir():
        segment.unlink()
    write_ledger(run / "ledger/rank00000-00000000-000000.parquet", [replace(row, **changed) for row in rows[:-1]])


@pytest.mark.slow
def test_what_no_hash_sees_is_found_by_predicting_a_counted_image_again(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that a forward reads, closures, attributes of classes: the labels of what was counted show them."""
    (tmp_path / "reading.py").write_text(
        "import pathlib, torch\n\nclass Net(torch.nn.Module):\n    scale = float(pathlib.Path('scale.txt').read_text())\n"
        "    def __init__(self):\n        super().__init__()\n        self.layer = torch.nn.Conv2d(3, 150, 4, 4)\n"
        "        by = pathlib.Path('closure.txt').read_text()\n        self.roll = lambda y: y.roll(int(by), 1)\n"
        "    def forward(self, x):\n        up = int(pathlib.Path('roll.txt').read_text())\n"
        "        return self.roll(self.layer(x) * self.scale).roll(up, 1)\n"
    )
    files = {"scale.txt": ("1.5", "-1.5"), "closure.txt": ("0", "1"), "roll.txt": ("0", "3")}
    for name, (first, _) in files.items():
        (tmp_path / name).write_text(first)
    overrides = ("model=custom", "model._target_=reading.Net", "dataset.images=4", *FAST, "run.dir=run", "metrics.resamples=0")  # fmt: skip
    assert call(*overrides).code == 0
    whole, _ = read_rows(tmp_path / "run/ledger")
    lose_a_row(tmp_path / "run")
    for name, (first, second) in files.items():
        (tmp_path / name).write_text(second)
        sys.modules.pop("reading", None)
        refused = call(*overrides)
        one_message(refused, "got other labels: at least ")
        assert len(read_rows(tmp_path / "run/ledger")[0]) == 3  # nothing was added
        (tmp_path / name).write_text(first)
    sys.modules.pop("reading", None)
    assert call(*overrides).code == 0  # with the model that it began with
    assert [row.label_hash for row in read_rows(tmp_path / "run/ledger")[0]] == [row.label_hash for row in whole]

    lose_a_row(tmp_path / "run")
    (tmp_path / "roll.txt").write_text("3")
    sys.modules.pop("reading", None)
    mixed = call(*overrides, "run.allow_changed=true")
    assert mixed.code == 0, mixed.err
    assert "MIXED: continued with changed settings: labels" in mixed.out
    assert_mixed(tmp_path / "run")


def assert_mixed(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["changes"][0].startswith("labels: ")
    assert any(mark.startswith("MIXED") for mark in manifest["marks"])
    if manifest["status"] == "finished":
        assert any(mark.startswith("MIXED") for mark in json.loads((run / "metrics.json").read_text())["marks"])


FAILING = """
import os, pathlib, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = torch.nn.Conv2d(3, 150, 4, 4), 0

    def forward(self, x):
        self.calls += 1
        if str(self.calls) in os.environ.get("FAILS_AT", "").split(","):
            raise ValueError("a fault that passes")
        return self.layer(x).roll(int(pathlib.Path("roll.txt").read_text()), 1)
"""


@pytest.mark.slow
def test_a_fault_while_models_are_compared_hides_no_other_model(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "roll.txt").write_text("0")
    overrides = ("model=custom", "model._target_=failing.Net", "dataset.images=6", *FAST, "run.dir=run", "metrics.resamples=0")  # fmt: skip
    monkeypatch.setenv("FAILS_AT", "4")
    assert call(*overrides).code == 2  # interrupted by its fourth image
    kept = len(read_rows(tmp_path / "run/ledger")[0])
    assert 0 < kept < 6
    (tmp_path / "roll.txt").write_text("3")
    for fails, said in (
        ("", "got other labels"),
        ("1", "got other labels"),
        ("1,2", "no image that this run has counted could"),
    ):
        for extra in ((), ("run.on_error=skip",)):
            monkeypatch.setenv("FAILS_AT", fails)
            one_message(call(*overrides, *extra), said)
            assert len(read_rows(tmp_path / "run/ledger")[0]) == kept  # nothing was added
    # a mixed run stays one, also where the session that mixes it is interrupted
    monkeypatch.setenv("FAILS_AT", "4")
    assert call(*overrides, "run.allow_changed=true").code == 2
    assert kept < len(read_rows(tmp_path / "run/ledger")[0]) < 6
    assert_mixed(tmp_path / "run")
    monkeypatch.setenv("FAILS_AT", "")
    assert call(*overrides, "run.allow_changed=true").code == 0
    assert_mixed(tmp_path / "run")


@pytest.mark.slow
def test_a_fault_that_passes_costs_nothing(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is not counted yet, in a batch that is compared, has its turn later."""
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "roll.txt").write_text("0")
    overrides = (
        "model=custom", "model._target_=failing.Net", "dataset.images=6", *FAST, "run.dir=run", "metrics.resamples=0",
        "inference.images=3", "run.on_error=skip",
    )  # fmt: skip
    assert call(*overrides).code == 0
    lose_a_row(tmp_path / "run")
    monkeypatch.setenv("FAILS_AT", "1")
    done = call(*overrides)
    assert done.code == 0, done.err
    assert "PARTIAL" not in done.out
    assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == 6


@pytest.mark.slow
def test_a_few_pixels_of_another_processor_are_a_note(call: Call, tmp_path: Path) -> None:
    (tmp_path / "near.py").write_text(
        "import pathlib, torch\n\nclass Net(torch.nn.Module):\n    def forward(self, x):\n"
        "        n, _, h, w = x.shape\n        y = torch.zeros(n, 150, h, w)\n        y[:, 1] = 1\n"
        "        y[:, 2, :int(pathlib.Path('rows.txt').read_text())] = 2\n        return y\n"
    )
    (tmp_path / "rows.txt").write_text("0")
    overrides = ("model=custom", "model._target_=near.Net", "dataset.images=4", *FAST, "run.dir=run", "metrics.resamples=0")  # fmt: skip
    assert call(*overrides).code == 0
    lose_a_row(tmp_path / "run")
    (tmp_path / "rows.txt").write_text("1")
    one_message(call(*overrides), "got other labels")  # here each image has the same bits in every session
    lose_a_row(tmp_path / "run", host="elsewhere")
    done = call(*overrides)
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert re.search(
        r"which this run counted on elsewhere, was predicted again on \S+ and got other labels: at least", text
    )
    assert "MIXED" not in text
    lose_a_row(tmp_path / "run", host="elsewhere")
    (tmp_path / "rows.txt").write_text("20")
    one_message(call(*overrides), "got other labels")


@pytest.mark.slow
def test_parts_of_another_project_are_part_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """Nested targets, and parts that a constructor makes by itself."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "backb.py").write_text(
        "import torch\n\nclass B(torch.nn.Conv2d):\n    def __init__(self):\n        super().__init__(3, 150, 4, 4)\n\n"
        "def make():\n    import torch.nn as nn\n    return nn.Conv2d(3, 150, 4, 4)\n"
    )
    (tmp_path / "outer.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self, part):\n        super().__init__()\n"
        "        self.part = part\n\n    def forward(self, x):\n        return self.part(x)\n"
    )
    monkeypatch.syspath_prepend(str(other))
    for number, target in enumerate(("backb.B", "backb.make")):
        overrides = ("model=custom", "model._target_=outer.Net", f"+model.kwargs.part._target_={target}", "dataset.images=2",
                 *FAST, f"run.dir=run{number}", "metrics.resamples=0")  # fmt: skip
        assert call(*overrides).code == 0
        path = other / "backb.py"
        path.write_text(path.read_text() + "# another line\n")
        for name in ("outer", "backb"):
            sys.modules.pop(name, None)
        one_message(call(*overrides), "Different: code.model_source: was ")
        for name in ("outer", "backb"):
            sys.modules.pop(name, None)


def write_external(path: Path, seed: int = 0) -> None:
    weights = np.random.default_rng(seed).standard_normal((150, 3, 1, 1)).astype(np.float32)
    image, scores = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, c, "h", "w"]) for n, c in (("x", 3), ("y", 150))
    )
    tensor = onnx.numpy_helper.from_array(weights, "w")
    model = helper.make_model(
        helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", [image], [scores], [tensor]),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    (path.parent / "w.data").unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)


@pytest.mark.parametrize("length", [1, 6, 127, 128, 300])
@pytest.mark.parametrize("key_first", [True, False])
def test_places_of_external_data_are_read_in_either_order(tmp_path: Path, length: int, key_first: bool) -> None:
    """Protobuf's fields may come in any order."""
    name = "d" * length if length < 200 else "a/" * 100 + "d" * (length - 200)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"weights")
    number = bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])
    key, value = b"\n\x08location", b"\x12" + number + name.encode()
    entry = key + value if key_first else value + key
    (tmp_path / "m.onnx").write_bytes(b"\x08\x07j" + bytes([len(entry) & 127]) + entry + b"\n\x06offset\x12\x010")
    assert list(companion_hashes(tmp_path / "m.onnx")) == [name]


def test_external_data_of_a_graph_is_part_of_the_model(call: Call, tmp_path: Path) -> None:
    write_external(tmp_path / "m.onnx")
    for name in ("other.data", "Conv", "w", "x"):  # names that stand in the graph, but not as a file's
        (tmp_path / name).write_bytes(b"nothing of the graph's")
    overrides = ("model=onnx", "model.path=m.onnx", "dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=0")
    assert list(companion_hashes(tmp_path / "m.onnx")) == ["w.data"]
    assert call(*overrides).code == 0
    graph = (tmp_path / "m.onnx").read_bytes()
    write_external(tmp_path / "m.onnx", seed=1)
    assert (tmp_path / "m.onnx").read_bytes() == graph
    one_message(call(*overrides), "Different: model.files.w.data: was ")


def test_installed_packages_are_known_by_their_version() -> None:
    assert source_hash("torch.nn.modules.conv") == f"torch=={importlib.metadata.version('torch')}"  # without +cu130
    assert source_hash("builtins") is None


def test_runs_of_before_can_be_continued(call: Call, tmp_path: Path) -> None:
    overrides = ("dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=0")
    assert call(*overrides).code == 0
    manifest = tmp_path / "run/manifest.json"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(line for line in lines if "model.state_sha256" not in line))
    assert manifest.read_text() != "".join(lines)
    assert call(*overrides).code == 0


# what anybody's code may do while it is loaded


class Odd(nn.Conv2d):
    """A network that misbehaves once it is made."""

    def __init__(self, what: str) -> None:
        super().__init__(3, 150, 4, 4)
        self.what = what
        if what == "holds itself":
            self.me = self

    def eval(self) -> Any:
        """Fail, if asked to."""
        if self.what == "eval":
            raise GeneratorExit
        return super().eval()

    @property
    def class_names(self) -> Any:
        """Fail, or return no names."""
        if self.what == "names":
            raise ValueError("odd names")
        return 5


@pytest.mark.parametrize(
    ("what", "reason"),
    [("holds itself", "RecursionError: "), ("eval", "GeneratorExit."), ("names", "ValueError: odd names")],
)
@pytest.mark.slow
def test_code_that_fails_while_it_is_loaded_is_one_message(what: str, reason: str) -> None:
    target = "tests.models.test_identity.Odd"
    overrides = ["model=custom", f"model._target_={target}", f"model.kwargs.what={what}"]
    with pytest.raises(HarnessError, match=f"_target_={target}: its code failed while it was loaded .{reason}"):
        load_model(compose_config(overrides).model)
    loaded = load_model(compose_config([*overrides[:2], "model.kwargs.what=nothing"]).model)
    assert loaded.class_names is None
    assert loaded.notes == ("the module's class_names are not a list of texts, and are not used",)


# layers that stay random


class Two(nn.Module):
    """Three layers and their names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 150, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores."""
        scores: torch.Tensor = self.head(self.body(self.stem(images)))
        return scores


TWO = ("model=custom", "model._target_=tests.models.test_identity.Two")


@pytest.mark.slow
def test_layers_that_stay_random_are_listed_and_mark_the_run(call: Call, tmp_path: Path) -> None:
    state = Two().state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("body")}, tmp_path / "w.safetensors")
    overrides = (*TWO, "model.checkpoint=w.safetensors", "dataset.images=2", *FAST, "metrics.resamples=0")
    refused = call(*overrides)
    one_message(refused, "2 missing: body.bias, body.weight. Choose the model that the file was made for.")
    assert "allow_" not in refused.err
    done = call(*overrides, "model.allow_missing_keys=[body.*]", "run.dir=run")
    assert done.code == 0, done.err
    assert "RANDOM LAYERS: 2 weights are not in the checkpoint and stayed random (body.bias, body.weight)" in done.out
    manifest = (tmp_path / "run/manifest.json").read_text()
    assert '"random_keys": [' in manifest
    assert '"body.weight"' in manifest
    assert "RANDOM LAYERS" in (tmp_path / "run/metrics.json").read_text()


@pytest.mark.slow
def test_weights_that_take_no_part_are_listed_and_those_of_a_deeper_network_not_proposed(
    call: Call, tmp_path: Path
) -> None:
    """A deeper network's file fills the shallower one: its score would be neither's."""
    overrides = (*TWO, "model.checkpoint=w.safetensors", "dataset.images=2", *FAST, "metrics.resamples=0")
    for name, proposed in (("auxiliary_head.conv.weight", True), ("body2.weight", False)):
        save_file({**Two().state_dict(), name: torch.ones(3)}, tmp_path / "w.safetensors")
        refused = call(*overrides)
        one_message(refused, f"1 unexpected: {name}. Choose the model that the file was made for.")
        assert ("model.allow_unexpected_keys" in refused.err) == proposed
    done = call(*overrides, "model.allow_unexpected_keys=[body2.*]", "run.dir=run")
    assert done.code == 0, done.err
    assert "1 weights of the file took no part (body2.weight)" in done.out
    assert json.loads((tmp_path / "run/manifest.json").read_text())["model"]["unused_keys"] == ["body2.weight"]


@pytest.mark.slow
def test_random_layers_come_from_the_models_seed(tmp_path: Path) -> None:
    save_file(Two().stem.state_dict(prefix="stem."), tmp_path / "w.safetensors")
    overrides = (
        *TWO,
        f"model.checkpoint={tmp_path / 'w.safetensors'}",
        "model.allow_missing_keys=['*']",
        "dataset=demo",
    )
    hashes = []
    for seed in (0, 0, 1):
        torch.rand(3)
        hashes.append(state_hash(load_model(compose_config([*overrides, f"model.seed={seed}"]).model).module))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("model", [("model=segformer_b0",), TWO], ids=["system", "custom"])
def test_a_file_of_another_model_is_refused_whatever_is_allowed(tmp_path: Path, model: tuple[str, ...]) -> None:
    save_file(
        {f"other.{n}": torch.zeros(2) for n in range(9)} | Two().stem.state_dict(prefix="stem."),
        tmp_path / "w.safetensors",
    )
    allowed = ("model.allow_missing_keys=['*']", "model.allow_unexpected_keys=['*']")
    cfg = compose_config([*model, f"model.checkpoint={tmp_path / 'w.safetensors'}", *allowed, "dataset=demo"]).model
    with pytest.raises(HarnessError, match=r"of the file's 11 keys are the model's|is missing; it has 11 others"):
        load_model(cfg)


# scores that are none


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(1, 5, 2, 2, dtype=torch.complex64), "returned complex64 values, expected floating-point scores.$"),
        (torch.zeros(1, 5, 2, 2, dtype=torch.int64), r"returned int64 values.*Labels are integers \[N, h, w\]"),
        (torch.zeros(1, 5, 2, 2, dtype=torch.bool), "returned bool values"),
        (torch.zeros(1, 5, 2, 2).to_sparse(), "returned a sparse tensor"),
        (torch.nested.nested_tensor([torch.zeros(5, 2, 2)]), "returned a nested tensor"),
        (torch.nested.nested_tensor([torch.zeros(5, 2), torch.ones(5, 3)], layout=torch.jagged), "returned a nested"),
        (MaskLogits(torch.zeros(1, 5, 3), torch.zeros(1, 5, 2, 2, dtype=torch.int32)), "returned int32 values"),
        ({"pred_logits": torch.zeros(1, 5, 3), "pred_masks": [1]}, "returned a list where scores were expected"),
    ],
)
def test_scores_that_are_no_numbers_are_refused_by_name(scores: Any, message: str) -> None:
    with pytest.raises(HarnessError, match=f"a: the model {message}"):
        read_output(scores, "a")


def test_a_file_that_is_rewritten_is_parsed_again(tmp_path: Path) -> None:
    """What it imports is kept, by its time, size and inode."""
    file = tmp_path / "net.py"
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("")
    for name in ("one", "two", "one"):
        before = file.stat().st_mtime_ns if file.exists() else 0
        file.write_text(f"def forward():\n    import {name}\n")
        os.utime(file, ns=(before + 1, before + 1))
        for _ in range(2):
            assert _imports_of(file, tmp_path) == {tmp_path / f"{name}.py"}
