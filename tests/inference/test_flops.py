"""Operations of an image: as a formula says, over windows and views, and none where nothing can be counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.inference.factory import open_network
from ade_harness.inference.flops import flops_of_image
from ade_harness.inference.plan import plan_views
from ade_harness.runs.result import per_class_rows
from ade_harness.tracking.content import summary_of
from tests.conftest import Done

CONVOLUTION = nn.Conv2d(3, 150, 4, stride=4)


def flops(overrides: list[str], size: tuple[int, int]) -> int | None:
    return flops_of_image(CONVOLUTION, compose_config(overrides).inference, size)


def of_window(height: int, width: int) -> int:
    return 2 * (height // 4) * (width // 4) * 150 * 3 * 16


def test_a_formula_for_every_window_and_view() -> None:
    assert flops(["inference=original_size"], (64, 96)) == of_window(64, 96)
    assert flops(["inference=original_size", "inference.tta.flip=true"], (64, 96)) == 2 * of_window(64, 96)
    inference = compose_config(["inference=mmseg_slide_512"]).inference
    (plan,) = plan_views((512, 1024), inference)
    assert flops(["inference=mmseg_slide_512"], (512, 1024)) == len(plan.origins) * of_window(512, 512)
    assert CONVOLUTION.weight.device.type == "cpu"
    assert CONVOLUTION.weight.requires_grad


def test_what_cannot_be_counted_is_none() -> None:
    class Reads(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * float(images.sum())

    inference = compose_config([]).inference
    assert flops_of_image(Reads(), inference, (64, 64)) is None
    assert flops_of_image(None, inference, (64, 64)) is None
    assert flops_of_image(torch.jit.script(CONVOLUTION), inference, (64, 64)) is None


def test_counting_leaves_no_trace_in_the_network() -> None:
    """Neither in what its forward keeps, nor in the hooks of a tool that watches a training."""

    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 150, 1))
            self.tied = self.net[0].weight
            self.positions: dict[tuple[int, ...], torch.Tensor] = {}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            size = tuple(images.shape[2:])
            if size not in self.positions:
                self.positions[size] = torch.zeros(size, device=images.device)
            return self.net(images + self.positions[size])

    network, seen = Keeps(), []
    network.net[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output.device.type))
    inference = compose_config(["inference=original_size"]).inference
    assert flops_of_image(network, inference, (64, 96), own_hooks=False) == 2 * 64 * 96 * (3 * 8 + 8 * 150)
    assert network.positions == {}
    assert seen == []
    assert network(torch.zeros(1, 3, 64, 96)).device.type == "cpu"
    assert network.tied is network.net[0].weight


def test_a_network_that_needs_its_hooks_is_counted() -> None:
    """Backbones of transformers pass their features by hooks."""

    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Conv2d(3, 150, 1)
            self.kept: list[torch.Tensor] = []
            self.net.register_forward_hook(lambda _module, _inputs, output: kept.append(output))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            self.net(images)
            return kept.pop()

    kept: list[torch.Tensor] = []
    inference = compose_config(["inference=original_size"]).inference
    assert flops_of_image(Hooked(), inference, (64, 96)) == 2 * 64 * 96 * 3 * 150


@pytest.mark.slow
@pytest.mark.parametrize("model", ["segformer_b0", "mask2former_swin_t", "eomt_l"])
def test_systems_are_counted(model: str) -> None:
    cfg = compose_config([f"model={model}", "dataset=demo", "model.weights=random"])
    network = open_network(cfg, ade20k_classes()).network
    assert network is not None
    network.requires_grad_(True)  # as the caller's own may be
    found = flops_of_image(network, cfg.inference, (512, 512))
    assert found is not None
    published = {"segformer_b0": 8.4e9, "mask2former_swin_t": 74e9}  # multiplications with additions, in the papers
    if model in published:
        assert found / 2 == pytest.approx(published[model], rel=0.25)


def test_the_result_says_what_it_costs(call: Callable[..., Done], tmp_path: Path) -> None:
    overrides = (
        "dataset.images=2",
        "tracking=none",
        "runtime.workers=0",
        "metrics.resamples=0",
        "run.overlays=0",
        "run.report=false",
    )
    assert call(*overrides, "metrics.flops=true", "run.dir=run").code == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["parameters"] > 1000
    assert metrics["flops"] > 2 * metrics["parameters"]
    assert len(metrics["flops_image"]) == 2
    assert metrics["gpu_peak_bytes"] is None or torch.cuda.is_available()
    rows = (tmp_path / "run/per_class.csv").read_text().splitlines()
    assert rows[0].startswith("class,name,IoU,accuracy,precision,Dice,")
    assert call(*overrides, "run.dir=other").code == 0
    assert json.loads((tmp_path / "other/metrics.json").read_text())["flops"] is None  # synthetic images


def test_trackers_get_the_size_as_text() -> None:
    """W&B's summary takes no lists of numbers in columns."""
    metrics = {"flops_image": [512, 683], "marks": ["a", "b"], "other_intervals": {}, "model": "x"}
    result = SimpleNamespace(
        metrics=lambda: dict(metrics), origin={"model": "x"}, seconds=1.0, images_per_second=2.0, world_size=1
    )
    summary = summary_of(cast(Any, result), {})
    assert (summary["flops_image"], summary["marks"]) == ("512; 683", "a; b")


def test_dice_is_the_f_score() -> None:
    matrix = np.random.default_rng(0).integers(0, 9, (150, 151))
    matrix[7], matrix[:, 7] = 0, 0
    rows = per_class_rows(matrix, ade20k_classes())
    assert rows[7]["Dice"] is None
    assert rows[7]["precision"] is None
    for c in (0, 3, 149):
        precision, recall = rows[c]["precision"], rows[c]["accuracy"]
        assert rows[c]["Dice"] == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-15)
        assert rows[c]["Dice"] == pytest.approx(2 * rows[c]["IoU"] / (1 + rows[c]["IoU"]), abs=1e-15)
