"""Large models: weights are mapped instead of copied, and can be kept in half precision."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Done

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

MODEL = """
import torch


class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, width, 4, 4)
        self.norm = torch.nn.BatchNorm2d(width)
        self.body = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(10))
        self.head = torch.nn.Conv2d(width, 150, 1)

    def forward(self, images):
        features = self.norm(self.stem(images))
        for layer in self.body:
            features = features + layer(torch.relu(features))
        return self.head(features)
"""

MEASURE = """
import re
import sys
import threading
import time

from ade_harness.config.compose import compose_config
from ade_harness.models.loading import load_model


def anonymous_mb():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024


cfg = compose_config(["model=segformer_b0", "dataset=ade20k", "dataset.root=x", *sys.argv[1:]]).model
load_model(cfg)  # imports everything
before, peak, ended = anonymous_mb(), 0.0, False


def watch():
    global peak
    while not ended:
        peak = max(peak, anonymous_mb())
        time.sleep(0.001)


thread = threading.Thread(target=watch)
thread.start()
model = load_model(cfg)
ended = True
thread.join()
print(max(peak, anonymous_mb()) - before, sum(p.numel() for p in model.module.parameters()) * 4 / 2**20)
"""

WIDE = (
    "model.architecture.backbone.hidden_sizes=[64,128,320,768]", "model.architecture.backbone.depths=[2,2,2,2]",
    "model.architecture.head.decoder_hidden_size=768",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "maximum"), [("safetensors", "fp32", 0.2), ("pth", "bf16", 0.75)])
def test_weights_are_never_held_twice(tmp_path: Path, kind: str, dtype: str, maximum: float) -> None:
    """What a process adds to memory of its own while it loads, as a share of the weights in float32."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=150, depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 320, 768], decoder_hidden_size=768,
        num_attention_heads=[1, 2, 5, 8],
    )  # fmt: skip
    network = SegformerForSemanticSegmentation(config)
    file = tmp_path / f"weights.{kind}"
    if kind == "pth":
        torch.save(network.state_dict(), file)
    else:
        network.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
    overrides = [f"model.checkpoint={file}", *WIDE, f"model.dtype={dtype}", f"inference.precision={dtype}"]
    done = subprocess.run([sys.executable, "-c", MEASURE, *overrides], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = map(float, done.stdout.split())
    assert size > 60
    assert peak < maximum * size


def test_weights_in_bf16_predict_what_autocast_does(call: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    overrides = [
        "model=custom", "model._target_=net.Net", "inference=original_size", "inference.precision=bf16",
        "dataset.limit=6", "tracking=none", "run.overlays=0", "runtime.workers=0",
    ]  # fmt: skip
    assert call(*overrides, "run.dir=autocast").code == 0
    done = call(*overrides, "model.dtype=bf16", "run.dir=half")
    assert done.code == 0, done.err
    first, half = (pd.read_parquet(tmp_path / run / "ledger") for run in ("autocast", "half"))
    pixels = [frame.pixels.map(sum).sum() for frame in (first, half)]
    assert pixels[0] == pixels[1]
    counts = [
        pd.concat([pd.DataFrame({"p": r.prediction, "n": r.pixels}) for r in frame.itertuples()]).groupby("p").n.sum()
        for frame in (first, half)
    ]
    changed = counts[0].sub(counts[1], fill_value=0).abs().sum() / 2 / pixels[0]
    assert changed < 0.02  # rounded biases and additions: near ties fall otherwise


def test_weights_of_a_dtype_need_its_precision(call: Callable[..., Done]) -> None:
    done = call("model.dtype=bf16")
    assert done.code == 2
    assert "model.dtype=bf16 needs inference.precision=bf16 (it is fp32)" in done.err


def test_a_checkpoint_of_another_dtype_is_converted(call: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    namespace: dict[str, type[torch.nn.Module]] = {}
    exec(MODEL, namespace)
    state = namespace["Net"]().state_dict()
    save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "half.safetensors")
    done = call(
        "model=custom", "model._target_=net.Net", "model.checkpoint=half.safetensors", "inference=original_size",
        "dataset.limit=2", "tracking=none", "run.overlays=0", "runtime.workers=0",
    )  # fmt: skip
    assert done.code == 0, done.err
