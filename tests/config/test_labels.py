"""Runs of one name are told apart in every table."""

from __future__ import annotations

from pathlib import Path

import pytest

from ade_harness.config.compose import compose_config, stored_config
from ade_harness.config.plain import as_dict


@pytest.mark.parametrize(
    ("overrides", "label"),
    [
        (["model=hf", "model.id=nvidia/segformer-b0-finetuned-ade-512-512"],
         "transformers checkpoint: nvidia/segformer-b0-finetuned-ade-512-512"),
        (["model=onnx", "model.path=/data/exports/eomt, v2.onnx"], "ONNX model: exports/eomt, v2.onnx"),
        (["model=custom", "model._target_=my_pkg.MyNet"], "custom model: my_pkg.MyNet"),
        (["model=timm", "model.backbone=vit_base_patch16_224", "model.checkpoint=heads/a.safetensors"],
         "timm backbone, linear head: vit_base_patch16_224, heads/a.safetensors"),
        (["model=smp", "model.architecture.arch=unet", "model.architecture.encoder_name=resnet34"],
         "segmentation-models-pytorch: unet-resnet34"),
        (["model=http", "model.url=http://127.0.0.1:8000"], "HTTP endpoint: http://127.0.0.1:8000"),
        (["model=segformer_b0", "dataset=demo"], "SegFormer (MiT-B0)"),
        (["model=segformer_b0", "dataset=demo", "model.checkpoint=run3/last.ckpt"], "SegFormer (MiT-B0): run3/last.ckpt"),
        (["model=segformer_b0", "dataset=demo", "model.checkpoint=last.ckpt", "model.label=mine"], "mine"),
        (["model=segformer_b0", "dataset=demo", "model.checkpoint=/home/alice/last.ckpt"], "SegFormer (MiT-B0): last.ckpt"),
        (["model=demo"], "demo network"),
    ],
)  # fmt: skip
def test_a_label_says_which_one(overrides: list[str], label: str) -> None:
    config = compose_config(overrides)
    assert config.model.label == label
    assert stored_config(as_dict(config)).model.label == label  # a run that is resumed keeps it


def test_a_label_stays_short(tmp_path: Path) -> None:
    label = compose_config(["model=onnx", f"model.path={'a' * 200}.onnx"]).model.label
    assert len(label) == 80
    assert label.endswith("...")
