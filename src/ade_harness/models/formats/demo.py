"""The small network of the embedded demo; `scripts/train_demo_network.py` trains it."""

from __future__ import annotations

from importlib.resources import as_file, files

from safetensors.torch import load_file
from torch import Tensor, nn

from ade_harness.config.model import ModelConfig
from ade_harness.data.ade20k_labels import NUM_CLASSES
from ade_harness.data.labels import Classes
from ade_harness.models.loaded import LoadedModel, statistics

WEIGHTS = "demo_network.safetensors"


class DemoNetwork(nn.Module):
    """Five convolutions and a classifier at stride 4; 70,870 parameters.

    Args:
        width: channels of the body.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=width),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
        )
        self.classifier = nn.Conv2d(width, NUM_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images float32 [N, 3, H, W] to logits [N, 150, ceil(H/4), ceil(W/4)]."""
        scores: Tensor = self.classifier(self.body(images))
        return scores


def load_demo_network() -> DemoNetwork:
    """Return the network with the packaged weights."""
    network = DemoNetwork()
    with as_file(files("ade_harness.models.formats").joinpath(WEIGHTS)) as path:
        network.load_state_dict(load_file(path))
    return network.eval()


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load the packaged network."""
    facts = {"origin": "packaged demo network"}
    return LoadedModel(load_demo_network(), "demo", **statistics(cfg), channels=NUM_CLASSES, facts=facts)
