"""Sliding windows and test-time augmentation beside mmsegmentation's own: `python benchmarks/bench_protocols.py`.

Labels are compared pixel by pixel; for TTA the two softmaxes may round differently in the last bit, so that near-ties
can fall otherwise: their number is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from images import stride4_logits
from measure import add_peaks, interleave, one_thread, show
from ours import CPU, predictor
from peers import TTA_SCALES, TrivialNetwork, have, mmseg_slide, mmseg_tta, mmseg_tta_merge
from torch import nn

from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import select, whole
from ade_harness.models.checkpoint.family import random_network
from ade_harness.models.systems.segformer import SEGFORMER

SIZES = ((512, 683), (256, 256), (512, 768), (300, 400))
"""Four usual originals."""
B0 = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 160, 256],
    "num_attention_heads": [1, 2, 5, 8],
    "decoder_hidden_size": 256,
}


def images() -> list[np.ndarray]:
    """Return synthetic RGB images of `SIZES`."""
    rng = np.random.default_rng(0)
    small = [rng.integers(0, 256, (h // 16, w // 16, 3), dtype=np.uint8) for h, w in SIZES]
    return [cv2.resize(s, (w, h), interpolation=cv2.INTER_CUBIC) for s, (h, w) in zip(small, SIZES, strict=True)]


def normalised(rgb: np.ndarray, made: Any) -> torch.Tensor:
    """Resize as the protocol says, and normalise."""
    prepared = made.prepare("x", rgb)
    return select("auto", "cpu").normalise(prepared.pixels[0], made.statistics)[None]


def slide(network: nn.Module, title: str, rounds: int, forward: bool) -> None:
    """Compare windows of 512 every 341 pixels."""
    made = predictor(network, "auto", "inference=mmseg_slide_512")
    plain = predictor(network, "torch", "inference=mmseg_slide_512")
    theirs = mmseg_slide(network) if have("mmseg") else None
    pictures = images()
    inputs = [normalised(picture, made) for picture in pictures]
    prepared = [made.prepare("x", picture) for picture in pictures]
    peer: dict[str, Callable[[], Any]] = {}
    if theirs is not None:
        peer = {
            "mmseg slide": lambda: [theirs(x, (p.shape[0], p.shape[1])) for x, p in zip(inputs, pictures, strict=True)]
        }
    variants: dict[str, Callable[[], Any]] = {
        **peer,
        "ade-harness, plain torch": lambda: [plain.predict([p], CPU, Stopwatch(CPU))[0].labels for p in prepared],
        "ade-harness": lambda: [made.predict([p], CPU, Stopwatch(CPU))[0].labels for p in prepared],
    }
    with torch.no_grad():
        results = [[labels.long() for labels in call()] for call in variants.values()]
        differ = [sum(int((a != b).sum()) for a, b in zip(results[0], other, strict=True)) for other in results[1:]]
        pixels = sum(labels.numel() for labels in results[0])
        rows = add_peaks(interleave(variants, rounds, len(SIZES)), variants)
    show(f"slide 512/341, {title}, ms per image; pixels differing from the first: {differ} of {pixels}", rows)


def merge(rounds: int, size: tuple[int, int] = (512, 683)) -> None:
    """Compare the merge of 12 views whose stride-4 scores are there."""
    views, scores, sizes, flips = [], [], [], []
    for number, scale in enumerate(TTA_SCALES):
        view_size = (int(size[0] * scale), int(size[1] * scale + 0.5))
        for flipped in (False, True):
            logits = stride4_logits(view_size, "white", seed=2 * number + flipped)
            views.append(whole(logits, view_size, flipped=flipped))
            scores.append(logits)
            sizes.append(view_size)
            flips.append(flipped)
    theirs = mmseg_tta_merge(size) if have("mmseg") else None
    compiled, plain = select("auto", "cpu"), select("torch", "cpu")
    variants: dict[str, Callable[[], Any]] = {
        **({"mmseg SegTTAModel": lambda: theirs(scores, sizes, flips)} if theirs is not None else {}),
        "ade-harness, plain torch": lambda: plain.merge(views, size, True),
        "ade-harness": lambda: compiled.merge(views, size, True),
    }
    expected = next(iter(variants.values()))().long()
    differ = [int((call().long() != expected).sum()) for call in variants.values()][1:]
    rows = add_peaks(interleave(variants, rounds), variants)
    show(f"merge of 12 views to {size}, white noise, ms; pixels differing: {differ} of {expected.numel()}", rows)


def whole_tta(network: nn.Module, rounds: int) -> None:
    """Compare all of it: resize, 12 forwards, merge."""
    made = predictor(network, "auto", "inference=mmseg_whole_512_ms")
    theirs = mmseg_tta(network) if have("mmseg") else None
    picture = images()[0]
    bgr = np.ascontiguousarray(picture[..., ::-1])
    variants: dict[str, Callable[[], Any]] = {
        **({"mmseg TestTimeAug + SegTTAModel": lambda: theirs(bgr)} if theirs is not None else {}),
        "ade-harness": lambda: made.predict([made.prepare("x", picture)], CPU, Stopwatch(CPU))[0].labels,
    }
    with torch.no_grad():
        *_, found = results = [call().long() for call in variants.values()]
        expected = results[0]
        rows = add_peaks(interleave(variants, rounds), variants)
    differ = int((expected != found).sum())
    show(f"6 scales and mirrors, trivial network, ms; pixels differing: {differ} of {found.numel()}", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["slide", "segformer", "merge", "tta"], nargs="*")
    options = parser.parse_args()
    one_thread()
    wanted = options.only or ["slide", "segformer", "merge", "tta"]
    if "slide" in wanted:
        slide(TrivialNetwork().eval(), "free network", options.rounds, False)
    if "segformer" in wanted:
        slide(random_network(SEGFORMER, B0, 0).eval(), "SegFormer-B0", options.rounds, True)
    if "merge" in wanted:
        merge(max(2, options.rounds // 2))
    if "tta" in wanted:
        whole_tta(TrivialNetwork().eval(), max(2, options.rounds // 2))
