"""Images per second of the systems at true size, beside a plain transformers loop on the same pixels and weights.

    python benchmarks/bench_systems.py [--systems segformer_b0 beit_l] [--images 1] [--threads 2]

Random weights: speed does not depend on them. The plain loop is what a user of transformers writes: the class's own
forward per window, bilinear enlargement of all 150 planes to the input's and to the original size, argmax. Both loops
take turns, after one unmeasured window.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from images import make_folder
from measure import machine_line
from ours import DEVICE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k import open_ade20k
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.models.checkpoint.family import random_network
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.registry import family_of, systems


def plain_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Run the library's own forward: logits of any size."""
    inner = getattr(network, "network", None)
    return network(images) if inner is None else inner(images).logits


def plain_loop(network: nn.Module, pixels: Tensor, size: tuple[int, int], window: Any) -> Tensor:
    """Return the label map [H, W] by torch alone; pixels [1, 3, h, w] on the device."""
    height, width = pixels.shape[-2:]
    if window is None:
        logits = plain_logits(network, pixels)
        logits = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    else:
        crop, stride = window
        total = torch.zeros(1, 150, height, width, device=pixels.device)
        count = torch.zeros(1, 1, height, width, device=pixels.device)
        for row in range(max(height - crop + stride - 1, 0) // stride + 1):
            for column in range(max(width - crop + stride - 1, 0) // stride + 1):
                bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
                box = (..., slice(max(bottom - crop, 0), bottom), slice(max(right - crop, 0), right))
                part = pixels[box]
                scores = plain_logits(network, part)
                total[box] += F.interpolate(scores, part.shape[-2:], mode="bilinear", align_corners=False)
                count[box] += 1
        logits = total / count
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)[0]


def warm_up(protocol: str) -> None:
    """Compile the kernels, with a network that costs nothing."""
    cfg = compose_config(["model=custom", "model._target_=a.b", f"inference={protocol}"])
    network = nn.Conv2d(3, 150, 16, 16).to(DEVICE)
    model = LoadedModel(network, "random", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), channels=150)
    predictor = NetworkPredictor(model, cfg.inference, cfg.model)
    image = np.zeros((600, 800, 3), np.uint8)
    predictor.predict([predictor.prepare("warm-up", image)], DEVICE, Stopwatch(DEVICE))


def measure(name: str, images: int, protocol: str) -> tuple[str, float, float, float, float]:
    """Return (protocol, millions of parameters, our seconds, plain seconds, share of equal labels) per image."""
    cfg = compose_config([f"model={name}", f"inference={protocol}", "dataset=ade20k", "dataset.root=."])
    architecture = cfg.model.architecture
    network = random_network(family_of(systems()[name]), architecture, 0).eval().to(DEVICE)
    mean, std = tuple(cfg.model.input.mean), tuple(cfg.model.input.std)
    predictor = NetworkPredictor(LoadedModel(network, "random", mean, std, channels=150), cfg.inference, cfg.model)
    folder = Path(tempfile.gettempdir()) / f"ade_harness_bench/images{images}"
    make_folder(folder, images)
    dataset = open_ade20k(folder, "validation")
    window = (cfg.inference.window.crop, cfg.inference.window.stride) if cfg.inference.mode == "slide" else None
    plain_logits(network, torch.zeros(1, 3, *[64 if window is None else window[0]] * 2, device=DEVICE))
    watch = Stopwatch(DEVICE)
    spent, same = [0.0, 0.0], 0.0

    def ours(image_id: str, image: Any) -> Tensor:
        return predictor.predict([predictor.prepare(image_id, image)], DEVICE, watch)[0].labels

    def plain(image_id: str, image: Any) -> Tensor:
        pixels = predictor.prepare(image_id, image).pixels[0].to(DEVICE).float()
        pixels = (pixels - torch.tensor(mean, device=DEVICE)) / torch.tensor(std, device=DEVICE)
        return plain_loop(network, pixels.permute(2, 0, 1)[None], image.shape[:2], window)

    for index in range(images):
        sample, found = dataset.load(index), []
        for turn in (0, 1) if index % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            labels = (ours, plain)[turn](sample.image_id, sample.image).cpu()
            spent[turn] += time.perf_counter() - begin
            found.append(labels.long())
        same += float((found[0] == found[1]).float().mean())
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    return cfg.inference.name, parameters, spent[0] / images, spent[1] / images, same / images


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", choices=sorted(systems()), default=sorted(systems()))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--protocol", default="ss", help="ss, ms, or the name of one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for protocol in ("mmseg_whole_512", "mmseg_slide_512"):
        warm_up(protocol)
    console = Console(width=120)
    table = Table(title=f"one image at a time on {DEVICE}, {options.threads} threads, float32", title_justify="left")
    for column in ("system", "protocol", "M", "s/image", "plain s/image", "plain/ours", "equal labels %"):
        table.add_column(column, justify="left" if column in ("system", "protocol") else "right")
    for name in options.systems:
        protocol, parameters, ours, plain, same = measure(name, options.images, options.protocol)
        row = f"{parameters:.1f}", f"{ours:.2f}", f"{plain:.2f}", f"{plain / ours:.2f}", f"{100 * same:.3f}"
        table.add_row(name, protocol, *row)
        console.print(name, *row)
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"{machine_line()}; peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
