"""Exported programs, and networks that return labels."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

import ade_harness as ade
from ade_harness.errors import HarnessError
from tests.api.networks import Colours
from tests.models.test_loading import write_onnx

SMALL = {"dataset.images": 4, "metrics.resamples": 0}


def evaluated(model: Any, **options: Any) -> ade.Evaluation:
    return ade.evaluate(
        model, dataset="demo", protocol=options.pop("protocol", "original_size"), options={**SMALL, **options}
    )


def hashes(result: ade.Evaluation) -> list[str]:
    return [row.label_hash for row in result.rows]


def network() -> Colours:
    return Colours().eval()


class Labels(nn.Module):
    """Ends in an argmax at the input's size."""

    def __init__(self, keep: bool, shift: int = 0) -> None:
        super().__init__()
        self.below, self.keep, self.shift = network(), keep, shift

    def forward(self, images: Tensor) -> Tensor:
        scores = F.interpolate(self.below(images), images.shape[-2:], mode="bilinear", align_corners=False)
        return scores.argmax(1, keepdim=self.keep) + self.shift


@pytest.mark.slow
@pytest.mark.parametrize("shapes", ["dynamic", "fixed"])
def test_an_exported_program_is_its_network(tmp_path: Path, shapes: str) -> None:
    path, net = tmp_path / "net.pt2", network()
    auto = torch.export.Dim.AUTO
    free = {"images": {0: auto, 2: auto, 3: auto}} if shapes == "dynamic" else None
    torch.export.save(
        torch.export.export(net, (torch.zeros(1 if free is None else 2, 3, 64, 96),), dynamic_shapes=free), path
    )
    assert not any("training mode" in note for note in ade.load_model(path)._predictor.notes())
    if shapes == "dynamic":
        assert hashes(evaluated(path)) == hashes(evaluated(net))
    else:
        fitted = {"inference.resize.height": 64, "inference.resize.width": 96}
        assert hashes(evaluated(path, protocol="fit_input")) == hashes(evaluated(net, protocol="fit_input", **fitted))
        with pytest.raises(HarnessError, match="the model takes 96x64 .width x height. only"):
            evaluated(path)
    with pytest.raises(HarnessError, match="a model of kind exported runs as it was exported"):
        evaluated(path, **{"model.dtype": "bf16", "inference.precision": "bf16"})


class Two(nn.Module):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return one + two


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.export.export(nn.Conv2d(3, 150, 1).half(), (torch.zeros(1, 3, 8, 8).half(),)), r"has float16 \['1', '3', '8', '8'\]. Export the network in float32"),
        (lambda: torch.export.export(Two(), (torch.zeros(1, 3, 8, 8),) * 2), r"the program has float32 .*, float32"),
    ],
)  # fmt: skip
def test_programs_that_do_not_take_images(tmp_path: Path, make: Any, message: str) -> None:
    torch.export.save(make(), tmp_path / "net.pt2")
    with pytest.raises(HarnessError, match=message):
        evaluated(tmp_path / "net.pt2")


class ByName(nn.Module):
    """Takes images as transformers' networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.below = network()

    def forward(self, *, pixel_values: Tensor) -> Tensor:
        return self.below(pixel_values)


def test_a_program_that_takes_images_by_name(tmp_path: Path) -> None:
    program = torch.export.export(ByName().eval(), (), {"pixel_values": torch.zeros(1, 3, 64, 96)})
    torch.export.save(program, tmp_path / "net.pt2")
    fitted = {"inference.resize.height": 64, "inference.resize.width": 96}
    expected = hashes(evaluated(network(), protocol="fit_input", **fitted))
    assert hashes(evaluated(tmp_path / "net.pt2", protocol="fit_input")) == expected
    assert hashes(evaluated(program, protocol="fit_input")) == expected  # in memory too: its size is known
    with pytest.raises(HarnessError, match="the model takes 96x64 .width x height. only"):
        evaluated(program)


class WithConstants(nn.Module):
    """As networks of transformers are exported: with arguments that are None or flags."""

    def __init__(self) -> None:
        super().__init__()
        self.below = network()

    def forward(self, images: Tensor, labels: Tensor | None = None, dense: bool = True) -> Tensor:
        scores: Tensor = self.below(images)
        return scores if dense and labels is None else scores * 0


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((True,), {"labels": None}),
        ((True, None, True), {}),
        ((), {"labels": None, "images": True}),
        ((True,), {"dense": True}),
    ],
)
def test_a_program_with_constant_arguments(given: tuple[Any, ...], named: dict[str, Any]) -> None:
    images = torch.zeros(1, 3, 64, 96)
    place = tuple(images if number == 0 else value for number, value in enumerate(given))
    names = {key: images if key == "images" else value for key, value in named.items()}
    program = torch.export.export(WithConstants().eval(), place, names)
    fitted = {"inference.resize.height": 64, "inference.resize.width": 96}
    expected = hashes(evaluated(network(), protocol="fit_input", **fitted))
    assert hashes(evaluated(program, protocol="fit_input")) == expected


class ChannelsLast(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.permute(0, 3, 1, 2).repeat(1, 50, 1, 1)


def test_files_with_channels_last_say_so(tmp_path: Path) -> None:
    """As TensorFlow's networks are converted by default: 3 would be taken for the width."""
    program = torch.export.export(ChannelsLast(), (torch.zeros(1, 64, 64, 3),))
    torch.export.save(program, tmp_path / "last.pt2")
    node = helper.make_node("Transpose", ["x"], ["y"], perm=[0, 3, 1, 2])
    image, scores = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [1, 64, 64, 3]), ("y", [1, 3, 64, 64]))
    )
    graph = helper.make_graph([node], "g", [image], [scores])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "last.onnx"
    )
    message = r"takes \[1, 64, 64, 3\], expected RGB images \[N, 3, H, W\]\. Its channels are last"
    for model in (tmp_path / "last.pt2", tmp_path / "last.onnx", program):
        with pytest.raises(HarnessError, match=message):
            evaluated(model)
    four = torch.export.export(nn.Conv2d(4, 150, 1), (torch.zeros(1, 4, 64, 64),))
    with pytest.raises(HarnessError, match=r"takes \[1, 4, 64, 64\], expected RGB images \[N, 3, H, W\]\.$"):
        evaluated(four)


class Flat(nn.Module):
    """As a network whose reshapes a trace has written down as numbers."""

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        return images.flatten().reshape(1, 3, side, side).repeat(1, 50, 1, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_traced_network_of_one_size_leads_to_the_protocol(tmp_path: Path) -> None:
    torch.jit.trace(Flat(), torch.zeros(1, 3, 64, 64)).save(tmp_path / "net.ts")
    with pytest.raises(HarnessError, match=r"may take the size alone that it was made with: inference=fit_input"):
        evaluated(tmp_path / "net.ts")
    fitted = {"inference.resize.height": 64, "inference.resize.width": 64}
    assert evaluated(tmp_path / "net.ts", protocol="fit_input", **fitted).images == 4  # as the message says
    module = torch.export.export(Flat(), (torch.zeros(1, 3, 64, 64),)).module()
    with pytest.raises(HarnessError, match=r"may take the size alone that it was made with: inference=fit_input"):
        evaluated(module)
    assert evaluated(module, protocol="fit_input", **fitted).images == 4


def test_what_is_no_program(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(b"no zip")
    with pytest.raises(HarnessError, match=r"net.pt2: not a program of torch.export"):
        evaluated(tmp_path / "net.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_a_network_that_returns_labels(keep: bool) -> None:
    assert hashes(evaluated(Labels(keep))) == hashes(evaluated(network()))
    # one class further by the class map, and one channel for none of the classes
    names = {"model.class_map": [None, *range(150)]}
    moved = evaluated(Labels(keep, shift=1), **names)
    assert hashes(moved) == hashes(evaluated(network()))
    at_input = {"inference.output.labels": "input", "inference.tta.average": "scores"}
    assert hashes(evaluated(Labels(keep), protocol="fit_512", **at_input)) == hashes(
        evaluated(network(), protocol="fit_512", **at_input)
    )
    with pytest.raises(HarnessError, match=r"ADE_val_00000001: the model returned the label \d+, expected 0 to 149"):
        evaluated(Labels(keep, shift=100))
    with pytest.raises(HarnessError, match="the model returned the label -"):
        evaluated(Labels(keep, shift=-150))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["argmax", "argmax that keeps its axis", "argmax of unknown shape", "softmax"])
def test_an_onnx_file_that_ends_in_an_argmax_or_a_softmax(tmp_path: Path, end: str) -> None:
    weights = np.random.default_rng(0).normal(size=(150, 3, 1, 1)).astype(np.float32)
    last = {
        "argmax": helper.make_node("ArgMax", ["scores"], ["last"], axis=1, keepdims=0),
        "argmax that keeps its axis": helper.make_node("ArgMax", ["scores"], ["last"], axis=1, keepdims=1),
        "argmax of unknown shape": helper.make_node("ArgMax", ["scores"], ["last"], axis=1, keepdims=1),
        "softmax": helper.make_node("Softmax", ["scores"], ["last"], axis=1),
    }
    nodes = [helper.make_node("Conv", ["images", "weights"], ["scores"]), last[end]]
    sizes = {"argmax": ["n", "h", "w"], "softmax": ["n", 150, "h", "w"]}.get(
        end, ["n", "one" if "unknown" in end else 1, "h", "w"]
    )
    kind = TensorProto.FLOAT if end == "softmax" else TensorProto.INT64
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("last", kind, sizes)],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "net.onnx")
    layer = nn.Conv2d(3, 150, 1, bias=False)
    layer.weight.data = torch.from_numpy(weights)
    one, two = evaluated(tmp_path / "net.onnx"), evaluated(layer)
    assert (one.matrix != two.matrix).sum() <= 4  # two convolutions: a tie may fall otherwise


def two_outputs(path: Path, channels: int = 150) -> tuple[nn.Module, nn.Module]:
    """Write a file with a main and an auxiliary head, the auxiliary first; returns both as networks."""
    weights = np.random.default_rng(0).normal(size=(2, 150, 3, 1, 1)).astype(np.float32)
    shown = {"aux": channels, "out": 150}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", f"w{i}"], [name]) for i, name in enumerate(("aux", "out"))], "net",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", c, "h", "w"]) for name, c in shown.items()],
        [onnx.numpy_helper.from_array(w[:c], f"w{i}") for i, (w, c) in enumerate(zip(weights, shown.values(), strict=True))],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    layers = nn.Conv2d(3, 150, 1, bias=False), nn.Conv2d(3, 150, 1, bias=False)
    for layer, w in zip(layers, weights, strict=True):
        layer.weight.data = torch.from_numpy(w)
    return layers


@pytest.mark.slow
def test_an_output_of_several_is_chosen_and_named(tmp_path: Path) -> None:
    aux, out = two_outputs(tmp_path / "net.onnx")
    first = evaluated(tmp_path / "net.onnx")
    chosen = evaluated(tmp_path / "net.onnx", **{"model.output": "out"})
    for one, two in ((first, aux), (chosen, out)):
        assert (one.matrix != evaluated(two).matrix).sum() <= 4  # two convolutions: a tie may fall otherwise
    assert any("of the file's outputs aux is taken, not out: model.output chooses" in note for note in first.notes)
    assert not any("outputs" in note for note in chosen.notes)
    with pytest.raises(HarnessError, match=r"no output named 'oot' \(model.output\) .*the model has aux tensor"):
        evaluated(tmp_path / "net.onnx", **{"model.output": "oot"})
    with pytest.raises(HarnessError, match=r"Labels: let the graph end in ArgMax over the channels\."):
        evaluated(tmp_path / "net.onnx", **{"model.output": "oot"})
    with pytest.raises(HarnessError, match="model.output=out: chooses an output of an ONNX file; the model is a demo"):
        ade.load_model("demo", options={"model.output": "out"})


def test_an_output_of_another_number_of_classes_leads_to_the_choice(tmp_path: Path) -> None:
    two_outputs(tmp_path / "net.onnx", channels=19)
    with pytest.raises(HarnessError, match=r"outputs 19 channels, .*aux is taken, not out: model.output chooses"):
        evaluated(tmp_path / "net.onnx")
    assert ade.load_model(tmp_path / "net.onnx", options={"model.output": "out"}).classes.names[0] == "wall"


@pytest.mark.slow
@pytest.mark.parametrize(("side", "greatest"), [("height", (100, 4000)), ("width", (4000, 100))])
def test_a_program_that_takes_some_sizes_says_which(tmp_path: Path, side: str, greatest: tuple[int, int]) -> None:
    sides = {2 + i: torch.export.Dim("hw"[i], min=8, max=maximum) for i, maximum in enumerate(greatest)}
    program = torch.export.export(network(), (torch.zeros(1, 3, 64, 48),), dynamic_shapes=(sides,))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(
        HarnessError, match=rf"ADE_val_00000001: the model takes inputs with a {side} of 8 to 100, .* makes"
    ):
        evaluated(tmp_path / "net.pt2")
    fixed = {
        2 + ["width", "height"].index(side): None,
        2 + ["height", "width"].index(side): torch.export.Dim("s", min=400),
    }
    program = torch.export.export(network(), (torch.zeros(1, 3, 480, 480),), dynamic_shapes=(fixed,))
    torch.export.save(program, tmp_path / "one.pt2")
    with pytest.raises(HarnessError, match=r"takes inputs with a (height|width) of (480 alone|400 or more), .* makes"):
        evaluated(tmp_path / "one.pt2")
    unbounded = {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(network(), (torch.zeros(1, 3, 64, 48),), dynamic_shapes=(unbounded,))
    torch.export.save(program, tmp_path / "any.pt2")
    assert hashes(evaluated(tmp_path / "any.pt2")) == hashes(evaluated(network()))


@pytest.mark.slow
def test_a_program_for_squares_says_so(tmp_path: Path) -> None:
    side = torch.export.Dim("s", min=16, max=4000)
    program = torch.export.export(network(), (torch.zeros(1, 3, 64, 64),), dynamic_shapes=({2: side, 3: side},))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(
        HarnessError, match=r"ADE_val_00000001: the model takes squares only, .*makes \d+x\d+ .* windows"
    ):
        evaluated(tmp_path / "net.pt2")
    windows = {"inference.window.crop": 64, "inference.window.stride": 48}
    options = {"protocol": "mmseg_slide_512", "inference.resize.side": 96, **windows}
    assert hashes(evaluated(tmp_path / "net.pt2", **options)) == hashes(evaluated(network(), **options))


@pytest.mark.slow
def test_an_onnx_file_with_one_fixed_side_says_so_before_the_first_image(tmp_path: Path) -> None:
    for size, side in ((("h", 512), "width"), ((512, "w"), "height")):
        write_onnx(tmp_path / "net.onnx", size=size)
        with pytest.raises(HarnessError, match=f"ADE_val_00000001: the model takes inputs with a {side} of 512 alone"):
            evaluated(tmp_path / "net.onnx")


class Elsewhere(nn.Module):
    """A program that was traced on another device keeps its name."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 150, 4, 4, device="cuda") + images.mean()


class Nowhere(nn.Module):
    """Meta is a device that each machine has."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 150, 4, 4, device="meta")


def test_a_network_that_torch_save_wrote_is_no_torchscript(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(3, 150, 1), tmp_path / "net.pt")
    with pytest.raises(HarnessError, match=r"net\.pt: was written by torch\.save, and is no TorchScript") as error:
        evaluated(tmp_path / "net.pt")
    assert "corrupted" not in str(error.value)


def test_torchscript_says_its_reason(tmp_path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.Conv2d(3, 150, 1).half())).save(tmp_path / "net.ts")
    with pytest.raises(HarnessError) as found:
        evaluated(tmp_path / "net.ts")
    assert re.search(
        r"the model failed on an input of \[1, 3, \d+, \d+\] \(RuntimeError: .*(Half|half|type)", str(found.value)
    )
    assert "interpreter" not in str(found.value)
    assert len(str(found.value)) < 300
    torch.jit.script(Elsewhere()).save(tmp_path / "elsewhere.ts")
    message = r"\(RuntimeError: .*\)\. It names a device in its code, and runs on cpu here: export it on that device\."
    with pytest.raises(HarnessError, match=message):
        evaluated(tmp_path / "elsewhere.ts")
    with pytest.raises(HarnessError, match="returned a tensor on meta for an input on cpu: expected the same device"):
        evaluated(Nowhere())
