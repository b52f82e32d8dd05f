"""The whole loop with a trivial network, beside the loops of other tools: `python benchmarks/bench_loop.py`.

One process, one thread, no loader processes; variants take turns. "Outside the forward" subtracts the network's own
time run by run. mmsegmentation's areas must equal ours in every bit.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from images import make_folder
from measure import add_peaks, interleave, interleave_loops, one_thread, peak_memory, show
from ours import Evaluation, loop, predictor
from peers import LOOPS, TrivialNetwork, have, mmseg_host

from ade_harness.data.ade20k import open_ade20k
from ade_harness.kernels import select


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ade_harness_bench")
    parser.add_argument("--only", choices=["loop", "host"], nargs="*", default=["host", "loop"])
    parser.add_argument("--peers", nargs="*", default=list(LOOPS), choices=list(LOOPS))
    options = parser.parse_args()
    one_thread()
    folder = options.folder / f"images{options.images}"
    make_folder(folder, options.images)
    if "host" in options.only:  # first, in a process whose heap is still tidy
        host(folder, options.rounds, options.images)
    if "loop" in options.only:
        loops_and_memory(folder, options)


def loops_and_memory(folder: Path, options: argparse.Namespace) -> None:
    """Compare whole loops, and show that memory stays flat."""
    network = TrivialNetwork().eval()
    peers = [name for name in options.peers if name != "mmsegmentation" or have("mmseg")]
    protocol = "inference=mmseg_whole_512"
    loops = [LOOPS[name](folder, network) for name in peers]
    loops += [loop(folder, network, kernels, protocol) for kernels in ("torch", "auto")]
    named = {entry.name: entry for entry in loops}
    areas = {name: entry.run() for name, entry in named.items()}
    if "mmsegmentation" in peers:
        for entry in loops[-2:]:
            assert np.array_equal(areas[entry.name], areas[loops[0].name]), f"{entry.name}: other areas than mmseg's"
        print(f"areas of {loops[0].name} and ade-harness (both kernels): equal in every bit")
    whole, outside, forward = interleave_loops(named, options.rounds, options.images)
    runs = {name: entry.run for name, entry in named.items()}
    packages = ("torch", "numpy", "numba", "mmsegmentation", "mmcv-lite", "transformers", "torchmetrics", "pillow")
    show(f"whole loop, {options.images} images, ms per image", add_peaks(whole, runs), "ms", packages)
    show("outside the forward", outside, "ms", packages)
    print("forward, ms per image:", {name: round(value, 2) for name, value in forward.items()})
    memory(folder)


def memory(folder: Path) -> None:
    """Show that memory does not grow with the number of images: the same images once and eight times."""
    dataset = open_ade20k(folder, "validation")
    for times in (1, 8):
        longer = replace(dataset, pairs=list(dataset.pairs) * times)
        evaluation = Evaluation(longer, TrivialNetwork().eval(), "auto", "inference=mmseg_whole_512")
        with torch.no_grad():
            evaluation()
            peak = peak_memory(evaluation)
        print(f"ade-harness, {len(longer.pairs)} images: {peak:.0f} MiB above the start")


def host(folder: Path, rounds: int, images: int) -> None:
    """Compare decoding, resizing and normalising alone."""
    dataset = open_ade20k(folder, "validation")
    variants = {}
    if have("mmseg"):
        _, mmseg_input = mmseg_host(folder)
        variants["mmsegmentation: item, collate, data preprocessor"] = lambda: [mmseg_input(i) for i in range(images)]
    for choice in ("torch", "auto"):
        made = predictor(TrivialNetwork(), choice, "inference=mmseg_whole_512")
        normalise = select(choice, "cpu").normalise
        variants[f"ade-harness: load, prepare, normalise ({choice})"] = lambda made=made, normalise=normalise: [
            normalise(made.prepare("x", dataset.load(i).image).pixels[0], made.statistics) for i in range(images)
        ]
    show("host side, ms per image", interleave(variants, rounds, images))


if __name__ == "__main__":
    main()
