"""Each kernel against the naive way and against the bytes it must move: `python benchmarks/bench_kernels.py`.

On a machine with CUDA it measures the GPU kernels, with events, else the CPU's on one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from images import stride4_logits
from measure import add_peaks, interleave, machine_line, one_thread, show
from peers import have, mmseg_counts, torchmetrics_counts
from torch import Tensor

from ade_harness.kernels import Kernels, select, whole

INPUT, ORIGINAL = (512, 683), (375, 500)
"""The median image's input; and the original size of a two-step case."""


LARGEST = (1600, 1600)
"""(height, width) of the largest of the 2,000 validation images."""


def naive(scores: Tensor, *sizes: tuple[int, int]) -> Tensor:
    """Interpolate everything, then argmax."""
    planes = scores[None]
    for size in sizes:
        planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
    return planes.argmax(1)[0]


def cpu(rounds: int, largest: bool = True, size: tuple[int, int] = INPUT) -> None:
    """Label maps, counts and the pair on one thread."""
    one_thread()
    original = (size[0] * ORIGINAL[0] // INPUT[0], size[1] * ORIGINAL[1] // INPUT[1])
    mmseg = mmseg_counts() if have("mmseg") else None
    compiled, plain = select("numba", "cpu"), select("torch", "cpu")
    target = torch.from_numpy(np.random.default_rng(0).integers(0, 150, size).astype(np.uint8))
    for kind in ("confident", "white"):
        scores = stride4_logits(size, kind)
        cases = [("one step", (size,)), ("two steps", (size, original))]
        for title, sizes in cases + (
            [("the largest image", (size, LARGEST))] if kind == "confident" and largest else []
        ):
            views = [whole(scores, sizes[0])]
            expected = naive(scores, *sizes)
            variants: dict[str, Callable[[], Any]] = {
                "F.interpolate, argmax": partial(naive, scores, *sizes),
                "ade-harness, plain torch": partial(plain.merge, views, sizes[-1], False),
                "ade-harness, numba": partial(compiled.merge, views, sizes[-1], False),
            }
            for name, call in variants.items():
                differ = int((call().long() != expected).sum())
                assert differ == 0, f"{name}: {differ} pixels differ from torch's"
            show(
                f"label map, {kind} scores {list(scores.shape)}, {title} to {sizes[-1]}: 0 of {expected.numel()}"
                f" pixels differ; the bytes of input and output: {_megabytes(scores, expected):.1f} MB",
                add_peaks(interleave(variants, rounds), variants),
            )
        variants = {"ade-harness": partial(_counts, compiled, scores, target)}
        if mmseg is not None:
            variants["F.interpolate, argmax, mmseg IoUMetric"] = partial(_naive_counts, mmseg, scores, target)
        show(f"label map and count, {kind}", add_peaks(interleave(variants, rounds), variants))
    labels = naive(stride4_logits(size, "confident"), size)
    small = labels.to(torch.uint8)
    metrics = torchmetrics_counts()
    variants = {
        **({"mmseg IoUMetric": lambda: mmseg(labels, target.long())} if mmseg is not None else {}),
        "torchmetrics": lambda: metrics(labels, target.long()),
        "ade-harness, plain torch": lambda: plain.count(small, target, 150),
        "ade-harness, numba": lambda: compiled.count(small, target, 150),
    }
    show(f"counting {size}", add_peaks(interleave(variants, rounds), variants))


def _counts(kernels: Kernels, scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return kernels.count(kernels.label_map(scores, (target.shape[0], target.shape[1])), target, 150)


def _naive_counts(counts: Callable[[Tensor, Tensor], Any], scores: Tensor, target: Tensor) -> Any:
    return counts(naive(scores, (target.shape[0], target.shape[1])), target.long())


def _megabytes(scores: Tensor, labels: Tensor) -> float:
    return (scores.numel() * 4 + labels.numel()) / 1e6


def gpu(rounds: int, largest: bool = True) -> None:
    """Label maps on CUDA; pixels that differ from torch are counted: there should be none."""
    print(torch.cuda.get_device_name(), machine_line(("torch", "triton")))
    triton: Kernels = select("triton", "cuda")
    plain = select("torch", "cuda")
    for kind in ("confident", "white"):
        for dtype in (torch.float32, torch.bfloat16):
            scores = stride4_logits(INPUT, kind).cuda().to(dtype)
            for sizes in ((INPUT,), (INPUT, ORIGINAL)):
                views = [whole(scores, sizes[0])]
                variants = {
                    "F.interpolate, argmax": partial(naive, scores.float(), *sizes),
                    "class chunks": partial(plain.merge, views, sizes[-1], False),
                    "triton": partial(triton.merge, views, sizes[-1], False),
                }
                expected = plain.merge(views, sizes[-1], False)
                found = triton.merge(views, sizes[-1], False)
                differ = int((found != expected).sum())
                print(f"{kind} {dtype} {sizes}: {differ} of {expected.numel()} pixels differ")
                for name, call in variants.items():
                    micro, peak = _cuda_time(call, rounds)
                    print(f"    {name:24} {micro:9.1f} us   {peak:8.1f} MB live")


def _cuda_time(call: Callable[[], Any], rounds: int) -> tuple[float, float]:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    times = []
    for _ in range(10 * rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return float(np.median(times)), (torch.cuda.max_memory_allocated() - before) / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-largest", action="store_true", help="leave out the largest image: seconds, 2 GB")
    parser.add_argument("--size", type=int, nargs=2, default=INPUT, help="of the input on a CPU (height, width)")
    options = parser.parse_args()
    if torch.cuda.is_available():
        gpu(options.rounds, not options.no_largest)
    else:
        cpu(options.rounds, not options.no_largest, tuple(options.size))
