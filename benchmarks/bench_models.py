"""Images per second of whole evaluations, and where the time goes: `python benchmarks/bench_models.py`.

Random weights: speed does not depend on them. On a machine with CUDA the networks run there, else on one CPU thread.
The loaders' work happens in this process, so "wait" is the whole host side of an image.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from images import make_folder
from measure import machine_line, one_thread, peak_memory
from ours import DEVICE, Evaluation
from rich.console import Console
from rich.table import Table

from ade_harness.data.ade20k import open_ade20k
from ade_harness.models.checkpoint.family import random_network
from ade_harness.models.systems.segformer import SEGFORMER

B0 = {
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [32, 64, 160, 256],
    "num_attention_heads": [1, 2, 5, 8],
    "decoder_hidden_size": 256,
}
B5 = {
    "depths": [3, 6, 40, 3],
    "hidden_sizes": [64, 128, 320, 512],
    "num_attention_heads": [1, 2, 5, 8],
    "decoder_hidden_size": 768,
}
PROTOCOLS = ("mmseg_whole_512", "mmseg_slide_512", "mmseg_whole_512_ms")
STAGES = ("forward", "wait", "copy", "labels", "counts", "ledger")


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16, help="of whole and slide; a quarter of it for multi-scale")
    parser.add_argument("--models", nargs="*", choices=["b0", "b5"], default=["b0", "b5"])
    parser.add_argument("--protocols", nargs="*", default=list(PROTOCOLS))
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ade_harness_bench")
    options = parser.parse_args()
    one_thread()
    table = Table(title=f"whole evaluations on {DEVICE}, {options.precision}", title_justify="left")
    for column in ("model", "protocol", "images", "images/s", *(f"{s} %" for s in STAGES), "peak MiB"):
        table.add_column(column, justify="right" if column not in ("model", "protocol") else "left")
    for name in options.models:
        network = random_network(SEGFORMER, B0 if name == "b0" else B5, 0).eval().to(DEVICE)
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        for protocol in options.protocols:
            images = max(2, options.images // (4 if protocol.endswith("_ms") else 1) // (4 if name == "b5" else 1))
            folder = options.folder / f"images{images}"
            make_folder(folder, images)
            dataset = open_ade20k(folder, "validation")
            overrides = [f"inference={protocol}", f"inference.precision={options.precision}"]
            evaluation = Evaluation(dataset, network, "auto", *overrides, device=DEVICE)
            evaluation.made.forward.model.module(torch.zeros(1, 3, 64, 64, device=DEVICE))
            start = time.perf_counter()
            peak = peak_memory(evaluation)
            seconds = time.perf_counter() - start
            total = sum(spent for stage, spent in evaluation.stages.items() if stage != "decode")
            shares = [f"{100 * evaluation.stages.get(stage, 0) / total:.1f}" for stage in STAGES]
            label = f"SegFormer-{name.upper()} ({parameters:.1f} M)"
            table.add_row(label, protocol, str(images), f"{images / seconds:.3g}", *shares, f"{peak:.0f}")
    console = Console(width=140)
    console.print(table)
    console.print(machine_line())


if __name__ == "__main__":
    with torch.inference_mode():
        main()
