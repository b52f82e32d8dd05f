"""What precision does to labels: `python benchmarks/bench_precision.py model=... dataset=... [more overrides]`.

Runs the same images in each precision and counts the pixels whose label differs from float32's. TF32 is measured on
CUDA alone: CPUs have none, and the option changes nothing there.
"""

from __future__ import annotations

import sys

import torch
from measure import machine_line

from ade_harness.config.compose import compose_config
from ade_harness.data.factory import open_dataset
from ade_harness.inference.factory import open_network
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import select
from ade_harness.metrics.confusion import scores


def main(overrides: list[str]) -> None:
    """Run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = ("fp32", *(["tf32"] if device.type == "cuda" else []), "bf16", "fp16")
    print(machine_line(), torch.cuda.get_device_name() if device.type == "cuda" else "")
    kernels = select("auto", device.type)
    reference: list[torch.Tensor] = []
    for precision in precisions:
        cfg = compose_config([*overrides, f"inference.precision={precision}"])
        dataset = open_dataset(cfg.dataset, cfg.inference.exif)
        predictor = open_network(cfg, dataset.classes)
        predictor.check(dataset.read_headers()[0])
        predictor.network.to(device)
        changed = pixels = 0
        matrix = torch.zeros((len(dataset.classes), len(dataset.classes) + 1), dtype=torch.int64)
        for index, image_id in enumerate(dataset.ids):
            sample = dataset.load(index)
            prepared = predictor.prepare(image_id, sample.image)
            labels = predictor.predict([prepared], device, Stopwatch(device))[0].labels
            matrix += kernels.count(labels, torch.from_numpy(sample.target).to(device), len(dataset.classes)).cpu()
            if precision == "fp32":
                reference.append(labels.cpu())
            changed += int((labels.cpu() != reference[index]).sum())
            pixels += labels.numel()
        found, share = scores(matrix.numpy()), changed / pixels
        print(f"{precision}: {changed:,} of {pixels:,} pixels differ ({share:.3%}); mIoU {100 * found.mIoU:.3f}")


if __name__ == "__main__":
    main(sys.argv[1:])
