"""Train the network of the embedded demo on the generator's other seeds (a few minutes on two cores).

    python scripts/train_demo_network.py

writes src/ade_harness/models/formats/demo_network.safetensors. Everything is seeded; the last line prints the pixel
accuracy on images of a seed that was neither trained on nor is the demo's.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ade_harness.data.ade20k_labels import ADE20K_ENCODING
from ade_harness.data.demo import make_sample
from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.models.formats.demo import WEIGHTS, DemoNetwork, input_statistics

TRAINING_SEEDS = (1, 2, 3, 4)
CHECK_SEED = 9
CROP = 48


def crops(seed: int, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 images [N, 3, 48, 48] and int64 targets [N, 12, 12] at the network's stride."""
    rng = np.random.default_rng(seed)
    pictures, targets = [], []
    for index in range(images):
        image, annotation, grey = make_sample(seed, index)
        if grey:
            image = np.repeat(np.rint(image @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None], 3, -1)
        for _ in range(4):
            top = rng.integers(annotation.shape[0] - CROP + 1)
            left = rng.integers(annotation.shape[1] - CROP + 1)
            window = np.s_[top : top + CROP, left : left + CROP]
            pictures.append(image[window].transpose(2, 0, 1))
            targets.append(ADE20K_ENCODING.targets(annotation, "annotation")[window][1::4, 1::4].astype(np.int64))
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(targets))


def main() -> None:
    """Train, save, and print the accuracy on an unseen seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1500, help="per training seed")
    parser.add_argument("--epochs", type=int, default=14)
    options = parser.parse_args()
    torch.manual_seed(0)
    mean, std = (s[:, None, None] for s in input_statistics())
    parts = [crops(seed, options.images) for seed in TRAINING_SEEDS]
    pictures, targets = torch.cat([p for p, _ in parts]), torch.cat([t for _, t in parts])
    network = DemoNetwork()
    loss_of = nn.CrossEntropyLoss(ignore_index=IGNORE_INDEX)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3, weight_decay=1e-4)
    batch = 64
    steps = options.epochs * (len(pictures) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for epoch in range(options.epochs):
        order = torch.randperm(len(pictures))[: len(pictures) // batch * batch].reshape(-1, batch)
        for rows in order:
            loss = loss_of(network((pictures[rows] - mean) / std), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {options.epochs}: loss {loss.item():.3f}", flush=True)
    save_file(network.state_dict(), Path(__file__).parents[1] / "src/ade_harness/models" / WEIGHTS)
    pictures, targets = crops(CHECK_SEED, 150)
    with torch.no_grad():
        labels = network.eval()((pictures - mean) / std).argmax(1)
    valid = targets != IGNORE_INDEX
    print(f"pixel accuracy on seed {CHECK_SEED}: {(labels == targets)[valid].float().mean():.3f}")


if __name__ == "__main__":
    main()
