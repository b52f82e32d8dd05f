"""Every segmentation class of transformers, small and random, through the whole evaluation by the protocol of its folder."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES as SEMANTIC,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES as UNIVERSAL,
)

from ade_harness.api import evaluate
from ade_harness.config.compose import compose_config
from ade_harness.config.inference import InferenceConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.inference.network import NetworkPredictor
from ade_harness.models.class_map import resolve_class_map
from ade_harness.models.formats.transformers import UNSUPPORTED, load_transformers
from ade_harness.models.loading import load_model

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

NAMES = dict(enumerate(ade20k_classes().names))
LABELS = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def _swin() -> Any:
    return transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES
    )


def _detr(**more: Any) -> Any:
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    return transformers.DetrConfig(
        d_model=64, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=8, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone_config=transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=STAGES),
        **small, **more,
    )  # fmt: skip


MASKS = {
    "hidden_dim": 32, "encoder_feedforward_dim": 32, "dim_feedforward": 32, "encoder_layers": 1, "decoder_layers": 2,
    "num_attention_heads": 2, "num_queries": 8,
}  # fmt: skip
MAKE: dict[str, Callable[[], Any]] = {
    "beit": lambda: transformers.BeitConfig(
        **VIT, intermediate_size=64, out_indices=[1, 2, 3, 4], use_relative_position_bias=True, use_auxiliary_head=False, **LABELS
    ),
    "data2vec-vision": lambda: transformers.Data2VecVisionConfig(
        **VIT, intermediate_size=64, out_indices=[1, 2, 3, 4], use_relative_position_bias=True, use_auxiliary_head=False, **LABELS
    ),
    "dpt": lambda: transformers.DPTConfig(
        **VIT, intermediate_size=64, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
        is_hybrid=False, use_auxiliary_head=False, **LABELS,
    ),
    "mobilenet_v2": lambda: transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=64, **LABELS),
    "mobilevit": lambda: transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96], aspp_out_channels=32, **LABELS
    ),
    "mobilevitv2": lambda: transformers.MobileViTV2Config(image_size=64, width_multiplier=0.5, aspp_out_channels=32, **LABELS),
    "sapiens2": lambda: transformers.Sapiens2Config(
        **VIT, intermediate_size=64, num_key_value_heads_per_layer=[2] * 4, num_key_value_attention_heads=2,
        head_config={"upsample_out_channels": [16, 16], "conv_out_channels": [16], "upsample_kernel_sizes": [4, 4], "conv_kernel_sizes": [1]}, **LABELS,
    ),
    "segformer": lambda: transformers.SegformerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1] * 4, decoder_hidden_size=16, **LABELS),
    "tipsv2_dpt": lambda: transformers.Tipsv2DptConfig(neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, **LABELS),
    "upernet": lambda: transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, out_features=STAGES),
        hidden_size=16, auxiliary_channels=8, auxiliary_in_channels=24, use_auxiliary_head=False, **LABELS,
    ),
    "detr": lambda: _detr(**LABELS),
    "eomt": lambda: transformers.EomtConfig(**VIT, num_queries=8, num_blocks=2, num_upscale_blocks=1, **LABELS),
    "eomt_dinov3": lambda: transformers.EomtDinov3Config(
        **VIT, intermediate_size=64, num_queries=8, num_blocks=2, num_upscale_blocks=1, **LABELS
    ),
    "mask2former": lambda: transformers.Mask2FormerConfig(backbone_config=_swin(), feature_size=32, mask_feature_size=32, **MASKS, **LABELS),
    "maskformer": lambda: transformers.MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=_swin(), decoder_config=_detr(), **LABELS
    ),
    "oneformer": lambda: transformers.OneFormerConfig(
        backbone_config=_swin(), conv_dim=32, mask_dim=32, text_encoder_width=16, text_encoder_num_layers=1, is_training=False, **MASKS, **LABELS
    ),
}  # fmt: skip
PROTOCOLS = {
    "eomt": "as_saved_long_side_64", "eomt_dinov3": "as_saved_long_side_64", "dpt": "as_saved_slide_64",
    "beit": "as_saved_slide_64", "data2vec-vision": "as_saved_slide_64",
}  # fmt: skip


def saved(kind: str, folder: Path, processor: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(0)
    network = getattr(transformers, {**SEMANTIC, **UNIVERSAL}[kind])(MAKE[kind]())
    network.save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_every_class_is_supported_or_its_reason_written() -> None:
    assert {*SEMANTIC, *UNIVERSAL} == {*MAKE, *UNSUPPORTED}


def test_a_folder_whose_weights_are_another_networks_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    folder = saved("segformer", tmp_path)
    own = load_file(folder / "model.safetensors")
    kept = dict(list(own.items())[:3])
    save_file({**kept, **{f"other.{n}": torch.zeros(2) for n in range(9)}}, folder / "model.safetensors")
    options = {"model.id": str(folder), "model.allow_missing_keys": ["*"], "model.allow_unexpected_keys": ["*"]}
    with pytest.raises(HarnessError, match=r"3 of the file's 12 keys are the model's"):
        evaluate("hf", dataset="demo", options={**options, "dataset.images": 1})


def test_a_file_in_float32_is_not_rounded_to_what_its_configuration_says(tmp_path: Path) -> None:
    folder = saved("segformer", tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float16", "torch_dtype": "float16"}))
    expected = load_file(folder / "model.safetensors")
    found = load_model(compose_config(["model=hf", f"model.id={folder}", "dataset=demo"]).model).module.state_dict()
    key = "decode_head.classifier.weight"
    assert torch.equal(found[f"network.{key}"], expected[key])
    assert not torch.equal(expected[key], expected[key].half().float())


def test_the_pixels_of_a_folder_and_its_own_weights_belong_to_its_identity(tmp_path: Path) -> None:
    folder = saved(
        "segformer", tmp_path, {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    (folder / "training_args.bin").write_bytes(b"of a trainer")  # no weights
    overrides = ["model=hf", f"model.id={folder}", "dataset=demo"]
    first = load_model(compose_config(overrides).model).facts
    assert first["sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.5] * 3}))
    second = load_model(compose_config(overrides).model).facts
    assert first["pixels_sha256"] != second["pixels_sha256"]
    assert first["config_sha256"] == second["config_sha256"]


@pytest.mark.parametrize("kind", MAKE)
def test_a_folder_is_evaluated_as_it_is(kind: str, tmp_path: Path) -> None:
    folder = saved(
        kind, tmp_path, {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    )
    result = evaluate("hf", dataset="demo", options={"model.id": str(folder), "dataset.images": 1})
    assert result.images == 1
    assert result.metrics["protocol"] == PROTOCOLS.get(kind, "as_saved_whole_64")
    assert int(result.matrix.sum()) > 0
    differs = [note for note in result.notes if "model=hf:" in note]
    assert bool(differs) == (kind in ("beit", "segformer"))
    assert all("is the published network" in note or "are published ones" in note for note in differs)


def test_what_cannot_be_evaluated_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "videomt"}))
    with pytest.raises(HarnessError, match="a videomt|videomt labels clips of frames; an image has no frames"):
        load_model(compose_config(["model=hf", f"model.id={tmp_path}"]).model)


def test_eomt_is_evaluated_without_masks(tmp_path: Path) -> None:
    """Early converters dropped the buffer, and transformers' default is ones: masked attention, other scores."""
    folder = saved("eomt", tmp_path)
    network: Any = load_model(compose_config(["model=hf", f"model.id={folder}"]).model).module.network
    assert set(network.attn_mask_probs) == {0.0}


def test_a_folder_without_a_processor_says_what_was_assumed(tmp_path: Path) -> None:
    model = load_model(compose_config(["model=hf", f"model.id={saved('segformer', tmp_path)}"]).model)
    assert any("has no preprocessor_config.json" in note and "123.675/116.28/103.53" in note for note in model.notes)


def composed(folder: Path, *overrides: str) -> InferenceConfig:
    return compose_config(["model=hf", f"model.id={folder}", *overrides]).inference


def write(folder: Path, config: dict[str, Any], processor: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    ("config", "processor", "name", "fields"),
    [
        ({"model_type": "segformer"}, {"size": {"height": 512, "width": 512}}, "as_saved_whole_512", {"side": 512, "max_side": 2048}),
        ({"model_type": "segformer"}, {"size": 640}, "as_saved_whole_640", {"side": 640, "max_side": 2560}),
        ({"model_type": "mobilevit"}, {"size": {"shortest_edge": 544}, "crop_size": {"height": 512, "width": 512}, "do_center_crop": True}, "as_saved_whole_512", {"side": 512}),
        ({"model_type": "mask2former"}, {"size": {"shortest_edge": 512, "longest_edge": 2048}}, "as_saved_whole_512", {"side": 512, "max_side": 2048, "pad_multiple": 32, "rounding": "detectron2", "backend": "pillow"}),
        ({"model_type": "maskformer"}, {"size": 512, "max_size": 1024}, "as_saved_whole_512", {"max_side": 1024}),
        ({"model_type": "dpt", "image_size": 480}, {}, "as_saved_slide_480", {"side": 480}),
        ({"model_type": "beit", "image_size": [640, 640]}, {}, "as_saved_slide_640", {"side": 640}),
        ({"model_type": "eomt", "image_size": 512}, {}, "as_saved_long_side_512", {"rule": "cover", "height": 512, "width": 512}),
        ({}, {}, "as_saved_whole_512", {"side": 512}),
        ({"model_type": "segformer"}, {"size": {"height": 640.0, "width": 800.0}}, "as_saved_whole_640", {"side": 640}),
        ({"model_type": "segformer"}, {"size": [640, 480]}, "as_saved_whole_480", {"side": 480}),
        ({"model_type": "dpt", "image_size": 480}, {"size": "?"}, "as_saved_slide_480", {"side": 480}),
    ],
)  # fmt: skip
def test_sizes_become_a_protocol(
    config: dict[str, Any], processor: dict[str, Any], name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    inference = composed(write(tmp_path, config, processor))
    assert inference.name == name
    assert {key: getattr(inference.resize, key) for key in fields} == fields
    assert inference.mode == ("slide" if "slide" in name else "long_side" if "long" in name else "whole")
    if "slide" in name:
        assert (inference.window.crop, inference.window.stride) == (fields["side"], fields["side"] * 2 // 3)


@pytest.mark.parametrize(
    "size", ["640", 0, -1, 1.5, True, {}, {"height": 0, "width": 640}, {"max_height": 800, "max_width": 800}, [640], [640, None]]
)  # fmt: skip
def test_a_size_that_is_none_is_not_taken_for_another(size: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, {"model_type": "segformer"}, {"size": size})
    with pytest.raises(
        HarnessError, match=r"its image processor's size is .*, expected a number of pixels.* inference="
    ):
        composed(folder)
    assert composed(folder, "inference=mmseg_whole_512").resize.side == 512
    chosen = composed(folder, "inference.resize.side=640")
    assert (chosen.resize.side, chosen.name) == (640, "as_saved_whole_640")


@pytest.mark.parametrize(
    ("processor", "named"),
    [({"resample": 3}, "bicubic"), ({"resample": 2}, None), ({"resample": 1, "do_resize": False}, None), ({"resample": "x"}, None),
     ({"resample": True}, None), ({}, None), ({"image_processor_type": "DPTImageProcessor"}, "bicubic")],
)  # fmt: skip
def test_another_filter_than_the_protocols_is_a_note(
    processor: dict[str, Any], named: str | None, tmp_path: Path
) -> None:
    folder = saved("segformer", tmp_path)
    write(folder, json.loads((folder / "config.json").read_text()), {"size": {"height": 64, "width": 64}, **processor})
    found = {}
    for protocol in ("as_saved", "mmseg_whole_512"):
        cfg = compose_config(["model=hf", f"model.id={folder}", f"inference={protocol}"])
        found[protocol] = " ".join(NetworkPredictor(load_model(cfg.model), cfg.inference, cfg.model).notes())
    assert "filter" not in found["mmseg_whole_512"]
    assert (f"resizes with Pillow's {named} filter, as_saved_" in found["as_saved"]) == (named is not None)


class Hub(BaseHTTPRequestHandler):
    """A hub that has the two files of one repository, or fails."""

    files: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "resolve" in self.path:  # the library asks for something of its own too
            self.asked.append(self.path)
        content = json.dumps(self.files.get(name)).encode()
        self.send_response(200 if name in self.files else 503)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_repository_of_the_hub_is_asked_once_and_never_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    overrides = ["model=hf", "model.id=some/where", "model.revision=abc"]
    try:
        Hub.files, Hub.asked[:] = {"config.json": {"model_type": "dpt", "image_size": 480}}, []
        assert compose_config(overrides).inference.name == "as_saved_slide_480"
        names = ("config.json", "preprocessor_config.json", "processor_config.json")
        assert Hub.asked == [f"/some/where/resolve/abc/{name}" for name in names]
        Hub.files, Hub.asked[:] = {}, []
        assert compose_config(overrides).inference.name == "as_saved_whole_512"
        assert Hub.asked == ["/some/where/resolve/abc/config.json"]  # no second try, no second file
    finally:
        server.shutdown()
        server.server_close()
    assert compose_config(overrides).inference.name == "as_saved_whole_512"  # nobody listens: the loader will say so


def test_what_is_set_stays(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "dpt", "image_size": 480}, {})
    inference = composed(
        tmp_path, "inference.window.stride=240", "inference.resize.backend=pillow", "inference.batch=2"
    )
    assert (inference.window.crop, inference.window.stride, inference.resize.backend) == (480, 240, "pillow")
    assert composed(tmp_path, "inference=mmseg_slide_512").name == "mmseg_slide_512"


def test_a_processor_that_does_not_resize_leaves_the_image(tmp_path: Path) -> None:
    write(tmp_path, {"model_type": "segformer"}, {"do_resize": False, "size": {"height": 512, "width": 512}})
    inference = composed(tmp_path)
    assert inference.name == "as_saved_whole"
    assert (str(inference.resize.rule), inference.resize.pad_multiple) == ("none", 32)


def test_a_background_channel_that_no_name_says_is_noted(tmp_path: Path) -> None:
    for first, noted in (("cls0", True), ("background", False)):
        names = {0: first, **{i: f"cls{i}" for i in range(1, 151)}}
        config = transformers.SegformerConfig(
            num_encoder_blocks=4, depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, sr_ratios=[8, 4, 2, 1],
            decoder_hidden_size=8, id2label=names, label2id={n: i for i, n in names.items()},
        )  # fmt: skip
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / first)
        (tmp_path / first / "preprocessor_config.json").write_text("{}")
        model = load_model(compose_config(["model=hf", f"model.id={tmp_path / first}"]).model)
        assert any("first is taken for the background" in note for note in model.notes) == noted


def test_names_beat_the_usual_place_of_the_background(tmp_path: Path) -> None:
    """ADE20K's 150 in order, then one that nobody knows: leaving out the first would count each as another class."""
    names = [*ade20k_classes().names, "unknown"]
    write(
        tmp_path,
        {"model_type": "segformer", "id2label": {str(i): n for i, n in enumerate(names)}},
        {"do_reduce_labels": False},
    )
    assert compose_config(["model=hf", f"model.id={tmp_path}"]).model.class_map is None
    with pytest.raises(HarnessError, match=r"By the model's own names: model.class_map=\[0,1,2,.*,149,\?\]"):
        resolve_class_map(151, None, names, ade20k_classes())


def test_a_background_channel_is_left_out(tmp_path: Path) -> None:
    config = {"model_type": "segformer", "id2label": {str(i): str(i) for i in range(151)}}
    write(tmp_path, config, {"do_reduce_labels": False})
    assert compose_config(["model=hf", f"model.id={tmp_path}"]).model.class_map == [None, *range(150)]
    # of a data set of one's own, 151 channels may be its 151 classes
    own = [f"dataset.{key}={tmp_path}" for key in ("root", "image_dir", "label_dir", "classes")]
    of_folder = compose_config(["model=hf", f"model.id={tmp_path}", "dataset=folder", *own])
    assert of_folder.model.class_map is None
    write(tmp_path, config, {"do_reduce_labels": True})
    assert compose_config(["model=hf", f"model.id={tmp_path}"]).model.class_map is None


def test_a_background_channel_may_be_the_last_one(tmp_path: Path) -> None:
    names = [*ade20k_classes().names, "Background"]
    write(tmp_path, {"model_type": "segformer", "id2label": dict(enumerate(names))}, {})
    assert compose_config(["model=hf", f"model.id={tmp_path}"]).model.class_map == [*range(150), None]


def test_a_processor_within_that_of_all_is_read(tmp_path: Path) -> None:
    """As transformers 5 saves it: processor_config.json, in it image_processor."""
    config = {"model_type": "segformer", "id2label": {str(i): str(i) for i in range(151)}}
    processor = {"size": {"height": 96, "width": 96}, "do_reduce_labels": True}
    write(tmp_path, config, processor)
    alone = compose_config(["model=hf", f"model.id={tmp_path}"])
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": processor}))
    assert compose_config(["model=hf", f"model.id={tmp_path}"]) == alone
    assert alone.inference.name == "as_saved_whole_96"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": [1]}))
    assert composed(tmp_path).name == "as_saved_whole_512"


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"image_mean": ["a"] * 3, "image_std": 0.5}, "image_mean is 'a', expected a number"),
        ({"image_mean": [0.5] * 4, "image_std": [0.5] * 4}, "image_mean has 4 numbers, expected three"),
        ({"image_mean": 0.5, "image_std": 0}, "image_std is 0, expected a number above 0"),
        ({"rescale_factor": [0.1] * 3}, r"rescale_factor is \[0.1, 0.1, 0.1\], expected a number above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0, expected a number above 0"),
        (None, "its preprocessor_config.json cannot be read"),
        ([], "its preprocessor_config.json holds no keys and values"), ([{"size": 1}], "holds no keys and values"),
    ],
)  # fmt: skip
def test_statistics_that_are_none(processor: Any, message: str, tmp_path: Path) -> None:
    folder = saved("segformer", tmp_path)
    (folder / "preprocessor_config.json").write_text("{" if processor is None else json.dumps(processor))
    with pytest.raises(HarnessError, match=message):
        load_model(compose_config(["model=hf", f"model.id={folder}"]).model)


def test_one_number_is_that_of_every_channel(tmp_path: Path) -> None:
    folder = saved("segformer", tmp_path, {"image_mean": 0.5, "image_std": 0.25})
    model = load_model(compose_config(["model=hf", f"model.id={folder}"]).model)
    assert (model.mean, model.std) == ((127.5,) * 3, (63.75,) * 3)


@pytest.mark.parametrize(("name", "content"), [("model.safetensors", b""), ("model.safetensors", b"x" * 99), ("pytorch_model.bin", b""), ("pytorch_model.bin", b"<html>")])  # fmt: skip
def test_damaged_weights_are_one_message(name: str, content: bytes, tmp_path: Path) -> None:
    folder = saved("segformer", tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(HarnessError, match="cannot be loaded") as raised:
        load_model(compose_config(["model=hf", f"model.id={folder}"]).model)
    assert "weights_only" not in str(raised.value)


def test_folders_that_trainers_write_around_a_network_say_what_to_give(tmp_path: Path) -> None:
    for name in ("out/checkpoint-500", "out/checkpoint-1000", "out/checkpoint-best", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / ("adapter_config.json" if name == "adapter" else "config.json")).write_text("{}")
    with pytest.raises(
        HarnessError, match=r"Its last checkpoint is .*/out/checkpoint-1000: give that\. Expected a hub"
    ):
        load_transformers(str(tmp_path / "out"), None)
    with pytest.raises(HarnessError, match=r"It holds an adapter of PEFT alone: merge it into its network first"):
        load_transformers(str(tmp_path / "adapter"), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarnessError, match=r"\)\. Expected a hub id that can be reached"):
        load_transformers(str(tmp_path / "empty"), None)
