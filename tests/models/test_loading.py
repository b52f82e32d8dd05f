"""Every kind of model, and every way that loading can go wrong."""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.config.model import ModelConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.labels import Classes, default_colors
from ade_harness.errors import HarnessError
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.models.checkpoint.public import hub_checkpoint
from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.class_map import ClassMap, resolve_class_map
from ade_harness.models.formats.demo import WEIGHTS
from ade_harness.models.loading import load_model
from ade_harness.models.outputs import MaskLogits, other_scores, read_output
from ade_harness.models.registry import family_of
from ade_harness.models.systems.segformer import SEGFORMER
from tests.models.checkpoint.reading import read_state_dict
from tests.models.systems.test_segformer import B0, official

__all__ = ["official"]


class Tiny(nn.Module):
    """A custom model: 1x1 convolution and stride 4."""

    def __init__(self, channels: int = 150) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images)


def exploding() -> nn.Module:
    raise RuntimeError("no luck")


def model_cfg(*overrides: str) -> ModelConfig:
    return compose_config([*overrides, "dataset=ade20k", "dataset.root=."]).model


def write_onnx(
    path: Path, channels: int = 150, size: Any = ("h", "w"), names: str | None = None, rank: int = 4
) -> None:
    """Write an ONNX model: one convolution."""
    weights = Tiny(channels).state_dict()
    tensors = [
        helper.make_tensor(n, TensorProto.FLOAT, list(weights[k].shape), weights[k].reshape(-1).tolist())
        for n, k in (("w", "conv.weight"), ("b", "conv.bias"))
    ]
    nodes = [helper.make_node("Conv", ["images", "w", "b"], ["logits"], strides=[4, 4])]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", channels, "oh", "ow"])
    if rank != 4:
        nodes.append(helper.make_node("ArgMax", ["logits"], ["labels"], axis=1, keepdims=0))
        output = helper.make_tensor_value_info("labels", TensorProto.INT64, ["n", "oh", "ow"])
    if rank == 2:
        nodes.append(helper.make_node("ReduceMax", ["labels"], ["largest"], axes=[2], keepdims=0))
        output = helper.make_tensor_value_info("largest", TensorProto.INT64, ["n", "oh"])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, *size])],
        [output],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    if names is not None:
        helper.set_model_props(model, {"names": names})
    onnx.save(model, path)


def test_demo_weights_are_small_and_load() -> None:
    from importlib.resources import files

    assert len(files("ade_harness.models.formats").joinpath(WEIGHTS).read_bytes()) < 1_000_000
    model = load_model(compose_config([]).model)
    assert model.weights == "demo"
    assert model.module(torch.zeros(1, 3, 33, 50)).shape == (1, 150, 9, 13)


@pytest.mark.slow
def test_custom_model_with_arguments_and_checkpoint(tmp_path: Path) -> None:
    target = "model._target_=tests.models.test_loading.Tiny"
    model = load_model(model_cfg("model=custom", target, "model.kwargs.channels=7"))
    assert model.module(torch.zeros(1, 3, 8, 8)).shape[1] == 7
    assert model.weights == "constructed"
    weights = Tiny().state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    model = load_model(model_cfg("model=custom", target, f"model.checkpoint={tmp_path / 'w.safetensors'}"))
    assert model.weights == "pretrained"
    assert torch.equal(model.module.state_dict()["conv.weight"], weights["conv.weight"])
    assert model.facts["sha256"] == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing.here.Net", "there is no module 'nothing'"),
        ("tests.models.test_loading.Missing", "Error loading 'tests.models.test_loading.Missing'"),
        ("Net", "there is no module 'Net'"),
        ("tests.models.test_loading.exploding", r"its construction failed \(RuntimeError: no luck\)"),
        ("builtins.dict", "is a type, expected an nn.Module class"),
        ("os.system", "is a builtin_function_or_method, expected an nn.Module class"),
        ("tests.models.test_loading.save_file", "is a function, expected an nn.Module class"),
    ],
)
def test_custom_model_that_is_none(target: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        load_model(model_cfg("model=custom", f"model._target_={target}"))


def test_custom_model_with_wrong_arguments() -> None:
    with pytest.raises(HarnessError, match="does not take these arguments"):
        load_model(model_cfg("model=custom", "model._target_=tests.models.test_loading.Tiny", "model.kwargs.x=1"))


def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.script(Tiny(9)).save(str(path))
    model = load_model(model_cfg("model=torchscript", f"model.path={path}"))
    assert model.module(torch.zeros(1, 3, 8, 12)).shape == (1, 9, 2, 3)
    path.write_bytes(b"no model")
    with pytest.raises(HarnessError, match="not a TorchScript file"):
        load_model(model_cfg("model=torchscript", f"model.path={path}"))


def test_onnx_runs_and_shows_its_sizes_and_names(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_onnx(path, 5, names='["wall", "sky", "tree", "floor", "bed"]')
    model = load_model(model_cfg("model=onnx", f"model.path={path}"))
    assert model.module(torch.zeros(2, 3, 8, 12)).shape == (2, 5, 2, 3)
    assert (model.channels, model.fixed_size) == (5, None)
    assert model.class_names == ["wall", "sky", "tree", "floor", "bed"]
    write_onnx(path, 5, size=(64, 96), names="{0: 'wall', 1: 'sky', 2: 'tree', 3: 'floor', 4: 'bed'}")
    model = load_model(model_cfg("model=onnx", f"model.path={path}"))
    assert model.fixed_size == (64, 96)
    assert model.class_names is not None
    assert model.class_names[1] == "sky"


def test_onnx_that_gives_labels_or_is_none(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(HarnessError, match=r"model\.path=.*m\.onnx: no such file"):
        load_model(model_cfg("model=onnx", f"model.path={path}"))
    path.write_bytes(b"no model")
    with pytest.raises(HarnessError, match="onnxruntime cannot load this file"):
        load_model(model_cfg("model=onnx", f"model.path={path}"))
    write_onnx(path, rank=3)
    assert load_model(model_cfg("model=onnx", f"model.path={path}")).channels is None
    of_numbers = onnx.load(path)
    of_numbers.graph.node.append(helper.make_node("Cast", ["labels"], ["numbers"], to=TensorProto.FLOAT))
    of_numbers.graph.output[0].CopyFrom(helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["n", "oh", "ow"]))
    onnx.save(of_numbers, path)
    with pytest.raises(HarnessError, match=r"ArgMax over the channels, and in a Cast of numbers to int64\."):
        load_model(model_cfg("model=onnx", f"model.path={path}"))
    write_onnx(path, rank=2)
    with pytest.raises(HarnessError, match=r"no output of floating-point scores .* or of integer labels \[N, h, w\]"):
        load_model(model_cfg("model=onnx", f"model.path={path}"))


@pytest.mark.parametrize("kind", ["semantic", "universal", "oneformer"])
def test_transformers_checkpoints(tmp_path: Path, kind: str) -> None:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        OneFormerConfig,
        OneFormerForUniversalSegmentation,
        SegformerConfig,
        SegformerForSemanticSegmentation,
        SwinConfig,
    )

    names = dict(enumerate(list(ade20k_classes().names)))
    folder = tmp_path / kind
    if kind == "semantic":
        small = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}
        SegformerForSemanticSegmentation(SegformerConfig(id2label=names, **small)).save_pretrained(folder)
    backbone = SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    if kind == "universal":
        config = Mask2FormerConfig(
            backbone_config=backbone, hidden_dim=32, mask_feature_size=32, feature_size=32, num_queries=5,
            encoder_layers=1, decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16,
            id2label=names,
        )  # fmt: skip
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    if kind == "oneformer":
        config = OneFormerConfig(
            backbone_config=backbone, hidden_dim=32, mask_dim=32, conv_dim=32, num_queries=5, encoder_layers=1,
            decoder_layers=2, num_attention_heads=2, encoder_feedforward_dim=16, dim_feedforward=16, query_dec_layers=1,
            text_encoder_width=32, text_encoder_num_layers=1, text_encoder_proj_layers=1, is_training=False,
            task_seq_len=77, id2label=names,
        )  # fmt: skip
        OneFormerForUniversalSegmentation(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "do_normalize": True})
    )
    model = load_model(model_cfg("model=hf", f"model.id={folder}"))
    assert model.mean == pytest.approx((127.5,) * 3)
    assert model.std == pytest.approx((63.75,) * 3)
    assert model.channels == 150
    with torch.inference_mode():
        scores = model.module(torch.randn(1, 3, 64, 96))
    assert len(model.facts["sha256"]) == 64
    if kind == "semantic":
        assert scores.shape == (1, 150, 16, 24)
    else:
        assert isinstance(scores, MaskLogits)
        assert scores.classes.shape[2] == 151
        assert scores.masks.shape[1] == scores.classes.shape[1]
        assert scores.masks.shape[2:] == (16, 24)


def test_transformers_checkpoint_without_normalisation(tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    small = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16}
    names = dict(enumerate(list(ade20k_classes().names)))
    SegformerForSemanticSegmentation(SegformerConfig(id2label=names, **small)).save_pretrained(tmp_path)
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps({"do_normalize": False, "rescale_factor": 1 / 255}))
    model = load_model(model_cfg("model=hf", f"model.id={tmp_path}"))
    assert (model.mean, model.std) == ((0.0,) * 3, pytest.approx((255.0,) * 3))
    settings.write_text(json.dumps({"do_rescale": "yes"}))
    with pytest.raises(HarnessError, match="do_rescale is 'yes', expected true or false"):
        load_model(model_cfg("model=hf", f"model.id={tmp_path}"))


OF_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.mark.parametrize(
    ("kind", "left_out", "saved"),
    [
        ("MobileViT", (), {}),  # flips, and never normalises, although the file that it saves has statistics
        ("MobileViT", (), {"do_normalize": True, **OF_IMAGENET}),
        ("MobileViT", (), {"do_flip_channel_order": False}),
        ("MobileViT", ("image_processor_type", "image_mean", "image_std"), {"feature_extractor_type": "MobileViTFeatureExtractor"}),
        ("MobileViT", ("image_processor_type", "do_flip_channel_order"), {}),  # the network's usual processor is meant
        ("Segformer", ("image_mean", "image_std", "do_normalize"), {}),  # the class's own: ImageNet's
        ("DPT", ("image_mean", "image_std"), {}),  # 0.5
        ("DPT", (), {"do_flip_channel_order": True, **OF_IMAGENET}),  # a step that DPT's has not
        ("DPT", (), {"do_normalize": False}),
        ("GLPN", (), {}),  # takes the step, and leaves it open: not done
        ("GLPN", (), {"do_normalize": True, **OF_IMAGENET}),
        ("RTDetr", ("do_normalize",), OF_IMAGENET),  # off by its class
        ("DPT", (), {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [50.0, 60.0, 70.0]}),
    ],
)  # fmt: skip
def test_pixels_are_those_of_transformers_own_processor(
    kind: str, left_out: tuple[str, ...], saved: dict[str, Any], tmp_path: Path
) -> None:
    import transformers

    small = {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 8, 8, 16, 16, 16], "aspp_out_channels": 16,
             "id2label": dict(enumerate(list(ade20k_classes().names)))}  # fmt: skip
    transformers.MobileViTForSemanticSegmentation(transformers.MobileViTConfig(**small)).save_pretrained(tmp_path)
    plain = getattr(transformers, f"{kind}ImageProcessorPil")
    settings = tmp_path / "preprocessor_config.json"
    content = {k: v for k, v in plain().to_dict().items() if k not in left_out} | saved
    settings.write_text(json.dumps(content | {"do_resize": False, "do_center_crop": False}))
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    expected = plain.from_pretrained(tmp_path).preprocess([image], return_tensors="pt")["pixel_values"][0]
    seen: list[torch.Tensor] = []
    cfg = compose_config(["model=hf", f"model.id={tmp_path}", "dataset=demo", "inference=original_size"])
    predictor = NetworkPredictor(load_model(cfg.model), cfg.inference, cfg.model, "torch")
    predictor.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    [_] = predictor.predict([predictor.prepare("x", image)], torch.device("cpu"), Stopwatch(torch.device("cpu")))
    torch.testing.assert_close(seen[0][0, :, :64, :96], expected, rtol=0, atol=1e-6)  # a rounding of values up to 4


def test_a_network_with_an_attribute_called_module(tmp_path: Path) -> None:
    state = {"module.weight": torch.zeros(2), "head.weight": torch.ones(2)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert read_state_dict(tmp_path / name).keys() == state.keys()


def test_transformers_checkpoint_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="cannot be loaded"):
        load_model(model_cfg("model=hf", f"model.id={tmp_path}"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(HarnessError, match="a bert checkpoint"):
        load_model(model_cfg("model=hf", f"model.id={tmp_path}"))


# weight files


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("/tmp/ade_harness_was_here", "w"))


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "evil": Evil()}, path)
    with pytest.raises(HarnessError, match=r"evil\.pth: this file holds more than tensors"):
        read_state_dict(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(HarnessError, match=r"evil\.pth"):
        read_state_dict(path)
    assert not Path("/tmp/ade_harness_was_here").exists()


def test_damaged_weight_files(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(100)}, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        path = tmp_path / name
        assert read_state_dict(path)["a"].shape == (100,)
        path.write_bytes(path.read_bytes()[:150])
        with pytest.raises(HarnessError, match=name):
            read_state_dict(path)
    (tmp_path / "text.pth").write_text("import torch")
    with pytest.raises(HarnessError, match="not a torch file"):
        read_state_dict(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(HarnessError, match="holds no state_dict"):
        read_state_dict(tmp_path / "list.pth")


def test_wrappers_and_strict_loading(tmp_path: Path) -> None:
    state = Tiny().state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "meta": {"epoch": 3}}, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    model = Tiny()
    load_strictly(model, read, Strictness("w"))
    assert torch.equal(model.conv.weight, state["conv.weight"])
    with pytest.raises(HarnessError, match=r"1 missing: conv\.bias; 1 unexpected: head"):
        load_strictly(model, {"conv.weight": read["conv.weight"], "head": read["conv.bias"]}, Strictness("w"))
    load_strictly(model, {"conv.weight": read["conv.weight"]}, Strictness("w", ("conv.bias",)))


def test_checkpoint_missing_or_with_another_hash(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"model\.checkpoint=.*: no such file"):
        load_model(model_cfg("model=segformer_b0", f"model.checkpoint={tmp_path / 'x.pth'}"))
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(HarnessError, match="checkpoint_sha256 expects abc"):
        load_model(
            model_cfg("model=segformer_b0", f"model.checkpoint={tmp_path / 'x.pth'}", "model.checkpoint_sha256=abc")
        )


def test_official_checkpoint_file_of_segformer(tmp_path: Path, official: dict[str, torch.Tensor]) -> None:
    torch.save({"meta": {"CLASSES": ["wall"]}, "state_dict": official}, tmp_path / "b0.pth")
    model = load_model(model_cfg("model=segformer_b0", f"model.checkpoint={tmp_path / 'b0.pth'}"))
    assert model.weights == "pretrained"
    assert model.facts["parameters"] == 3_752_694


# the hub, on loopback


class Hub(ThreadingHTTPServer):
    """Answers like the hub for one file."""

    content = b""
    commit = "489d5cd81a0b59fab9b7ea758d3548ebe99677da"
    break_after: int | None = None
    requests: list[str | None]


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def _head(self, start: int, status: int) -> None:
        self.send_response(status)
        self.send_header("ETag", '"' + hashlib.sha256(self.server.content).hexdigest() + '"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.send_header("Accept-Ranges", "bytes")
        if start:
            total = len(self.server.content)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.end_headers()

    def do_HEAD(self) -> None:
        if "gated" in self.path:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "model.safetensors" not in self.path:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._head(0, 200)

    def do_GET(self) -> None:
        if "/resolve/" not in self.path:  # the client's other questions
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self._head(start, 206 if start else 200)
        body = self.server.content[start:]
        if self.server.break_after is not None:
            self.wfile.write(body[: self.server.break_after])
            self.server.break_after = None
            self.close_connection = True
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    served = Hub(("127.0.0.1", 0), HubHandler)
    served.requests = []
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{served.server_port}")
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{served.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield served
    served.shutdown()
    served.server_close()


def test_hub_download_is_resumed_checked_and_cached(
    hub: Hub, tmp_path: Path, official: dict[str, torch.Tensor]
) -> None:
    save_file({k: v.contiguous() for k, v in SEGFORMER.hub_names(official).items()}, tmp_path / "m.safetensors")
    hub.content = (tmp_path / "m.safetensors").read_bytes()
    hub.break_after = 12_000_000  # the hub client writes 10 MB at a time
    digest = hashlib.sha256(hub.content).hexdigest()
    cfg = model_cfg("model=segformer_b0", f"model.hub.sha256={digest}")
    model = load_model(cfg)
    assert model.facts["sha256"] == digest
    assert model.facts["origin"] == f"nvidia/segformer-b0-finetuned-ade-512-512@{hub.commit}/model.safetensors"
    assert hub.requests[0] is None
    assert hub.requests[1] is not None  # only the rest
    load_model(cfg)
    assert len(hub.requests) == 2  # from the cache
    with pytest.raises(HarnessError, match=r"model\.hub\.sha256 expects 6ae39add"):
        load_model(model_cfg("model=segformer_b0"))


def test_hub_errors(hub: Hub) -> None:
    with pytest.raises(HarnessError, match="not found on the hub"):
        hub_checkpoint("a/b", "other.bin", hub.commit, None)
    with pytest.raises(HarnessError, match="this repository is gated"):
        hub_checkpoint("a/gated", "model.safetensors", hub.commit, None)


def test_no_network_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HarnessError, match=r"cannot be reached\. Download it elsewhere"):
        hub_checkpoint("a/b", "model.safetensors", "489d5cd81a0b59fab9b7ea758d3548ebe99677da", None)


# class maps


def test_150_channels_need_no_map() -> None:
    found = resolve_class_map(150, None, list(ade20k_classes().names), ade20k_classes())
    labels = torch.tensor([[0, 149]], dtype=torch.uint8)
    assert torch.equal(found.classes_of(labels), labels)
    assert found.select(torch.zeros(150, 2, 2)).shape[0] == 150


def test_a_map_leaves_channels_out_and_renames_the_rest() -> None:
    found = resolve_class_map(4, [None, 7, None, 3], None, ade20k_classes())
    scores = torch.tensor([9.0, 1.0, 8.0, 2.0])[:, None, None]
    kept = found.select(scores)
    assert kept.flatten().tolist() == [1.0, 2.0]
    assert found.classes_of(kept.argmax(0)).item() == 3
    assert "148 of the 150 classes can never be predicted" in (found.note or "")


def rotated_names(number: int) -> list[str]:
    names = list(ade20k_classes().names)
    return [*names[1:number], names[0], *names[number:]]


def test_one_name_may_have_another_place() -> None:
    names = list(ade20k_classes().names)
    doubled = [names[1], *names[1:]]
    found = resolve_class_map(150, None, doubled, ade20k_classes())
    assert found.class_of == tuple(range(150))
    assert "channel 0 is counted as class 0, the model's own name for it is 'building' (1 channels disagree)" in str(
        found.note
    )
    # a synonym that another class has too
    assert resolve_class_map(150, None, ["bulletin board", *names[1:]], ade20k_classes()).is_identity
    swapped = [names[1], names[0], *names[2:]]
    with pytest.raises(HarnessError, match=r"channel 0 is 'building', which is class 1, .*; 2 channels differ"):
        resolve_class_map(150, None, swapped, ade20k_classes())
    assert resolve_class_map(150, None, names, ade20k_classes()).note is None


@pytest.mark.parametrize(("others", "refused"), [(2, False), (3, True)])
def test_a_tenth_of_the_names_may_be_those_of_other_classes(others: int, refused: bool) -> None:
    """By a synonym, which is no class's own name: 2 of 20 may be other spellings, 3 are another order."""
    names = tuple("abcdefghijklmnopqrst")
    classes = Classes("d", names, default_colors(20), tuple((name, f"another {name}") for name in names))
    carried = [f"another {names[channel + 1]}" if channel < others else name for channel, name in enumerate(names)]
    if refused:
        with pytest.raises(HarnessError, match=r"channel 0 is 'another b', which is class 1, .*; 3 channels differ"):
            resolve_class_map(20, None, carried, classes)
    else:
        assert "channel 0 is counted as class 0" in str(resolve_class_map(20, None, carried, classes).note)


@pytest.mark.parametrize(("others", "differ"), [(2, 2), (3, 5)])
def test_names_of_other_classes_are_counted_alone_where_the_rest_may_be_spellings(others: int, differ: int) -> None:
    """Two of 40 have changed places. Two more by a synonym make a tenth; three more are another order altogether."""
    names = tuple(f"n{i}" for i in range(40))
    classes = Classes("d", names, default_colors(40), tuple((name, f"another {name}") for name in names))
    carried = [names[1], names[0], *(f"another n{i + 1}" for i in range(2, 2 + others)), *names[2 + others :]]
    with pytest.raises(HarnessError, match=f"channel 0 is 'n1', which is class 1, .*; {differ} channels differ"):
        resolve_class_map(40, None, carried, classes)


def test_notes_about_names_and_about_classes_stand_beside_each_other() -> None:
    """Names of another number are not used, and classes are left out."""
    found = resolve_class_map(3, [0, None, 1], ["wall", "x"], ade20k_classes())
    first, second = str(found.note).split("; ")
    assert first == str(resolve_class_map(3, [0, None, 1], None, ade20k_classes()).note)
    assert second == "the model's 2 class names are not used: it outputs 3 channels"
    whole = resolve_class_map(150, None, ["wall"], ade20k_classes())
    assert whole.note == "the model's 1 class names are not used: it outputs 150 channels"


def test_the_two_places_of_one_channel_more_are_written_down() -> None:
    with pytest.raises(HarnessError, match=r"'other': null,0,1,\.\.\.,149 if it is first, 0,\.\.\.,149,null if last\."):
        resolve_class_map(151, None, None, ade20k_classes())


def test_a_few_names_in_another_order_are_refused() -> None:
    with pytest.raises(HarnessError, match="15 channels differ"):
        resolve_class_map(150, None, rotated_names(15), ade20k_classes())
    # names of which only half are ADE20K's say nothing about the order
    half = [name if index % 2 else f"thing {index}" for index, name in enumerate(rotated_names(150))]
    assert resolve_class_map(150, None, half, ade20k_classes()).class_of == tuple(range(150))
    with pytest.raises(HarnessError, match="not in the order of ADE20K"):
        resolve_class_map(150, None, [rotated_names(150)[0], *half[1:]], ade20k_classes())


@pytest.mark.parametrize(
    ("channels", "class_map", "names", "message"),
    [
        (32, None, None, "outputs 32 channels, ADE20K has 150"),
        (151, None, None, "usually 'other'"),
        (19, None, None, "usual for Cityscapes"),
        (3, None, ["sky", "wall", "other"], r"model\.class_map=\[2,0,null\]"),
        (3, [0, 1], None, r"has 2 entries, but the model outputs 3 channels: one entry per channel \(0\.\.149"),
        (2, [0, 150], None, r"model\.class_map: 150: ADE20K has the classes 0\.\.149"),
        (150, None, rotated_names(16), "16 channels differ"),
        (150, None, list(ade20k_classes().names)[::-1], "not in the order of ADE20K: channel 0 is 'flag'"),
    ],
)
def test_maps_that_do_not_fit(channels: int, class_map: Any, names: Any, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        resolve_class_map(channels, class_map, names, ade20k_classes())


def test_the_map_that_is_proposed_by_names_is_right_or_asks() -> None:
    """A class's own name wins over others' synonyms (stool, pot, screen); what nobody has is for the user to say."""
    names = ["background", *ade20k_classes().names]
    with pytest.raises(HarnessError) as error:
        resolve_class_map(151, None, names, ade20k_classes())
    assert f"model.class_map=[null,{','.join(map(str, range(150)))}]." in str(error.value)
    names[3], names[7] = "firmament", "stool"
    with pytest.raises(HarnessError) as error:
        resolve_class_map(151, None, names, ade20k_classes())
    assert "=[null,0,1,?,3,4,5,110,7," in str(error.value)
    assert "for each ?: no class, or more than one, has the name of channel 3 'firmament'." in str(error.value)


def test_names_mean_their_own_class_or_the_only_one() -> None:
    classes = Classes(
        "d", ("a", "b", "c", "d"), default_colors(4), (("a", "x", "b"), ("b", "y"), ("c", "x"), ("d", "Z"))
    )
    assert [classes.find(name) for name in ("a", "B ", "c", "x", "y", "z", "none")] == [0, 1, 2, None, 1, 3, None]
    twice = Classes("d", ("a", "a", "b"), default_colors(3))
    assert [twice.find(name) for name in ("a", "b")] == [None, 2]


@pytest.mark.parametrize(("channels", "is_identity"), [(3, True), (150, True), (255, True), (256, False), (847, False)])
def test_a_map_of_any_number_of_channels(channels: int, is_identity: bool) -> None:
    """Networks with more channels than a label has values, and of fewer than there are classes."""
    classes = Classes("many", tuple(f"c{i}" for i in range(255)), default_colors(255))
    found = resolve_class_map(channels, [i % 255 for i in range(channels)], None, classes)
    assert found.is_identity == is_identity
    last = torch.tensor([[channels - 1]], dtype=torch.int32)
    assert found.classes_of(last).item() == (channels - 1) % 255


def test_names_that_disagree_with_the_map_are_noted() -> None:
    found = resolve_class_map(3, [0, 1, 2], ["wall", "sky", "building"], ade20k_classes())
    assert "model's own name for it is 'sky'" in (found.note or "")


@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"out": t}, lambda t: {"logits": t}, lambda t: (t, 1), lambda t: [t]]
)
def test_outputs_in_usual_wrappers(wrap: Callable[[torch.Tensor], Any]) -> None:
    scores = torch.zeros(1, 2, 3, 4)
    assert read_output(wrap(scores), "x") is scores


@pytest.mark.parametrize(
    ("returned", "others"),
    [
        (lambda t: (t, t.clone()), 1),
        (lambda t: [t, t[..., :2], t.long(), t[:, :1], "x"], 1),  # labels and maps of other classes are no scores
        (lambda t: (t, 1), 0),
        (lambda t: {"out": t, "aux": t}, 0),  # named
        (lambda t: ([t], t), 0),
        (lambda t: t, 0),
        (lambda t: MaskLogits(t, t), 0),
    ],
)
def test_scores_that_are_passed_over_are_noted(returned: Callable[[torch.Tensor], Any], others: int) -> None:
    assert other_scores(returned(torch.zeros(1, 2, 3, 4))) == others


class Universal:
    """As transformers' universal segmentation output."""

    class_queries_logits = torch.zeros(1, 5, 151)
    masks_queries_logits = torch.ones(1, 5, 3, 4)


@pytest.mark.parametrize(
    "output",
    [
        MaskLogits(torch.zeros(1, 5, 151), torch.ones(1, 5, 3, 4)),
        {"pred_logits": torch.zeros(1, 5, 151), "pred_masks": torch.ones(1, 5, 3, 4), "aux_outputs": []},
        Universal(),
        SimpleNamespace(logits=torch.zeros(1, 5, 151), pred_masks=torch.ones(1, 5, 3, 4)),  # DETR's
    ],
)
def test_mask_classification_outputs(output: Any) -> None:
    found = read_output(output, "x")
    assert isinstance(found, MaskLogits)
    assert found.classes.shape == (1, 5, 151)
    assert found.masks.min() == 1


@pytest.mark.parametrize("output", [torch.zeros(1, 2, 3), {"boxes": 1}, None, ()])
def test_outputs_without_scores(output: Any) -> None:
    with pytest.raises(HarnessError, match=r"x: the model returned .* expected logits"):
        read_output(output, "x")


def test_a_dict_without_scores_says_what_it_has() -> None:
    with pytest.raises(
        HarnessError, match=r"returned a dict, expected logits .* Its keys are 'pred', 'aux'; read are 'logits'"
    ):
        read_output({"pred": torch.zeros(1, 2, 3, 3), "aux": 1}, "x")


def test_architecture_can_be_changed_on_the_command_line() -> None:
    cfg = model_cfg("model=segformer_b0", "model.weights=random", "model.architecture.head.decoder_hidden_size=64")
    assert family_of("segformer").flat(cfg.architecture) == B0 | {"decoder_hidden_size": 64}
    assert load_model(cfg).weights == "random"


def test_architectures_of_older_configurations_are_flat() -> None:
    cfg = model_cfg("model=segformer_b0", "model.weights=random", "model.architecture.decoder_hidden_size=64")
    assert family_of("segformer").flat(cfg.architecture) == B0 | {"decoder_hidden_size": 64}
    assert family_of("segformer").flat(dict(B0)) == B0


def test_a_field_of_another_section_is_refused() -> None:
    cfg = model_cfg("model=segformer_b0", "model.weights=random", "model.architecture.head.depths=[1,1,1,1]")
    with pytest.raises(HarnessError, match=r"is a field of the backbone: use model\.architecture\.backbone\.depths"):
        load_model(cfg)


@pytest.mark.slow
def test_targets_follow_hydras_rules(tmp_path: Path) -> None:
    """Nested targets are made, and what Hydra refuses to call is refused."""
    arguments = [
        "model=custom",
        "model._target_=torch.nn.Sequential",
        "model.kwargs._args_=[{_target_:torch.nn.Identity}]",
    ]
    module = load_model(model_cfg(*arguments)).module
    assert [type(part) for part in module.children()] == [torch.nn.Identity]
    nested = "model.kwargs._args_=[{_target_:os.system,command:'touch x'}]"
    with pytest.raises(HarnessError, match=r"model\._target_=torch\.nn\.Sequential: .*blocklisted"):
        load_model(model_cfg("model=custom", "model._target_=torch.nn.Sequential", nested))


@pytest.mark.parametrize(("channels", "more"), [(5, ""), (6, " and 1 more"), (8, " and 3 more")])
def test_five_channels_without_a_class_are_listed(channels: int, more: str) -> None:
    names = [*(f"thing {i}" for i in range(channels)), *ade20k_classes().names[channels:], "other"]
    with pytest.raises(HarnessError) as error:
        resolve_class_map(len(names), None, names, ade20k_classes())
    listed = ", ".join(f"{i} 'thing {i}'" for i in range(5))
    assert f"has the name of channel {listed}{more}." in str(error.value)


def test_a_map_that_leaves_channels_out_is_no_identity() -> None:
    found = resolve_class_map(4, [0, 1, None, 2], None, ade20k_classes())
    assert not found.is_identity
    assert not ClassMap((0, 1), (0, 1)).is_identity  # two kept channels of more
    assert ClassMap(None, (0, 1)).is_identity
    assert not ClassMap(None, (1, 0)).is_identity


@pytest.mark.parametrize(
    "overrides", [["model=hf", "model.id=x"], ["model=torchscript", "model.path=x.pt"], ["model=smp", "model.id=x"]]
)
def test_random_weights_of_what_reads_none_are_refused(overrides: list[str]) -> None:
    with pytest.raises(HarnessError, match="model.weights: cannot be chosen for model.kind="):
        compose_config([*overrides, "model.weights=random", "dataset=demo"])


def test_statistics_of_another_scale_are_refused() -> None:
    shares = ["model.input.mean=[0.485,0.456,0.406]", "model.input.std=[0.229,0.224,0.225]"]
    with pytest.raises(
        HarnessError, match=r"on the scale 0\.\.1, and pixels on that of 0\.\.255: set model\.input\.max_value=1"
    ):
        compose_config(["model=segformer_b0", *shares, "dataset=demo"])
    compose_config(["model=segformer_b0", *shares, "model.input.max_value=1", "dataset=demo"])
    own = ["model.input.mean=[0,0,0]", "model.input.std=[1,1,1]"]  # of a network that normalises for itself
    compose_config(["model=segformer_b0", *own, "dataset=demo"])


def test_names_that_are_none_of_the_classes_are_a_note() -> None:
    classes = ade20k_classes()
    found = resolve_class_map(150, None, [f"thing {i}" for i in range(150)], classes)
    assert f"none of {classes.dataset}'s, such as 'thing 0'" in str(found.note)
    assert resolve_class_map(150, None, list(classes.names), classes).note is None


def test_a_lazy_layer_is_one_message() -> None:
    cfg = compose_config(
        [
            "model=custom",
            "model._target_=torch.nn.LazyConv2d",
            "model.kwargs.out_channels=150",
            "model.kwargs.kernel_size=1",
        ]
    )
    with pytest.raises(HarnessError, match=r"its weight has no values \(a lazy layer"):
        load_model(cfg.model)
