"""Other evaluators of ADE20K, each fed the same images and the same network, and each giving integer areas.

What is measured is everything outside the network's forward. Nothing of these projects' source is copied: their
packages are called where they can be installed, and where not (detectron2 and the metric script of `evaluate`), the
arithmetic is restated here and the name of the peer says so.

A network is any module from a normalised float32 [N, 3, H, W] to scores [N, 150, ceil(H / 4), ceil(W / 4)].
Areas are int64 [3, 150]: intersection, prediction and label, the pixels of label 0 left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

CLASSES = 150
IGNORE = 255
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""Pixel statistics of RGB, 0 to 255."""
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)

Areas = npt.NDArray[np.int64]
Size = tuple[int, int]

_INSTALL = {
    "mmseg": (
        "pip install 'setuptools<81' wheel && pip install --no-build-isolation mmcv-lite==2.1.0 &&"
        " pip install mmengine==0.10.7 mmsegmentation==1.2.2 ftfy regex"
    ),
    "torchmetrics": "pip install torchmetrics",
    "transformers": "pip install 'transformers>=5,<6'",
}
_serial = itertools.count()


class TimedNetwork(nn.Module):
    """A network with a stopwatch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Run the network, and add the time that it takes to `seconds`."""
        _wait(images)
        start = time.perf_counter()
        scores: Tensor = self.network(images)
        _wait(scores)
        self.seconds += time.perf_counter() - start
        return scores


@dataclass
class Loop:
    """One evaluator over one folder; made ready once, run as often as wanted."""

    name: str
    network: TimedNetwork
    body: Callable[[], Areas]

    def run(self) -> Areas:
        """Evaluate every image of the folder."""
        self.network.seconds = 0.0
        with torch.no_grad():
            return self.body()

    @property
    def forward_seconds(self) -> float:
        """Time inside the network during the last run."""
        return self.network.seconds


class TrivialNetwork(nn.Module):
    """The cheapest network with the right shapes: 4x4 means, then a fixed random 1x1 convolution."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.head = nn.Conv2d(3, CLASSES, 1)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(CLASSES, 3, 1, 1, generator=generator))
            self.head.bias.copy_(0.1 * torch.randn(CLASSES, generator=generator))  # type: ignore[union-attr]

    def forward(self, images: Tensor) -> Tensor:
        """Return scores at a quarter of the size, rounded up."""
        scores: Tensor = self.head(F.avg_pool2d(images, 4, ceil_mode=True))
        return scores


def folder_pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return the (image, annotation) paths of ADEChallengeData2016's validation split, in order."""
    images = sorted((folder / "images" / "validation").glob("*.jpg"))
    return [(p, folder / "annotations" / "validation" / f"{p.stem}.png") for p in images]


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def have(package: str) -> bool:
    """Whether a peer is installed; prints what is left out if it is not."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"{package} is not installed and left out: {_INSTALL[package]}")
    return False


def _need(package: str) -> Any:
    """Import a peer's package, or say how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"The benchmark of {package} needs a package that is not there ({error}). Install it with:"
            f" {_INSTALL[package]}"
        ) from error


# ---------------------------------------------------------------------------------------------- mmsegmentation


def _mmseg() -> Any:
    """Import mmsegmentation with its models; `mmcv.ops`, which mmcv-lite has no binaries for, is a placeholder."""
    for name in ("mmcv.ops", "mmcv.ops.multi_scale_deform_attn"):
        if name not in sys.modules and importlib.util.find_spec("mmcv") and not importlib.util.find_spec("mmcv._ext"):
            sys.modules[name] = _Placeholder(name)
    mmseg = _need("mmseg")
    importlib.import_module("mmseg.models")
    importlib.import_module("mmseg.datasets")
    importlib.import_module("mmseg.evaluation")
    importlib.import_module("mmengine.registry").init_default_scope("mmseg")
    return mmseg


class _Placeholder(types.ModuleType):
    """A module in which every name is an empty class: enough for imports of what is not used here."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (nn.Module,), {})
        setattr(self, name, made)
        return made


def _mmseg_pipeline() -> list[dict[str, Any]]:
    return [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (2048, 512), "keep_ratio": True},
        {"type": "LoadAnnotations"},  # label 0 becomes 255: ADE20KDataset says so
        {"type": "PackSegInputs"},
    ]


def _mmseg_dataset_config(folder: Path) -> dict[str, Any]:
    return {
        "type": "ADE20KDataset",
        "data_root": str(folder),
        "data_prefix": {"img_path": "images/validation", "seg_map_path": "annotations/validation"},
        "pipeline": _mmseg_pipeline(),
    }


def _mmseg_preprocessor_config() -> dict[str, Any]:
    return {"type": "SegDataPreProcessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True, "seg_pad_val": IGNORE}


def _mmseg_segmentor(network: nn.Module, **test_cfg: Any) -> Any:
    """Return mmsegmentation's EncoderDecoder around a network: the backbone runs it, the head passes it on."""
    _mmseg()
    from mmengine.config import ConfigDict
    from mmseg.models import EncoderDecoder
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    class Head(BaseDecodeHead):  # type: ignore[misc]
        def forward(self, inputs: Sequence[Tensor]) -> Tensor:
            return inputs[-1]

    class Backbone(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.inner(images)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about losses, which evaluation does not use
        segmentor = EncoderDecoder(
            backbone={"type": Backbone, "inner": network},
            decode_head={
                "type": Head,
                "in_channels": CLASSES,
                "channels": CLASSES,
                "num_classes": CLASSES,
                "align_corners": False,
            },
            test_cfg=ConfigDict(test_cfg or {"mode": "whole"}),
            data_preprocessor=_mmseg_preprocessor_config(),
        )
    return segmentor.eval()


def mmseg_whole(folder: Path, network: nn.Module) -> Loop:
    """Return mmsegmentation's own test loop: Runner, ADE20KDataset, EncoderDecoder in whole mode, IoUMetric.

    The image's short side becomes 512; scores go to that size and then to the original size. One image at a
    time, no loader processes, no hooks. The table that IoUMetric writes at the end is part of the run.

    Args:
        folder: ADEChallengeData2016.
        network: the network.
    """
    _mmseg()
    from mmengine.runner import Runner
    from mmseg.evaluation import IoUMetric

    timed = TimedNetwork(network)
    kept: list[Areas] = []

    class KeepAreas(IoUMetric):  # type: ignore[misc]
        def compute_metrics(self, results: list[Any]) -> dict[str, float]:
            # Each image's areas are whole numbers below 2**24; IoUMetric's float32 sums over all images need not be.
            per_image = [torch.stack([i, p, t]).to(torch.int64) for i, _, p, t in results]
            kept.append(torch.stack(per_image).sum(0).numpy())
            metrics: dict[str, float] = super().compute_metrics(results)
            return metrics

    hooks = ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
    work_dir = tempfile.TemporaryDirectory(prefix="mmseg_peer_")  # the runner's empty log
    runner = Runner(
        model=_mmseg_segmentor(timed),
        work_dir=work_dir.name,
        test_dataloader={
            "batch_size": 1,
            "num_workers": 0,
            "persistent_workers": False,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "dataset": _mmseg_dataset_config(folder),
        },
        test_cfg={"type": "TestLoop"},
        test_evaluator={"type": KeepAreas, "iou_metrics": ["mIoU"], "ignore_index": IGNORE},
        default_hooks=dict.fromkeys(hooks),
        default_scope="mmseg",
        experiment_name=f"peer_{next(_serial)}",
        log_level="ERROR",
    )

    def body(_keep: Any = work_dir) -> Areas:
        kept.clear()
        runner.test()
        return kept[0]

    return Loop("mmsegmentation 1.2.2, whole", timed, body)


def mmseg_host(folder: Path) -> tuple[Callable[[int], Any], Callable[[int], Tensor]]:
    """Return mmsegmentation's work before the forward, alone.

    Args:
        folder: ADEChallengeData2016.

    Returns:
        `item(index)`, which loads, resizes and packs one image and its annotation; and `prepared(index)`, which
        does that, collates a batch of one and normalises it: float32 [1, 3, H, W].
    """
    _mmseg()
    from mmengine.dataset import pseudo_collate
    from mmseg.registry import DATASETS, MODELS

    dataset = DATASETS.build(_mmseg_dataset_config(folder))
    preprocessor = MODELS.build(_mmseg_preprocessor_config())

    def item(index: int) -> Any:
        return dataset[index]

    def prepared(index: int) -> Tensor:
        inputs: Tensor = preprocessor(pseudo_collate([dataset[index]]), False)["inputs"]
        return inputs

    return item, prepared


def mmseg_counts() -> Callable[[Tensor, Tensor], Areas]:
    """Return `counts(labels, target)`: the areas of one image by IoUMetric.intersect_and_union.

    Both are [H, W] and of one integer type that holds 255; the target's 255 is not counted.
    """
    _mmseg()
    from mmseg.evaluation import IoUMetric

    def counts(labels: Tensor, target: Tensor) -> Areas:
        intersect, _, predicted, label = IoUMetric.intersect_and_union(labels, target.to(labels), CLASSES, IGNORE)
        return torch.stack([intersect, predicted, label]).to(torch.int64).numpy()

    return counts


def mmseg_slide(network: nn.Module, crop: int = 512, stride: int = 341) -> Callable[[Tensor, Size], Tensor]:
    """Return `slide(image, original_size)`: mmsegmentation's sliding windows, resize to the original and argmax.

    Args:
        network: the network.
        crop: side of a window.
        stride: step between windows.

    Returns:
        From a normalised float32 [1, 3, H, W] and (height, width) to int64 labels [height, width].
    """
    segmentor = _mmseg_segmentor(network, mode="slide", crop_size=(crop, crop), stride=(stride, stride))
    return _predictor(segmentor)


def mmseg_single(network: nn.Module) -> Callable[[Tensor, Size], Tensor]:
    """Return the same as `mmseg_slide` in whole mode: scores to the input's size, then to the original, argmax."""
    return _predictor(_mmseg_segmentor(network))


def _predictor(segmentor: Any) -> Callable[[Tensor, Size], Tensor]:
    from mmseg.structures import SegDataSample

    @torch.no_grad()
    def predict(image: Tensor, original_size: Size) -> Tensor:
        shape = tuple(image.shape[2:])
        sample = SegDataSample(metainfo={"ori_shape": original_size, "img_shape": shape, "pad_shape": shape})
        labels: Tensor = segmentor.predict(image, [sample])[0].pred_sem_seg.data[0]
        return labels

    return predict


def mmseg_tta(
    network: nn.Module,
    scales: Sequence[float] = TTA_SCALES,
    base: Size | None = (2048, 512),
    **test_cfg: Any,
) -> Callable[[npt.NDArray[np.uint8]], Tensor]:
    """Return `tta(image)`: mmsegmentation's TestTimeAug transform and SegTTAModel, with horizontal flips.

    Args:
        network: the network.
        scales: of the image.
        base: (long, short) side at scale 1, as in version 0.x; None scales the original size, as in version 1.x.
        test_cfg: mode="slide", crop_size=(512, 512), stride=(341, 341) for windows; whole images if left out.

    Returns:
        From a uint8 BGR image [H, W, 3] to int64 labels [H, W].
    """
    segmentor = _mmseg_segmentor(network, **test_cfg)
    from mmengine.dataset import Compose, pseudo_collate
    from mmseg.models import SegTTAModel

    resizes = [
        {"type": "Resize", "scale_factor": s, "keep_ratio": True}
        if base is None
        else {"type": "Resize", "scale": (int(base[0] * s), int(base[1] * s)), "keep_ratio": True}
        for s in scales
    ]
    flips = [{"type": "RandomFlip", "prob": p, "direction": "horizontal"} for p in (0.0, 1.0)]
    pipeline = Compose(
        [
            {"type": "mmseg.LoadImageFromNDArray"},
            {"type": "TestTimeAug", "transforms": [resizes, flips, [{"type": "PackSegInputs"}]]},
        ]
    )
    model = SegTTAModel(module=segmentor)

    @torch.no_grad()
    def tta(image: npt.NDArray[np.uint8]) -> Tensor:
        batch = pseudo_collate([pipeline({"img": image})])
        return _merged(model, batch)

    return tta


def _merged(model: Any, data: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The shape of value will convert")
        labels: Tensor = model.test_step(data)[0].pred_sem_seg.data[0]
    return labels


def mmseg_tta_merge(original_size: Size) -> Callable[[Sequence[Tensor], Sequence[Size], Sequence[bool]], Tensor]:
    """Return `merge(scores, sizes, flipped)`: the second half of `mmseg_tta`, from scores that are there already.

    For each view, mmsegmentation's own code brings the scores to the view's size, mirrors them back and brings them
    to the original size; SegTTAModel keeps all views, sums their softmax and takes the best class.

    Args:
        original_size: (height, width) of the labels.

    Returns:
        From the views' float32 [150, ceil(h / 4), ceil(w / 4)], their input sizes (h, w) and whether each was
        flipped, to int64 labels [height, width].
    """
    segmentor = _mmseg_segmentor(nn.Identity())
    from mmseg.models import SegTTAModel
    from mmseg.structures import SegDataSample

    class Ready(nn.Module):
        """Stands where the segmentor stands, and starts at its head."""

        out_channels = CLASSES

        def test_step(self, data: dict[str, Any]) -> Any:
            sample = data["data_samples"][0]
            head = segmentor.decode_head
            scores = head.predict([data["inputs"][0][None]], [sample.metainfo], segmentor.test_cfg)
            return segmentor.postprocess_result(scores, [sample])

    model = SegTTAModel(module=Ready())

    @torch.no_grad()
    def merge(scores: Sequence[Tensor], sizes: Sequence[Size], flipped: Sequence[bool]) -> Tensor:
        samples = [
            SegDataSample(
                metainfo={
                    "ori_shape": original_size,
                    "img_shape": size,
                    "pad_shape": size,
                    "img_path": None,
                    "flip": flip,
                    "flip_direction": "horizontal" if flip else None,
                }
            )
            for size, flip in zip(sizes, flipped, strict=True)
        ]
        data = {"inputs": [[s] for s in scores], "data_samples": [[s] for s in samples]}
        return _merged(model, data)

    return merge


# ------------------------------------------------------------------------------------------------ transformers


def transformers_segformer(folder: Path, network: nn.Module) -> Loop:
    """Return the way of transformers' documentation: Segformer's image processor, its post-processing, mean_iou.

    The image becomes 512x512 whatever its shape, and scores go to the original size in one step: less work than the
    usual protocol, and other labels. The processor is the Pillow one (the other needs torchvision). mean_iou is a
    script that `evaluate` downloads: its NumPy arithmetic is restated in `histogram_counts`.

    Args:
        folder: ADEChallengeData2016.
        network: the network.
    """
    _need("transformers")
    from transformers import SegformerImageProcessorPil
    from transformers.modeling_outputs import SemanticSegmenterOutput

    timed = TimedNetwork(network)
    processor = SegformerImageProcessorPil()
    pairs = folder_pairs(folder)

    def body() -> Areas:
        areas = np.zeros((3, CLASSES), np.int64)
        for image_path, annotation_path in pairs:
            with Image.open(image_path) as file:
                image = file.convert("RGB")
            with Image.open(annotation_path) as file:
                annotation = np.asarray(file)
            inputs = processor(images=image, return_tensors="pt")
            outputs = SemanticSegmenterOutput(logits=timed(inputs["pixel_values"]))
            labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[annotation.shape])[0]
            areas += histogram_counts(labels.numpy(), annotation)
        return areas

    return Loop("transformers, 512x512 + mean_iou restated", timed, body)


def histogram_counts(labels: npt.NDArray[Any], annotation: npt.NDArray[Any]) -> Areas:
    """Return the areas of one image as evaluate's mean_iou with reduce_labels=True finds them: three histograms.

    Args:
        labels: [H, W], 0 to 149.
        annotation: [H, W], 0 to 150.
    """
    target = np.where(annotation == 0, IGNORE, annotation.astype(np.int64) - 1)
    counted = np.not_equal(target, IGNORE)
    labels, target = labels[counted], target[counted]
    return np.stack(
        [np.histogram(x, CLASSES, (0, CLASSES - 1))[0] for x in (labels[labels == target], labels, target)]
    ).astype(np.int64)


# -------------------------------------------------------------------------------------------------- detectron2


def detectron2_restated(folder: Path, network: nn.Module) -> Loop:
    """Return detectron2's arithmetic, restated: it is not on PyPI.

    Pillow's bilinear resize of the short side to 512, scores x4 to the padded input, cut, resized to the original
    size, argmax, and one bincount of (prediction, label) keys in int64. Its evaluator's boundary IoU and its list
    of encoded masks are left out.

    Args:
        folder: ADEChallengeData2016.
        network: the network.
    """
    timed = TimedNetwork(network)
    pairs = folder_pairs(folder)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))

    def body() -> Areas:
        confusion = np.zeros((CLASSES + 1, CLASSES + 1), np.int64)
        for image_path, annotation_path in pairs:
            with Image.open(image_path) as file:
                pixels = np.asarray(file.convert("RGB"))
            original = pixels.shape[:2]
            height, width = shortest_edge(original, 512, 2048)
            resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
            tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)).astype("float32"))
            scores = F.interpolate(
                timed(((tensor - mean) / std)[None]), scale_factor=4, mode="bilinear", align_corners=False
            )
            scores = F.interpolate(scores[:, :, :height, :width], original, mode="bilinear", align_corners=False)[0]
            labels = np.array(scores.argmax(dim=0), dtype=np.int64)
            with Image.open(annotation_path) as file:
                annotation = np.array(file, dtype=np.int64)
            target = np.where(annotation == 0, CLASSES, annotation - 1)
            confusion += bincount_confusion(labels, target)
        counted = confusion[:-1, :-1]
        return np.stack([np.diagonal(counted), counted.sum(1), counted.sum(0)])

    return Loop("detectron2 restated", timed, body)


def shortest_edge(size: Sequence[int], short: int, longest: int) -> Size:
    """Return the (height, width) with the short side as given and the long side at most `longest`, ratio kept."""
    scale = min(short / min(size), longest / max(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def bincount_confusion(labels: npt.NDArray[np.int64], target: npt.NDArray[np.int64]) -> Areas:
    """Return pixels by (prediction, label), int64 [151, 151]; label 150 is what is not counted."""
    side = CLASSES + 1
    return np.bincount(side * labels.reshape(-1) + target.reshape(-1), minlength=side * side).reshape(side, side)


# ------------------------------------------------------------------------------------------------ torchmetrics


def torchmetrics_plain(folder: Path, network: nn.Module) -> Loop:
    """Return a plain PyTorch loop with torchmetrics' MulticlassJaccardIndex.

    Pillow decodes; PyTorch resizes the short side to 512 (bilinear, antialiased) and normalises; scores go to the
    original size in one step.

    Args:
        folder: ADEChallengeData2016.
        network: the network.
    """
    _need("torchmetrics")
    from torchmetrics.classification import MulticlassJaccardIndex

    timed = TimedNetwork(network)
    pairs = folder_pairs(folder)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    metric = MulticlassJaccardIndex(CLASSES, ignore_index=IGNORE)

    def body() -> Areas:
        metric.reset()
        for image_path, annotation_path in pairs:
            with Image.open(image_path) as file:
                pixels = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)[None]
            original = tuple(pixels.shape[2:])
            resized = F.interpolate(
                pixels.float(), shortest_edge(original, 512, 2048), mode="bilinear", antialias=True, align_corners=False
            )
            scores = timed((resized - mean) / std)
            labels = F.interpolate(scores, original, mode="bilinear", align_corners=False).argmax(1)
            with Image.open(annotation_path) as file:
                target = torch.from_numpy(np.array(file, dtype=np.int64))[None] - 1
            metric.update(labels, target.masked_fill_(target < 0, IGNORE))
        metric.compute()
        confusion = metric.confmat.to(torch.int64)  # a row for each label
        return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)]).numpy()

    return Loop("PyTorch + torchmetrics", timed, body)


def torchmetrics_counts() -> Callable[[Tensor, Tensor], Areas]:
    """Return `counts(labels, target)`: the areas of one image by torchmetrics' MulticlassConfusionMatrix."""
    _need("torchmetrics")
    from torchmetrics.classification import MulticlassConfusionMatrix

    metric = MulticlassConfusionMatrix(CLASSES, ignore_index=IGNORE)

    def counts(labels: Tensor, target: Tensor) -> Areas:
        metric.reset()
        metric.update(labels[None], target[None])
        confusion = metric.confmat.to(torch.int64)
        return torch.stack([confusion.diagonal(), confusion.sum(0), confusion.sum(1)]).numpy()

    return counts


LOOPS: dict[str, Callable[[Path, nn.Module], Loop]] = {
    "mmsegmentation": mmseg_whole,
    "transformers": transformers_segformer,
    "detectron2": detectron2_restated,
    "torchmetrics": torchmetrics_plain,
}
