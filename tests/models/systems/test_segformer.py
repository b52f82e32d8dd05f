"""SegFormer computes what the official code computes, and loads official and hub files strictly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ade_harness.errors import HarnessError
from ade_harness.kernels import select, whole
from ade_harness.models.checkpoint.family import random_network
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.systems.segformer import SEGFORMER
from tests.models.golden_weights import draw, fill

GOLDEN = Path(__file__).parents[2] / "golden"
B0 = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 160, 256],
    "num_attention_heads": [1, 2, 5, 8],
    "decoder_hidden_size": 256,
}


@pytest.fixture(scope="module")
def official() -> dict[str, torch.Tensor]:
    """The official state_dict of the golden file."""
    facts = json.loads((GOLDEN / "segformer_b0.json").read_text())
    return {
        key: fill(facts["seed"], key, shape) if kind == "filled" else torch.zeros(shape, dtype=torch.long)
        for key, (shape, kind) in facts["keys"].items()
    }


def test_equals_the_official_code(official: dict[str, torch.Tensor]) -> None:
    images = torch.from_numpy(draw(0, "input", [1, 3, 160, 224]))
    expected = torch.from_numpy(np.load(GOLDEN / "segformer_b0.npz")["logits_every8"])
    with torch.inference_mode():
        logits = SEGFORMER.load({}, official, Strictness())(images)
    found = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)[..., ::8, ::8]
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 5e-6, error  # reached here: 6.9e-7; float32 sums in another order


@pytest.mark.parametrize("implementation", ["torch", "auto"])
def test_augmented_labels_equal_the_official_code(official: dict[str, torch.Tensor], implementation: str) -> None:
    """The official test-time augmentation over the input, its mirror, and a half-size input."""
    images = torch.from_numpy(draw(0, "input", [1, 3, 160, 224]))
    small = torch.from_numpy(draw(0, "input_small", [1, 3, 80, 112]))
    expected = torch.from_numpy(np.load(GOLDEN / "segformer_b0.npz")["aug_labels"])
    network = SEGFORMER.load({}, official, Strictness())
    with torch.inference_mode():
        views = [
            whole(network(images)[0], (160, 224)),
            whole(network(images.flip(3))[0], (160, 224), flipped=True),
            whole(network(small)[0], (80, 112)),
        ]
        labels = select(implementation, "cpu").merge(views, (317, 451), probabilities=True)
    different = int((labels.long() != expected).sum())
    assert different <= 3  # of 142,967; reached: 0. Logits differ by 6.9e-7, so another machine may flip a near-tie


def test_hub_names_load_the_same(official: dict[str, torch.Tensor], tmp_path: Path) -> None:
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        from_official = SEGFORMER.load({}, official, Strictness())(images)
        from_hub = SEGFORMER.load(B0, SEGFORMER.used(SEGFORMER.hub_names(official)), Strictness())(images)
    assert torch.equal(from_official, from_hub)


def test_missing_unexpected_and_wrong_keys_stop(official: dict[str, torch.Tensor]) -> None:
    lacking = {k: v for k, v in official.items() if k != "decode_head.linear_pred.bias"}
    with pytest.raises(HarnessError, match=r"weights do not fit the model. 1 missing: decode_head.classifier.bias"):
        SEGFORMER.load(B0, lacking, Strictness())
    with pytest.raises(HarnessError, match="1 unexpected: something.else"):
        SEGFORMER.load(B0, official | {"something.else": torch.zeros(1)}, Strictness())
    SEGFORMER.load(B0, official | {"something.else": torch.zeros(1)}, Strictness(allow_unexpected=("something.*",)))
    with pytest.raises(HarnessError, match=r"a classifier of 19 classes \(usual for Cityscapes\), ADE20K has 150"):
        SEGFORMER.load(B0, official | {"decode_head.linear_pred.weight": torch.zeros(19, 256, 1, 1)}, Strictness())
    with pytest.raises(HarnessError, match="of another shape: decode_head.linear_fuse.weight"):
        SEGFORMER.load(B0, official | {"decode_head.linear_fuse.conv.weight": torch.zeros(256, 9, 1, 1)}, Strictness())


def test_random_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = random_network(SEGFORMER, B0, 5).state_dict()
    torch.manual_seed(2)
    again, other = random_network(SEGFORMER, B0, 5).state_dict(), random_network(SEGFORMER, B0, 6).state_dict()
    key = "network.decode_head.classifier.weight"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first[key], other[key])
    assert sum(v.numel() for k, v in first.items() if "running" not in k and "tracked" not in k) == 3_752_694
