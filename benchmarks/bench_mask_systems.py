"""Seconds per image of the mask-classification systems at true size, beside a plain loop with the same weights.

    python benchmarks/bench_mask_systems.py [--systems mask2former_swin_t eomt_l] [--images 1] [--threads 2]

Where transformers has the network, its own class is the peer. Where nobody has (InternImage, ViT-Adapter), the peer is
our network in the official code's own PyTorch operations and order (``reference_operations``; the same bits as the
official code, see tests/models/systems/test_mask_systems.py). What follows the network is, for the peer, what official
codes do: masks enlarged, sigmoid, sum over queries, all 150 planes enlarged, argmax. Random weights, on which speed
does not depend. The two take turns, after one unmeasured window.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_systems import warm_up
from images import make_folder
from measure import machine_line
from ours import DEVICE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k import open_ade20k
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.plan import plan_views
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.models.checkpoint.family import random_network
from ade_harness.models.checkpoint.parts import read_part
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.ops.attention import reference_operations
from ade_harness.models.registry import family_of, systems

Queries = Callable[[Tensor], tuple[Tensor, Tensor]]
MASK_SYSTEMS = [name for name, kind in systems().items() if family_of(kind).void]


def swin(fields: dict[str, Any]) -> Any:
    """Return transformers' configuration of the backbone."""
    import transformers as tf

    names = ("embed_dim", "depths", "num_heads", "window_size")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return tf.SwinConfig(out_features=stages, **{name: fields[name] for name in names})


def of_transformers(kind: str, fields: dict[str, Any]) -> nn.Module | None:
    """Return transformers' own class at this size, or None if it has none."""
    import transformers as tf

    if kind in ("mask2former_swin", "mask2former_resnet"):
        backbone = swin(fields) if kind.endswith("swin") else tf.ResNetConfig(
            depths=fields["depths"], hidden_sizes=fields["hidden_sizes"], layer_type="bottleneck",
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )  # fmt: skip
        config = tf.Mask2FormerConfig(backbone_config=backbone, num_labels=150, num_queries=fields["queries"])
        return tf.Mask2FormerForUniversalSegmentation(config)
    if kind == "maskformer" and not fields.get("fapn"):
        return tf.MaskFormerForInstanceSegmentation(tf.MaskFormerConfig(backbone_config=swin(fields), num_labels=150))
    if kind == "oneformer":
        config = tf.OneFormerConfig(
            backbone_config=swin(fields), num_labels=150, num_queries=fields["queries"], is_training=False
        )
        return tf.OneFormerForUniversalSegmentation(config)
    if kind == "eomt":
        return tf.EomtForUniversalSegmentation(tf.EomtConfig(num_labels=150, **fields))
    if kind == "eomt_dinov3":
        config = tf.EomtDinov3Config(num_labels=150, layer_norm_eps=1e-5, **fields)
        return tf.EomtDinov3ForUniversalSegmentation(config)
    return None


def pair(name: str, kind: str, fields: dict[str, Any]) -> tuple[nn.Module, Queries, str]:
    """Return our network, the peer with the same weights, and what the peer is."""
    torch.manual_seed(0)
    library = of_transformers(kind, fields)
    if library is None:
        network = random_network(family_of(kind), fields, 0).eval().to(DEVICE)

        def reference(images: Tensor) -> tuple[Tensor, Tensor]:
            with reference_operations():
                return network(images)

        return network, reference, "official order"
    if hasattr(library, "attn_mask_probs"):
        library.attn_mask_probs.zero_()
    with tempfile.TemporaryDirectory() as folder:
        library.save_pretrained(folder)
        state = dict(read_part(Path(folder) / "model.safetensors").state)
        network = family_of(kind).load(fields, state, Strictness()).eval().to(DEVICE)
    library = library.eval().to(DEVICE)
    extra = {}
    if kind == "oneformer":
        task = [49406, 518, 10549, 533, 29119, 1550, 49407, *[0] * 70]
        extra["task_inputs"] = torch.tensor([task], dtype=torch.float32, device=DEVICE)

    def queries(images: Tensor) -> tuple[Tensor, Tensor]:
        output = library(pixel_values=images, **extra)
        return output.class_queries_logits, output.masks_queries_logits

    return network, queries, "transformers"


def plain_scores(queries: Queries, images: Tensor, resolution: str, crop: tuple[int, int], size: Any) -> Tensor:
    """Return scores of one window: at its size, or at the original size (OneFormer)."""
    classes, masks = queries(images)
    weights = classes.softmax(-1)[..., :-1]
    if resolution == "scores":
        scores = torch.einsum("nqc,nqhw->nchw", weights, masks.sigmoid())
        return F.interpolate(scores, images.shape[-2:], mode="bilinear", align_corners=False)
    masks = F.interpolate(masks, images.shape[-2:], mode="bilinear", align_corners=False)
    if resolution == "original":
        masks = F.interpolate(masks[..., : crop[0], : crop[1]], size, mode="bilinear", align_corners=False)
    return torch.einsum("nqc,nqhw->nchw", weights, masks.sigmoid())


def measure(name: str, images: int) -> tuple[Any, ...]:
    """Return a row of the table."""
    cfg = compose_config([f"model={name}", "inference=ss", "dataset=ade20k", "dataset.root=."])
    fields = family_of(cfg.model.kind).flat(cfg.model.architecture)
    network, queries, peer = pair(name, cfg.model.kind, fields)
    mean, std = tuple(cfg.model.input.mean), tuple(cfg.model.input.std)
    predictor = NetworkPredictor(LoadedModel(network, "random", mean, std, channels=150), cfg.inference, cfg.model)
    folder = Path(tempfile.gettempdir()) / f"ade_harness_bench/images{images}"
    make_folder(folder, images)
    dataset = open_ade20k(folder, "validation")
    side = cfg.inference.window.crop if cfg.inference.mode != "whole" else 64
    for run in (network, queries):  # the first run reads the weights from the file, and compiles
        run(torch.zeros(1, 3, side, side, device=DEVICE))
    watch = Stopwatch(DEVICE)
    spent, same = [0.0, 0.0], 0.0

    def ours(image_id: str, image: Any) -> Tensor:
        return predictor.predict([predictor.prepare(image_id, image)], DEVICE, watch)[0].labels

    def plain(image_id: str, image: Any) -> Tensor:
        pixels = predictor.prepare(image_id, image).pixels[0].to(DEVICE).float()
        pixels = ((pixels - torch.tensor(mean, device=DEVICE)) / torch.tensor(std, device=DEVICE)).permute(2, 0, 1)[
            None
        ]
        plan = plan_views(image.shape[:2], predictor.cfg)[0]
        (rows, columns), (height, width) = plan.canvas, plan.window
        padded = F.pad(pixels, (0, columns - pixels.shape[3], 0, rows - pixels.shape[2]))
        total, count = torch.zeros(()), torch.zeros(())
        if len(plan.origins) == 1:
            total = plain_scores(queries, padded, cfg.inference.masks.resolution, plan.size, image.shape[:2])
        else:
            total = torch.zeros(1, 150, rows, columns, device=DEVICE)
            count = torch.zeros(1, 1, rows, columns, device=DEVICE)
            for y, x in plan.origins:
                box = (..., slice(y, y + height), slice(x, x + width))
                total[box] += plain_scores(queries, padded[box], cfg.inference.masks.resolution, plan.size, None)
                count[box] += 1
            total = total / count
        if cfg.inference.masks.resolution != "original":
            total = total[..., : plan.size[0], : plan.size[1]]
            total = F.interpolate(total, image.shape[:2], mode="bilinear", align_corners=False)
        return total.argmax(1)[0]

    for index in range(images):
        sample, found = dataset.load(index), []
        for turn in (0, 1) if index % 2 == 0 else (1, 0):
            begin = time.perf_counter()
            labels = (ours, plain)[turn](sample.image_id, sample.image).cpu()
            spent[turn] += time.perf_counter() - begin
            found.append(labels.long())
        same += float((found[0] == found[1]).float().mean())
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    return cfg.inference.name, parameters, spent[0] / images, spent[1] / images, same / images, peer


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="*", choices=sorted(MASK_SYSTEMS), default=sorted(MASK_SYSTEMS))
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for protocol in ("mmseg_whole_512", "mmseg_slide_512"):
        warm_up(protocol)
    console = Console(width=130)
    table = Table(title=f"one image at a time on {DEVICE}, {options.threads} threads, float32", title_justify="left")
    for column in ("system", "protocol", "M", "s/image", "peer s/image", "peer/ours", "equal labels %", "peer"):
        table.add_column(column, justify="left" if column in ("system", "protocol", "peer") else "right")
    for name in options.systems:
        protocol, parameters, ours, plain, same, peer = measure(name, options.images)
        row = f"{parameters:.1f}", f"{ours:.2f}", f"{plain:.2f}", f"{plain / ours:.2f}", f"{100 * same:.3f}", peer
        table.add_row(name, protocol, *row)
        console.print(name, *row)
    console.print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(f"{machine_line()}; peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
