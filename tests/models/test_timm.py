"""timm: any backbone below a linear head, DINOv3's weights under timm's names, and what is refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ade_harness.config.compose import compose_config
from ade_harness.config.model import ModelConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import HarnessError
from ade_harness.models import from_official
from ade_harness.models.backbones.timm import TimmFeatures, build_timm, statistics_of
from ade_harness.models.checkpoint.public import Checkpoint
from ade_harness.models.heads.linear import LinearSegmenter
from ade_harness.models.loading import load_for_probe, load_model
from tests.conftest import REPOSITORY, Done
from tests.models.systems.test_dense_systems import GOLDEN, golden_input, official_weights
from tests.models.systems.test_mask_systems import official

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

TINY = "vit_tiny_patch16_224"


def model_cfg(*overrides: str) -> ModelConfig:
    return compose_config(list(overrides)).model


# DINOv3's weights as timm names them


def timms_names(official: dict[str, Tensor], **size: Any) -> dict[str, Tensor]:
    """The weights of an official file as timm's own conversion has them."""
    import timm

    network = timm.create_model("vit_7b_patch16_dinov3", **size)
    converted = timm.models.eva.checkpoint_filter_fn(dict(official), network)
    assert network.load_state_dict(converted, strict=True)
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_dinov3_from_timm_equals_the_official_code() -> None:
    whole = official_weights("dinov3_vit7b_linear")
    prefix = "segmentation_model.0.feature_model."
    backbone = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    head = {k: v for k, v in whole.items() if not k.startswith(prefix)}
    depth = len({k.split(".")[1] for k in backbone if k.startswith("blocks.")})
    width = backbone["cls_token"].shape[-1]
    hidden = backbone["blocks.0.mlp.w1.weight"].shape[0]
    state = timms_names(backbone, depth=depth, embed_dim=width, num_heads=2, mlp_ratio=hidden / width)
    assert "reg_token" in state
    assert not any("periods" in name or "mask_token" in name for name in state)
    images = golden_input((112, 150), 96)
    with torch.inference_mode():
        logits = from_official("dinov3_7b_linear", {**state, **head}, num_attention_heads=2)(images)
        assert torch.equal(logits, from_official("dinov3_7b_linear", whole)(images))  # timm leaves nothing else out
    found = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)[:, ::5, ::8, ::8]
    expected = torch.from_numpy(np.load(GOLDEN / "dinov3_vit7b_linear.npz")["logits_every8"])
    assert float((found - expected).abs().max() / expected.abs().max()) < 5e-6


def test_dinov3_mask2former_from_timm_equals_the_official_code() -> None:
    """The head's own names, and the backbone's as timm has them; rotary periods are timm's own, which are exact."""
    state = official("dinov3_mask2former")
    prefix = "segmentation_model.0.backbone."
    backbone = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    depth = len({k.split(".")[1] for k in backbone if k.startswith("blocks.")})
    width, hidden = backbone["cls_token"].shape[-1], backbone["blocks.0.mlp.w1.weight"].shape[0]
    timms = timms_names(backbone, depth=depth, embed_dim=width, num_heads=4, mlp_ratio=hidden / width)
    head = {k: v for k, v in state.items() if not k.startswith(prefix)}
    images = golden_input((64, 96), 96)
    with torch.inference_mode():
        found = from_official("dinov3_7b_mask2former", {"backbone": timms, "head": head}, num_attention_heads=4)
        expected = from_official("dinov3_7b_mask2former", state, num_attention_heads=4)
        one, two = found.network(images), expected.network(images)
    assert torch.equal(one.masks, two.masks)
    assert torch.equal(one.classes, two.classes)


def test_published_files_have_rounded_periods(tmp_path: Path) -> None:
    """As Meta's own file has them; timm's and the hub's leave them out."""
    state = timms_names(
        {
            k.removeprefix("segmentation_model.0.feature_model."): v
            for k, v in official_weights("dinov3_vit7b_linear").items()
            if not k.startswith("segmentation_model.1")
        },
        depth=4, embed_dim=128, num_heads=2, mlp_ratio=2,
    )  # fmt: skip
    save_file(state, tmp_path / "timm.safetensors")
    small = [f"model.architecture.backbone.{k}={v}" for k, v in SMALL.items()]
    overrides = ("model=dinov3_7b_linear", *small, f"model.backbone_checkpoint={tmp_path}/timm.safetensors")
    periods: Any = load_for_probe(
        model_cfg(*overrides), ade20k_classes()
    ).module.backbone.network.rope_embeddings.periods  # type: ignore[union-attr]
    exact = 100.0 ** (2 * torch.arange(16) / 32)
    assert torch.equal(periods, exact.bfloat16().float())
    assert not torch.equal(periods, exact)


SMALL = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}


def test_the_licence_is_reported_all_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = official_weights("dinov3_vit7b_linear")
    prefix = "segmentation_model.0.feature_model."
    backbone = {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}
    save_file(timms_names(backbone, depth=4, embed_dim=128, num_heads=2, mlp_ratio=2), tmp_path / "timm.safetensors")
    save_file({k: v for k, v in whole.items() if not k.startswith(prefix)}, tmp_path / "head.safetensors")
    found = Checkpoint(
        tmp_path / "timm.safetensors", "0" * 64, "timm/vit_7b_patch16_dinov3.lvd1689m@abc/model.safetensors"
    )
    monkeypatch.setattr("ade_harness.models.checkpoint.sources.hub_checkpoint", lambda *_: found)
    small = [f"model.architecture.backbone.{k}={v}" for k, v in SMALL.items()]
    overrides = (
        "model=dinov3_7b_linear",
        *small,
        f"model.checkpoint={tmp_path}/head.safetensors",
        "model.backbone.source=timm",
    )
    model = load_model(model_cfg(*overrides))
    assert model.facts["backbone_origin"] == found.origin
    (note,) = model.notes
    assert note.endswith("from timm's repository, are under the DINOv3 License")


def test_dinov3s_files_are_asked_of_timms_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(*where: Any) -> Any:
        asked.append(where[:2])
        raise HarnessError("no network")

    monkeypatch.setattr("ade_harness.models.checkpoint.sources.hub_checkpoint", hub)
    for model in ("dinov3_7b_linear", "dinov3_7b_mask2former"):
        cfg = model_cfg(f"model={model}", "model.backbone.source=timm")
        assert "DINOv3" in (cfg.backbone.license or "")
        with pytest.raises(HarnessError, match="no network"):
            from ade_harness.models.checkpoint.sources import backbone_checkpoint

            backbone_checkpoint(cfg, "x")
    assert asked == [("timm/vit_7b_patch16_dinov3.lvd1689m", "model.safetensors")] * 2
    with pytest.raises(
        HarnessError, match=r"backbone\.source=timm: timm has no such backbone for model=siglip2_so400m"
    ):
        load_for_probe(model_cfg("model=siglip2_so400m", "model.backbone.source=timm"), ade20k_classes())


# any backbone


# name -> stride of the coarsest map, of the logits, whether it takes any size; at least one of each way in
BACKBONES = {
    TINY: (16, 16, True),
    "eva02_tiny_patch14_224": (14, 14, True),
    "resnet10t": (32, 4, True),
    "convnext_atto": (32, 4, True),
    "swin_s3_tiny_224": (32, 4, True),
    "maxvit_pico_rw_256": (32, 4, False),
    "xcit_nano_12_p8_224": (8, 8, False),
    "hiera_tiny_224": (32, 4, False),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_families_give_maps_for_a_head(name: str) -> None:
    stride, finest, any_size = BACKBONES[name]
    torch.manual_seed(0)
    network = LinearSegmenter(build_timm(name, None, None, None), pad=True, classes=150).eval()
    backbone = network.backbone
    assert isinstance(backbone, TimmFeatures)
    assert backbone.patch_size == stride
    assert (backbone.side is None) == any_size
    side = backbone.side or 160
    sizes = [(side, side)] + ([(side - 32, side + 48)] if any_size else [])
    with torch.inference_mode():
        for height, width in sizes:
            found = network(torch.randn(1, 3, height, width))
            padded = [s + -s % stride for s in (height, width)]
            assert found.shape == (1, 150, padded[0] // finest, padded[1] // finest)
            assert torch.isfinite(found).all()


def test_the_table_of_the_docs_is_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    from scripts import timm_table  # all of timm, which other workers that collect this file do not need

    timm_table.main(["resnet", "efficientformer"])
    lines = capsys.readouterr().out.splitlines()
    page = (REPOSITORY / "docs/timm.md").read_text()
    assert len(lines) == 4
    assert all(line in page for line in lines)


def test_the_features_are_timms_own() -> None:
    import timm

    torch.manual_seed(0)
    reference = timm.create_model(
        "vit_tiny_patch14_reg4_dinov2" if timm.is_model("vit_tiny_patch14_reg4_dinov2") else TINY
    ).eval()
    state = reference.state_dict()
    built = build_timm(TINY, state, 2, None)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        found = built(images)
        tokens = reference.forward_features(images)[:, reference.num_prefix_tokens :]
    assert torch.allclose(
        found[-1].flatten(2).transpose(1, 2), tokens, atol=1e-5
    )  # a resampled position by 1 is the same
    assert len(found) == 2
    assert built.channels == 2 * 192


def test_weights_are_strict() -> None:
    import timm

    state = timm.create_model(TINY).state_dict()
    assert build_timm(TINY, state, None, None)
    without = {k: v for k, v in state.items() if not k.startswith("head.")}
    assert build_timm(TINY, without, None, None)  # a file without the classifier
    for broken in ({**without, "extra": torch.zeros(1)}, {k: v for k, v in without.items() if k != "norm.weight"}):
        with pytest.raises(
            HarnessError, match=rf"model\.backbone={TINY}: timm cannot make or load it .*(extra|norm\.weight)"
        ):
            build_timm(TINY, broken, None, None)
    with pytest.raises(HarnessError, match=r"timm .* has no such model\. Did you mean"):
        build_timm("vit_tiny_patch16_22", None, None, None)
    with pytest.raises(HarnessError, match=r"Invalid pretrained tag"):
        build_timm(f"{TINY}.nonsense", None, None, None)
    with pytest.raises(HarnessError, match=r"head\.maps=50: the backbone has 12 maps"):
        build_timm(TINY, None, 50, None)


def test_statistics_are_those_of_the_weights() -> None:
    assert statistics_of("vit_base_patch16_224.augreg_in21k")[0] == [127.5] * 3
    assert statistics_of("vit_large_patch14_dinov2.lvd142m")[0] == pytest.approx([123.675, 116.28, 103.53])


PROBE = (
    "probe", "model=timm", f"model.backbone={TINY}", "dataset=demo", "dataset.images=8", "probe.iterations=4", "probe.warmup=1",
    "probe.batch=2", "probe.crop=64", "probe.side=64", "runtime.workers=0", "tracking=none", "run.dir=head", "runtime.accelerator=cpu",
)  # fmt: skip


def test_a_probe_is_trained_and_evaluated(call: Callable[..., Done], tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model(TINY).state_dict(), tmp_path / "backbone.safetensors")
    done = call(*PROBE, f"model.backbone_checkpoint={tmp_path}/backbone.safetensors")
    assert done.code == 0, done.err
    assert set(load_file(tmp_path / "head/head.safetensors")) >= {"head.norm.weight", "head.classifier.weight"}
    overrides = (
        "model=timm", f"model.backbone={TINY}", f"model.backbone_checkpoint={tmp_path}/backbone.safetensors",
        f"model.checkpoint={tmp_path}/head/head.safetensors", "dataset.images=2", "runtime.workers=0", "tracking=none",
        "inference.resize.side=64", "inference.window.crop=64", "inference.window.stride=43", "metrics.resamples=0", "run.dir=run",
    )  # fmt: skip
    done = call(*overrides)
    assert done.code == 0, done.err
    facts = json.loads((tmp_path / "run/manifest.json").read_text())["model"]
    assert facts["weights"] == "pretrained"
    assert facts["backbone_sha256"]
    model = load_model(model_cfg(*overrides[:4]))
    assert torch.equal(
        model.module.head.classifier.weight, load_file(tmp_path / "head/head.safetensors")["head.classifier.weight"]
    )  # type: ignore[union-attr, arg-type]
    assert model.mean == (127.5,) * 3


def test_the_command_that_a_probe_prints_evaluates_what_was_trained(call: Callable[..., Done], tmp_path: Path) -> None:
    """Also fields of the network, another data set than the demo's, and folders that a shell would take apart."""
    import timm

    torch.manual_seed(0)
    below = tmp_path / "back bone's.safetensors"
    save_file(timm.create_model(TINY).state_dict(), below)
    changed = ("model.architecture.head.maps=2", "model.input.mean=[1,2,3]", "inference.tta.flip=true")
    done = call(*PROBE, f"model.backbone_checkpoint={below}", *changed)
    assert done.code == 0, done.err
    line = next(line for line in done.out.splitlines() if line.startswith("evaluate it: "))
    overrides = shlex.split(line.removeprefix("evaluate it: python -m ade_harness "))
    assert {"dataset=demo", "inference.tta.flip=true", f"model.checkpoint={tmp_path}/head/head.safetensors"} <= set(
        overrides
    )
    quick = ("dataset.images=2", "runtime.workers=0", "tracking=none", "metrics.resamples=0", "run.dir=run")
    done = call(*overrides, *quick, "inference.tta.flip=false")
    assert done.code == 0, done.err
    assert "was trained above another file" not in done.out
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["model"]["architecture"]["head"]["maps"] == 2
    assert config["model"]["input"]["mean"] == [1, 2, 3]
    # another backbone below the head is not silent
    save_file(timm.create_model(TINY).state_dict(), below)
    done = call(*overrides, *quick, "run.dir=other", "inference.tta.flip=false")
    assert "head.safetensors was trained above another file of the backbone" in " ".join(done.out.split())
    assert "OTHER BACKBONE: the head was trained above other weights" in done.out


def test_crops_that_a_backbone_does_not_take_are_refused(call: Callable[..., Done]) -> None:
    overrides = [word for word in PROBE if not word.startswith(("model.backbone", "probe.crop", "probe.side"))]
    done = call(
        *overrides, "model.backbone=efficientformer_l1", "model.weights=random", "probe.crop=96", "probe.side=96"
    )
    assert done.code == 2
    assert "probe.crop=96: the backbone takes 224x224 (width x height) only. Choose probe.crop=224" in done.err


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "model=timm: name the backbone: model.backbone=NAME"),
        ([f"model.backbone={TINY}"], "has a linear head, which is trained first"),
        (["model.backbone=nothing_of_the_sort", "model.weights=random"], "has no such model"),
        ([f"model.backbone={TINY}", "model.weights=random", "model.architecture.head.map=3"], "no such field"),
        (
            [f"model.backbone={TINY}", "model.weights=random", "model.architecture.head.maps=many"],
            "maps=many: expected a whole number",
        ),
        (
            [f"model.backbone={TINY}", "model.weights=random", "model.architecture.backbone.img_size=0"],
            "img_size=0: expected a whole number",
        ),
        (
            ["model.architecture.backbone=vit"],
            "model.architecture.backbone=vit: expected fields: model.architecture.backbone.name=",
        ),
    ],
)
def test_mistakes_are_one_message(overrides: list[str], text: str) -> None:
    with pytest.raises(HarnessError, match=text):
        load_model(model_cfg("model=timm", *overrides))


# segmentation-models-pytorch


def test_a_network_of_smp(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install 'ade-harness[smp]'")
    torch.manual_seed(0)
    network = smp.create_model("unet", "resnet18", encoder_weights=None, classes=150).eval()
    torch.save({"state_dict": {f"model.{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.ckpt")
    network.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/config.json").read_text())
    (tmp_path / "saved/config.json").write_text(json.dumps({**settings, "encoder_weights": "imagenet"}))  # as usual
    overrides = ("model=smp", "model.architecture.arch=unet", "model.architecture.encoder_name=resnet18")
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        expected = network(images)
        for given in ((*overrides, f"model.checkpoint={tmp_path}/w.ckpt"), ("model=smp", f"model.id={tmp_path}/saved")):
            loaded = load_model(model_cfg(*given))
            assert torch.equal(loaded.module(images), expected)
            assert "do not say how pixels were normalised; model.input's mean 123.675/" in loaded.notes[0]
        assert load_model(model_cfg(*overrides, "model.weights=random")).weights == "random"
    for given, text in (
        (("model=smp",), "name the network"),
        ((*overrides,), "Give yours as model.checkpoint=PATH"),
        (("model=smp", "model.architecture.arch=nothing", overrides[2], "model.weights=random"), "smp cannot build it"),
        (("model=smp", f"model.id={tmp_path}"), "smp cannot load it"),
        (
            (*overrides, "model.architecture.decoder_interpolatoin=bilinear", "model.weights=random"),
            "has no field decoder_interpolatoin. Did you mean 'decoder_interpolation'",
        ),
    ):
        with pytest.raises(HarnessError, match=text):
            load_model(model_cfg(*given))
