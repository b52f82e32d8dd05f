"""Checkpoints as trainers write them: wrappers, averaged weights, prefixes, halves, pickled objects."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

import ade_harness as ade
from ade_harness.config.compose import compose_config
from ade_harness.config.model import CheckpointWeights, ModelConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.convert import convert
from ade_harness.models.checkpoint.key_tables import name_there, rename
from ade_harness.models.checkpoint.parts import Choice, Part, read_part, take_part
from ade_harness.models.checkpoint.public import local_checkpoint
from ade_harness.models.checkpoint.sources import backbone_checkpoint
from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.formats import timm
from ade_harness.models.loading import load_model
from ade_harness.models.registry import family_of, systems
from tests.conftest import Done
from tests.models.systems.test_dense_systems import packed

EMA, MODEL = CheckpointWeights.ema, CheckpointWeights.model
SMALL = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.ones(2)}
OTHER = {name: tensor + 100 for name, tensor in SMALL.items()}
FILE = Path("w.pth")


def known(state: Mapping[str, Any]) -> int:
    return len(state.keys() & SMALL.keys())


def below(prefix: str, state: Mapping[str, torch.Tensor] = SMALL) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def is_small(part: Part) -> bool:
    return part.state.keys() == SMALL.keys() and torch.equal(part.state["layer.weight"], SMALL["layer.weight"])


def is_other(part: Part) -> bool:
    return part.state.keys() == SMALL.keys() and torch.equal(part.state["layer.weight"], OTHER["layer.weight"])


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "net.",
        "network.",
        "_orig_mod.",
        "student.",
        "teacher.",
        "module._orig_mod.",
        "model.net.module.",
    ],
)
def test_the_one_prefix_that_fits_is_taken(prefix: str) -> None:
    part = take_part({"state_dict": {**below(prefix), "criterion.weight": torch.ones(3)}}, FILE, Choice(), known)
    assert is_small(part)
    assert str(part) == (
        f"state_dict, names that begin with {prefix!r}; 1 of 3 weights have other names and were not read"
    )


def test_names_that_fit_as_they_are_stay() -> None:
    part = take_part(dict(SMALL), FILE, Choice(), known)
    assert is_small(part)
    assert str(part) == ""
    own = below("model.")  # a network whose own names begin so
    part = take_part(own, FILE, Choice(), lambda state: len(state.keys() & own.keys()))
    assert part.state.keys() == own.keys()
    assert str(part) == ""


def test_names_that_fit_nothing_stay_and_are_named_by_the_strict_loading() -> None:
    part = take_part({"encoder.layer.weight": torch.ones(1)}, FILE, Choice(), known)
    assert list(part.state) == ["encoder.layer.weight"]


@pytest.mark.parametrize(
    "content",
    [
        {**below("student."), **below("teacher.", OTHER)},
        {"student": SMALL, "teacher": OTHER},
        {"student": {"state_dict": SMALL}, "teacher": {"state_dict": OTHER}, "epoch": 3},
    ],
)
def test_two_networks_that_fit_are_asked_about(content: dict[str, Any]) -> None:
    with pytest.raises(
        HarnessError, match=r"holds several networks that fit.*: student\. \(2\), teacher\. \(2\).*checkpoint_prefix="
    ):
        take_part(content, FILE, Choice(), known)
    assert is_small(take_part(content, FILE, Choice("student."), known))
    assert is_other(take_part(content, FILE, Choice("teacher"), known))  # the point may be left out
    with pytest.raises(HarnessError, match=r"checkpoint_prefix=tutor: no name in w\.pth begins with it; .* student\."):
        take_part(content, FILE, Choice("tutor"), known)


AVERAGED: dict[str, dict[str, Any]] = {
    "timm": {"state_dict": SMALL, "state_dict_ema": OTHER, "arch": "x"},
    "mmpretrain's EMA under its name": {"state_dict": SMALL, "ema_state_dict": {**below("module.", OTHER), "steps": torch.tensor(3)}},
    "torch's AveragedModel": {"model": SMALL, "swa_model": {**below("module.", OTHER), "n_averaged": torch.tensor(3)}},
    "DeiT": {"model": SMALL, "model_ema": OTHER, "optimizer": {"state": {}, "param_groups": []}},
    "BasicSR": {"params": SMALL, "params_ema": OTHER},
    "prefixes": {"state_dict": {**below("model."), **below("ema_model.module.", OTHER)}},
    "one prefix": {"state_dict": {**SMALL, **below("ema.", OTHER)}},
    "capitals": {"state_dict": SMALL, "EMA": OTHER},
    "a camel": {"model": SMALL, "modelEma": OTHER},
    "a dash": {"model": SMALL, "model-ema": OTHER},
    "a prefix of words": {"state_dict": {**below("net."), **below("ema_net.", OTHER)}},
    "an abbreviation": {"model": SMALL, "model_avg": OTHER},
    "an average": {"net": SMALL, "average_model": OTHER},
}  # fmt: skip


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_weights_are_chosen(name: str) -> None:
    content = AVERAGED[name]
    plain = take_part(content, FILE, Choice(), known)
    assert is_small(plain)
    assert "model.checkpoint_weights=ema" in str(plain)  # reported, so that nobody takes the wrong ones unknowingly
    assert is_small(take_part(content, FILE, Choice(weights=MODEL), known))
    averaged = take_part(content, FILE, Choice(weights=EMA), known)
    assert is_other(averaged)
    assert "model.checkpoint_weights=model" in str(averaged)


@pytest.mark.parametrize("other", ["teacher", "student", "discriminator", "target_model", "callbacks"])
def test_what_stands_beside_is_noted(other: str) -> None:
    part = take_part({"state_dict": SMALL, other: OTHER}, FILE, Choice(), known)
    assert is_small(part)
    assert str(part) == f"state_dict; {other} beside it: not read"
    assert "cinema" not in take_part({"state_dict": SMALL, "cinema": OTHER}, FILE, Choice(), known).state
    with pytest.raises(HarnessError, match="no averaged weights were found"):  # ema within another word is none
        take_part({"state_dict": SMALL, "cinema": OTHER}, FILE, Choice(weights=EMA), known)


def test_mmengine_swaps_them() -> None:
    """Its EMAHook saves the averaged weights as state_dict, and what was trained as ema_state_dict."""
    content = {"meta": {"mmengine_version": "0.10"}, "state_dict": OTHER, "ema_state_dict": below("module.")}
    assert is_other(take_part(content, FILE, Choice(), known))
    assert is_other(take_part(content, FILE, Choice(weights=EMA), known))
    part = take_part(content, FILE, Choice(weights=MODEL), known)
    assert is_small(part)
    assert str(part).startswith("ema_state_dict, names that begin with 'module.'; the weights that were trained")


def test_averaged_weights_that_are_not_there() -> None:
    for content in (dict(SMALL), {"state_dict": SMALL}, {"state_dict": below("model.")}):
        with pytest.raises(HarnessError, match=r"checkpoint_weights=ema: no averaged weights were found in w"):
            take_part(content, FILE, Choice(weights=EMA), known)
    assert is_small(take_part({"state_dict": SMALL}, FILE, Choice(weights=MODEL), known))
    with pytest.raises(HarnessError, match=r"checkpoint_weights=model: w\.pth holds averaged weights alone: model_ema"):
        take_part({"model_ema": SMALL}, FILE, Choice(weights=MODEL), known)


def test_several_unknown_networks_are_named() -> None:
    with pytest.raises(HarnessError, match=r"holds several networks \(actor, critic\)"):
        take_part({"actor": SMALL, "critic": OTHER}, FILE, Choice(), known)
    assert is_small(take_part({"segmentor": SMALL, "epoch": 3, "optimizer": {"state": {0: {}}}}, FILE, Choice(), known))


def moments(kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, Any]:
    """Return an optimizer's state_dict after a step: tensors under numbers, as many as a network's."""
    weights = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))]
    optimizer = kind(weights, lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))  # type: ignore[arg-type]
    torch.stack([w.sum() for w in weights]).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "content",
    [
        {"segmentor": SMALL, "optimizer": moments()},
        {"model_state": SMALL, "optimizer_state": moments(torch.optim.SGD)},
        {"ema": SMALL, "optimizer": moments()},
        {"trained": SMALL, "adam": moments(), "amp_scaler": {"scale": torch.ones(1)}},
        {"student": SMALL, "optimizer": moments(), "dino_loss": {"center": torch.ones(1, 3)}},
        {"weights_of_it": SMALL, "optimizer": {"encoder": moments(), "decoder": moments()}},
    ],
)
def test_an_optimizer_with_moments_is_no_network(content: dict[str, Any]) -> None:
    assert is_small(take_part(content, FILE, Choice(), known))


def test_a_student_and_a_teacher_beside_an_optimizer_are_asked_about() -> None:
    content = {"student": SMALL, "teacher": OTHER, "optimizer": moments(), "dino_loss": {"center": torch.ones(1, 3)}}
    with pytest.raises(HarnessError, match=r"student\. \(2\), teacher\. \(2\)"):
        take_part(content, FILE, Choice(), known)
    assert is_other(take_part(content, FILE, Choice("teacher."), known))


def test_trained_weights_are_not_averaged_ones_by_prefixes() -> None:
    part = take_part({**below("online_model."), **below("ema_model.", OTHER)}, FILE, Choice(weights=MODEL), known)
    assert is_small(part)  # ema-pytorch's names
    with pytest.raises(
        HarnessError, match=r"checkpoint_weights=model: w\.pth holds averaged weights alone: ema_model\."
    ):
        take_part({**below("live_model."), **below("ema_model.", OTHER)}, FILE, Choice(weights=MODEL), known)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
@pytest.mark.parametrize("prefix", ["", "model.", "_forward_module."])
def test_wrappers_in_the_middle_of_names_are_taken_out(wrapper: str, prefix: str) -> None:
    state = {f"{prefix}layer.{wrapper}{name.removeprefix('layer.')}": tensor for name, tensor in SMALL.items()}
    part = take_part({"state_dict": state}, FILE, Choice(), known)
    assert is_small(part)
    assert "names without those of torch.compile's, FSDP's or checkpointing's wrappers" in str(part)
    assert part.name_in_file("layer.bias") == f"{prefix}layer.{wrapper}bias"


def test_the_copies_of_mmcvs_ema_are_noted_and_left() -> None:
    """Which of the two are averaged depends on the runner: nobody can take them by ``ema`` unknowingly."""
    content = {"state_dict": {**SMALL, **{f"ema_{name.replace('.', '_')}": t for name, t in OTHER.items()}}}
    part = take_part(content, FILE, Choice(), known)
    assert is_small(part)
    assert "2 weights of mmcv's EMAHook (ema_...) were not read" in str(part)
    with pytest.raises(HarnessError, match="no averaged weights were found"):
        take_part(content, FILE, Choice(weights=EMA), known)


def test_a_file_that_holds_itself_is_refused() -> None:
    content: dict[str, Any] = {"x": SMALL}
    content["model"] = content
    with pytest.raises(HarnessError, match="holds no state_dict"):
        take_part(content, FILE, Choice(), known)


@pytest.mark.timeout(20)
def test_mappings_that_are_shared_are_looked_into_once() -> None:
    content: dict[str, Any] = {}
    for _ in range(60):
        content = {"a": content, "b": content}  # 2^60 ways to the innermost
    with pytest.raises(HarnessError, match="holds no state_dict"):
        take_part(content, FILE, Choice(), known)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["zero_to_fp32.py", "latest"], "DeepSpeed wrote it: run `python zero_to_fp32.py"),
        (["__0_0.distcp", ".metadata"], "dcp_to_torch"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "by their index: .*index.json"),
        (["config.json", "model.safetensors"], "transformers wrote it: model=hf model.id="),
        (["last.ckpt", "hparams.yaml"], r"Expected a file of weights, such as .*last\.ckpt"),
        ([], r"Expected a file of weights\.$"),
    ],
)
def test_a_folder_in_place_of_a_file_is_one_message_with_the_next_step(
    tmp_path: Path, names: list[str], advice: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(HarnessError, match=rf"model\.checkpoint=.*: is a folder\. .*{advice}"):
        local_checkpoint(str(tmp_path), None)


# the systems' own names


@pytest.mark.parametrize("file", sorted(packed("true_keys.json.gz")))
def test_names_of_published_files_are_known_below_any_prefix(file: str, tmp_path: Path) -> None:
    shapes = packed("true_keys.json.gz")[file]
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    families = {kind: family_of(kind) for kind in systems().values()}
    best = max(families.values(), key=lambda family: family.known(state))
    assert best.known(state) == len(state)
    as_hub = best.hub_names(state)
    assert 2 * best.known(as_hub) >= len(as_hub)  # the hub's names too
    for names in (state, as_hub):
        part = take_part({f"module.model.{k}": v for k, v in names.items()}, FILE, Choice(), best.known)
        inner = {name.removeprefix("model.") for name in part.state}  # which DINOv3's hub files have themselves
        assert inner == names.keys() or part.state.keys() == names.keys()
        assert take_part(dict(names), FILE, Choice(), best.known).where == ()


def test_a_files_own_name_of_a_weight() -> None:
    table = (
        ("backbone.block{S}.{B}.kv.*", "encoder.{S-1}.{B}.{key|value}.*"),
        ("head.conv.*", "decoder.fuse.*"),
        ("unused.*", None),
    )
    assert name_there("encoder.0.2.value.weight", table) == "backbone.block1.2.kv.weight"
    assert name_there("decoder.fuse.bias", table) == "head.conv.bias"
    assert name_there("other.bias", table) == "other.bias"
    state = {"backbone.block3.1.kv.weight": torch.zeros(4), "head.conv.bias": torch.zeros(1)}
    assert {name_there(name, table) for name in rename(state, table)} == state.keys()


def test_messages_name_the_files_own_keys(tmp_path: Path) -> None:
    shapes = packed("true_keys.json.gz")["segformer_b0_official"]
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    del state["backbone.block1.0.attn.q.weight"]
    torch.save({"state_dict": {**state, "backbone.extra": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(HarnessError) as caught:
        load_model(model_cfg("model=segformer_b0", f"model.checkpoint={tmp_path}/w.pth"))
    assert "attention.q_proj.weight (in the file backbone.block1.0.attn.q.weight)" in str(caught.value)
    assert "1 unexpected: backbone.extra" in str(caught.value)
    state["backbone.block1.0.attn.q.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        HarnessError, match=r"q_proj\.weight \(in the file backbone\.block1\.0\.attn\.q\.weight\) \[2, 2\]"
    ):
        load_model(model_cfg("model=segformer_b0", f"model.checkpoint={tmp_path}/w.pth"))


def model_cfg(*overrides: str) -> ModelConfig:
    return compose_config(list(overrides)).model


@pytest.mark.parametrize(
    ("model", "file", "advice"),
    [
        ("segformer_b0", "segformer_b0_official", "Give the file of the whole system"),
        ("dinov2_g_linear", "dinov2_g_backbone", "Give it as model.backbone_checkpoint=PATH, beside the head's file"),
    ],
)
def test_a_backbone_as_the_whole_checkpoint(
    model: str, file: str, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes = packed("true_keys.json.gz")[file]
    state = {k: torch.zeros(1).expand(s) for k, s in shapes.items() if not k.startswith("decode_head")}
    monkeypatch.setattr("ade_harness.models.loading.read_part", lambda *_, **__: Part(state))
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(HarnessError, match=rf"w\.pth: a backbone alone, without a head \(.*is missing\)\. {advice}"):
        load_model(model_cfg(f"model={model}", f"model.checkpoint={tmp_path}/w.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_types_load_as_configured(dtype: torch.dtype, tmp_path: Path) -> None:
    """A half-precision file used to load as half, and died at the first image."""
    torch.manual_seed(0)
    shapes = packed("true_keys.json.gz")["segformer_b0_official"]
    state = {name: torch.rand(shape).mul(0.05).to(dtype) for name, shape in shapes.items()}
    save_file(state, tmp_path / "w.safetensors")
    overrides = ("model=segformer_b0", f"model.checkpoint={tmp_path}/w.safetensors")
    network = load_model(model_cfg(*overrides)).module
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert {b.dtype for b in network.buffers() if b.is_floating_point()} <= {torch.float32}
    own = dict(network.named_parameters())["network.decode_head.classifier.weight"]
    assert torch.equal(own, state["decode_head.linear_pred.weight"].float())
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        scores = network(images)
    save_file({name: tensor.float() for name, tensor in state.items()}, tmp_path / "w.safetensors")
    with torch.inference_mode():
        assert torch.equal(scores, load_model(model_cfg(*overrides)).module(images))
    half = load_model(model_cfg(*overrides, "model.dtype=bf16", "inference.precision=bf16")).module
    assert dict(half.named_parameters())["network.decode_head.classifier.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_the_part_stands_in_the_run(call: Callable[..., Done], tmp_path: Path) -> None:
    shapes = packed("true_keys.json.gz")["segformer_b0_official"]
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    torch.save({"state_dict": below("model.", state), "model_ema": state}, tmp_path / "w.pth")
    overrides = ("model=segformer_b0", "dataset=demo", "dataset.images=1", f"model.checkpoint={tmp_path}/w.pth")
    done = call(*overrides, "tracking=none", "runtime.workers=0", "metrics.resamples=0", f"run.dir={tmp_path}/run")
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "run/manifest.json").read_text())["model"]
    assert facts["part"] == (
        "state_dict, names that begin with 'model.'; the weights that were trained; the averaged ones are in"
        " model_ema: model.checkpoint_weights=ema"
    )
    assert "names that begin with 'model.'" in " ".join(done.out.split())
    found = json.loads((tmp_path / "run/metrics.json").read_text())  # a script that reads it alone knows the weights
    assert found["checkpoint"] == facts["origin"] == str(tmp_path / "w.pth")
    assert found["checkpoint_part"] == facts["part"]
    assert found["checkpoint_sha256"] == facts["sha256"]
    [weights] = [line for line in done.out.splitlines() if line.startswith("weights:")]
    assert weights.split() == f"weights: {facts['origin']} ({facts['part']}, sha256 {facts['sha256'][:12]}...)".split()


# convert


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/ade_harness_was_converted",)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.register_buffer("passing", torch.ones(1), persistent=False)


class Settings(dict):  # type: ignore[type-arg]
    """As configuration classes of trainers are."""


def test_tensors_beside_pickled_objects_are_converted(tmp_path: Path) -> None:
    content = {
        "args": argparse.Namespace(lr=0.1), "evil": Evil(), "settings": Settings(a=Settings(b=1)), "when": Path("/x"),
        "state_dict": OrderedDict(SMALL), "shape": torch.Size([2]), "dtype": torch.float16, "numbers": np.arange(3),
    }  # fmt: skip
    for name, save in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False})):
        torch.save(content, tmp_path / f"{name}.pth", **save)  # type: ignore[arg-type]
        with pytest.raises(HarnessError, match=r"holds more than tensors \(objects of .*\).* convert "):
            read_part(tmp_path / f"{name}.pth")
        part, left, _ = convert(tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors", Choice())
        assert part.where == ("state_dict",)
        assert {"argparse.Namespace", "posix.system"} <= set(left)
        assert is_small(read_part(tmp_path / f"{name}.safetensors"))
    assert not Path("/tmp/ade_harness_was_converted").exists()


def test_a_pickle_of_pythons_own_is_converted(tmp_path: Path) -> None:
    """Of which torch's tensors hold a file of torch's as bytes; the name says nothing."""
    for name in ("w.pkl", "w.pth", "w.pt"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": SMALL, "evil": Evil(), "layer": Whole()}))
        convert(tmp_path / name, tmp_path / f"{name}.safetensors", Choice())
        assert is_small(read_part(tmp_path / f"{name}.safetensors"))
    assert not Path("/tmp/ade_harness_was_converted").exists()


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.eye(3).to_sparse(), r"sparse \(sparse_coo\)"), (torch.ones(3).to(torch.float8_e4m3fn), "of 8 bits"),
        (torch.quantize_per_tensor(torch.rand(2), 0.1, 0, torch.qint8), "quantised"),
    ],
)  # fmt: skip
def test_tensors_that_are_no_weights_are_named(value: torch.Tensor, kind: str, tmp_path: Path) -> None:
    torch.save({"module." + name: value for name in ("a", "b")}, tmp_path / "w.pth")
    with pytest.raises(HarnessError, match=rf"w\.pth: module\.a is {kind}.*dense floating-point numbers"):
        read_part(tmp_path / "w.pth")


def test_small_types_are_converted_and_odd_tensors_are_not(tmp_path: Path) -> None:
    small = {"a": torch.ones(3).to(torch.float8_e4m3fn), "b": torch.arange(3).to(torch.uint16)}
    torch.save({"model": {**SMALL, **small}, "args": argparse.Namespace()}, tmp_path / "s.pth")
    part, _, _ = convert(tmp_path / "s.pth", tmp_path / "s.safetensors", Choice())
    assert all(torch.equal(part.state[name].float(), value.float()) for name, value in small.items())
    for odd in (torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.rand(2), 0.1, 0, torch.quint8)):
        torch.save({"model": {**SMALL, "odd": odd}}, tmp_path / "odd.pth")
        with pytest.raises(HarnessError, match=r"holds tensors of a kind that is not read \(torch\._utils\._rebuild_"):
            convert(tmp_path / "odd.pth", tmp_path / "odd.safetensors", Choice())


def test_parameters_with_attributes_are_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """`p.no_weight_decay = True`, which torch writes in a way of its own."""
    module = Whole()
    for parameter in module.parameters():
        parameter.no_weight_decay = True  # type: ignore[attr-defined]
    torch.save({"model": module}, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors", Choice())
    found, expected = load_file(tmp_path / "m.safetensors"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not recwarn


def test_entries_called_parameters_are_networks() -> None:
    """Words of trainers' other entries (meter, metric) stand inside of other words."""
    content = {"parameters": SMALL, "ema": SMALL}
    assert take_part(content, Path("m.pth"), Choice()).where == ("parameters",)
    assert take_part(content, Path("m.pth"), Choice(weights="ema")).where == ("ema",)
    content = {"model": SMALL, "ema_parameters": SMALL}
    assert take_part(content, Path("m.pth"), Choice(weights="ema")).where == ("ema_parameters",)
    content = {"geometric": SMALL, "val_meter": SMALL}
    assert take_part(content, Path("m.pth"), Choice()).where == ("geometric",)


def test_entries_with_names_that_are_words_of_the_note_are_noted_too() -> None:
    content = {"model": SMALL, "model_ema": SMALL, "weights": SMALL}
    assert "weights beside it: not read" in take_part(content, Path("m.pth"), Choice()).beside


def test_what_is_no_network_is_neither_noted_nor_taken_for_averages(tmp_path: Path) -> None:
    others = {
        "rng_state": {"cpu": torch.zeros(9)},
        "meters_avg": {"iou": torch.ones(())},
        "val_metrics": {"a": torch.ones(2)},
    }
    torch.save({"model": SMALL, **others}, tmp_path / "m.pth")
    part = read_part(tmp_path / "m.pth")
    assert part.where == ("model",)
    assert part.beside == ()
    with pytest.raises(HarnessError, match="no averaged weights were found"):
        read_part(tmp_path / "m.pth", Choice(weights="ema"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_becomes_its_state_dict(tmp_path: Path, zipped: bool) -> None:
    module = Whole().half()
    torch.save({"model": module, "epoch": 3}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors", Choice())
    found, expected = load_file(tmp_path / "m.safetensors"), module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_files_that_hold_themselves_end(tmp_path: Path) -> None:
    """Each level twice in the next: a reader that walks every way would never come back."""
    content: dict[str, Any] = {"state_dict": dict(SMALL), "args": argparse.Namespace()}
    content["again"] = {str(n): content for n in range(50)}
    torch.save(content, tmp_path / "self.pth")
    part, _, _ = convert(tmp_path / "self.pth", tmp_path / "self.safetensors", Choice())
    assert is_small(part)
    module: nn.Module = nn.Linear(1, 1)
    for _ in range(60):
        level = Whole()
        level._modules.update(one=module, two=module)
        module = level
    torch.save({"model": module}, tmp_path / "deep.pth")
    with pytest.raises(HarnessError, match=r"over 100,000 modules, perhaps in each other"):
        convert(tmp_path / "deep.pth", tmp_path / "deep.safetensors", Choice())


def test_what_convert_refuses(cli: Callable[..., Done], tmp_path: Path) -> None:
    torch.save({"state_dict": SMALL, "state_dict_ema": OTHER, "args": argparse.Namespace()}, tmp_path / "w.pth")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:300])
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for file, text in (
        ("missing.pth", "no such file"), ("script.pt", "a TorchScript program"), ("cut.pth", "not a readable"),
        ("evil.pkl", "holds no state_dict"),
    ):  # fmt: skip
        with pytest.raises(HarnessError, match=rf"{file}: {text}"):
            convert(tmp_path / file, tmp_path / "out.safetensors", Choice())
    with pytest.raises(HarnessError, match=r"ends in \.safetensors"):
        convert(tmp_path / "w.pth", tmp_path / "out.pth", Choice())
    with pytest.raises(HarnessError, match=r"out\.safetensors: there is no folder .*/nowhere\. Make it first"):
        convert(tmp_path / "w.pth", tmp_path / "nowhere/out.safetensors", Choice(weights="model"))
    with pytest.raises(HarnessError, match=r"^/proc/out\.safetensors: cannot be written \(.*I/O error"):
        convert(tmp_path / "w.pth", Path("/proc/out.safetensors"), Choice(weights="model"))
    with pytest.raises(HarnessError, match=r"^--prefix nope\.: no name in .*w\.pth begins with it"):
        convert(tmp_path / "w.pth", tmp_path / "out.safetensors", Choice("nope.", prefix_option="--prefix "))
    done = cli("convert", "w.pth", "out.safetensors", "--weights", "ema", "--json")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert (answer["tensors"], answer["left_out"]) == (2, ["argparse.Namespace"])
    assert is_other(read_part(tmp_path / "out.safetensors"))
    done = cli("convert", "w.pth", "out.safetensors")
    assert done.code == 2
    assert "out.safetensors: exists already" in done.err
    assert not Path("/tmp/ade_harness_was_converted").exists()


def test_lightning_swaps_them_too() -> None:
    """Its WeightAveraging saves the average as state_dict, and what was trained as current_model_state."""
    content = {"epoch": 3, "state_dict": below("model.", OTHER), "current_model_state": below("model.")}
    part = take_part(content, FILE, Choice(), known)
    assert is_other(part)
    assert "those that were trained are in current_model_state: model.checkpoint_weights=model" in str(part)
    assert is_other(take_part(content, FILE, Choice(weights=EMA), known))
    assert is_small(take_part(content, FILE, Choice(weights=MODEL), known))


def test_torchs_averaged_model_is_an_average() -> None:
    content = {"n_averaged": torch.tensor(5), **below("module.")}
    assert is_small(take_part(content, FILE, Choice(weights=EMA), known))
    assert is_small(take_part(content, FILE, Choice(), known))


@pytest.mark.parametrize("outer", ["module.", "_orig_mod.", "module._orig_mod."])
def test_averaged_weights_below_another_prefix(outer: str) -> None:
    content = {"state_dict": {**below(f"{outer}model."), **below(f"{outer}ema_model.", OTHER)}}
    assert is_small(take_part(content, FILE, Choice(), known))
    assert is_small(take_part(content, FILE, Choice(weights=MODEL), known))
    assert is_other(take_part(content, FILE, Choice(weights=EMA), known))
    assert is_other(take_part(content, FILE, Choice(f"{outer}ema_model.", EMA), known))


@pytest.mark.parametrize("extra", [{"layer._extra_state": None}, {"layer._extra_state": {"scale": 1}}, {"epoch": 3}])
def test_what_is_no_weight_beside_weights(extra: dict[str, Any]) -> None:
    for content in ({**SMALL, **extra}, {"state_dict": {**SMALL, **extra}, "epoch": 3}):
        assert is_small(take_part(content, FILE, Choice(), known))
    with pytest.raises(HarnessError, match="holds no state_dict"):
        take_part({"epoch": 3, "step": 7, "name": "a", "rng": torch.ones(3)}, FILE, Choice(), known)


def test_single_numbers_stay_single_numbers(tmp_path: Path) -> None:
    arrays = {"bn.num_batches_tracked": np.array(7), "bn.weight": np.ones((2, 3), np.float32)[:, ::-1]}
    np.savez(tmp_path / "w.npz", **arrays)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"model": arrays}))
    for name in ("w.npz", "w.pkl"):
        state = read_part(tmp_path / name).state
        assert {key: list(value.shape) for key, value in state.items()} == {
            "bn.num_batches_tracked": [], "bn.weight": [2, 3],
        }  # fmt: skip


def test_torch_may_have_saved_a_pkl(tmp_path: Path) -> None:
    torch.save(SMALL, tmp_path / "w.pkl")
    assert is_small(read_part(tmp_path / "w.pkl"))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.ones(2, 3, dtype=torch.int8), "int8"),
        (torch.ones(2, 3, dtype=torch.complex64), "complex64"),
        (torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "qint8"),
    ],
)
def test_weights_that_are_no_floating_point_numbers_are_refused(value: torch.Tensor, kind: str) -> None:
    layer = nn.Linear(3, 2)
    state = {"weight": value, "bias": torch.ones(2)}
    with pytest.raises(HarnessError, match=rf"w\.pth: weight is {kind}, and the model's weights are floating-point"):
        load_strictly(layer, state, Strictness("w.pth"))


def test_a_prefix_that_nobody_knows_is_proposed() -> None:
    state = {f"segmentor.net2.{name}": value for name, value in nn.Linear(3, 2).state_dict().items()}
    with pytest.raises(HarnessError, match=r"model\.checkpoint_prefix=segmentor\.net2\.$"):
        load_strictly(nn.Linear(3, 2), state, Strictness("w.pth"))
    with pytest.raises(HarnessError, match="Choose the model that the file was made for"):
        load_strictly(nn.Linear(3, 2), {"segmentor.weight": torch.ones(2, 3)}, Strictness("w.pth"))


def test_a_prefix_is_proposed_as_the_file_has_it() -> None:
    state = {f"inner.{name}": value for name, value in nn.Linear(3, 2).state_dict().items()}
    with pytest.raises(HarnessError, match=r"model\.checkpoint_prefix=net\.inner\.$"):
        load_strictly(nn.Linear(3, 2), state, Strictness("w.pth", prefix="net."))


def test_messages_have_the_files_own_names(tmp_path: Path) -> None:
    part = take_part({"state_dict": below("module.model.")}, FILE, Choice(), known)
    assert part.name_in_file("layer.weight") == "module.model.layer.weight"
    torch.save(below("module.", {"weight": torch.ones(7, 3), "bias": torch.ones(2)}), tmp_path / "w.pth")
    overrides = (
        "model=custom",
        "model._target_=torch.nn.Linear",
        "+model.kwargs.in_features=3",
        "+model.kwargs.out_features=2",
    )
    with pytest.raises(
        HarnessError, match=r"weight \(in the file module\.weight\) \[7, 3\] \(the model has \[2, 3\]\)"
    ):
        load_model(compose_config([*overrides, f"model.checkpoint={tmp_path}/w.pth"]).model)


def test_a_backbone_that_cannot_be_fetched_is_asked_for_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", missing)
    for overrides in (
        ["model=timm", "model.backbone=test_vit.r160_in1k"],
        ["model=dinov3_7b_linear", "model.backbone.source=timm"],
    ):
        cfg = compose_config([*overrides, "model.checkpoint=head.safetensors"]).model
        with pytest.raises(HarnessError, match=r"give model\.backbone_checkpoint=PATH"):
            backbone_checkpoint(cfg, "x") if cfg.kind != "timm" else timm.load_headless(cfg, ade20k_classes())


@pytest.mark.parametrize("prefix", ["module.", "net.", "network.", "net.network.", "ema_model.", "module.student."])
def test_todays_names_of_transformers_are_known_below_a_prefix(tmp_path: Path, prefix: str) -> None:
    """They are not those of the hub's files: the library has renamed its networks' parts."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
    torch.save({f"{prefix}{k}": v for k, v in network.state_dict().items()}, tmp_path / "w.pth")
    loaded = ade.load_model("segformer_b0", checkpoint=tmp_path / "w.pth")
    assert prefix in str(loaded.facts["part"])
    assert torch.equal(loaded.network.network.decode_head.classifier.bias, network.decode_head.classifier.bias)


def test_wrappers_may_be_deep_and_a_pickle_may_hold_itself(tmp_path: Path) -> None:
    state = nn.Conv2d(3, 4, 1).state_dict()
    torch.save({"checkpoint": {"model": {"state_dict": state}}}, tmp_path / "w.pth")
    assert set(read_part(tmp_path / "w.pth").state) == {"weight", "bias"}
    knot: dict[str, Any] = {}
    knot |= {f"key{number}": knot for number in range(12)} | {str(n): dict.fromkeys("ab", knot) for n in range(12)}
    torch.save(knot, tmp_path / "knot.pth")
    side: dict[str, Any] = {"model": {"state_dict": state}}
    side["itself"] = side
    torch.save({"student": side}, tmp_path / "side.pth")
    assert set(read_part(tmp_path / "side.pth").state) == {"student.weight", "student.bias"}
    with pytest.raises(HarnessError, match="holds no state_dict"):
        read_part(tmp_path / "knot.pth")


def test_which_of_two_networks_is_the_users_to_say(tmp_path: Path) -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150))
    for names, message in (
        (("teacher", "student"), r"several networks that fit.*: student\. \(208\), teacher\. \(208\)"),
        (("two", "one"), r"several networks that fit, below 'one\.', 'two\.': choose one, as in"),
    ):
        torch.save({f"{n}.{k}": v for n in names for k, v in network.state_dict().items()}, tmp_path / "w.pth")
        with pytest.raises(HarnessError, match=message):
            ade.load_model("segformer_b0", checkpoint=tmp_path / "w.pth")


def test_tensors_larger_than_their_file_are_not_written_out(tmp_path: Path) -> None:
    for name, tensor, message in (
        ("expanded", torch.zeros(1).expand(3000, 3000), "says that it has 9,000,000 values"),
        ("strided", torch.zeros(2)[:1].expand(500), "says that it has 500 values"),
        ("complex", torch.zeros(2, dtype=torch.complex64), "is complex"),
    ):
        torch.save({"state_dict": {"layer.weight": tensor, "layer.bias": torch.zeros(3)}}, tmp_path / f"{name}.pth")
        with pytest.raises(HarnessError, match=message):
            convert(tmp_path / f"{name}.pth", tmp_path / "out.safetensors", Choice())
        assert not (tmp_path / "out.safetensors").exists()
