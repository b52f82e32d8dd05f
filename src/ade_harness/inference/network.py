"""A network by its protocol: resizing, windows and views, forward, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ade_harness import kernels
from ade_harness.config.inference import (
    Average,
    FirstStep,
    InferenceConfig,
    LabelSize,
    MaskResolution,
    Mode,
    ResizeRule,
    Upsample,
)
from ade_harness.config.model import ChannelOrder, ModelConfig
from ade_harness.config.saved import AS_SAVED
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError, ShortMemoryError, require
from ade_harness.inference.fitting import check_one_size, check_plan, fitted, require_backend
from ade_harness.inference.forward import BatchedForward
from ade_harness.inference.masks import held_together, mask_view
from ade_harness.inference.plan import ViewPlan, forward_pixels, plan_views
from ade_harness.inference.predictor import Prediction, Prepared
from ade_harness.inference.resize import resize_image, resize_labels
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import Kernels, PixelStatistics, Placement, Size, View, whole
from ade_harness.kernels import reference as torch_kernels
from ade_harness.models.class_map import ClassMap, resolve_class_map
from ade_harness.models.loaded import LoadedModel
from ade_harness.models.ops.deformable import FALLBACKS
from ade_harness.models.outputs import MaskLogits
from ade_harness.runtime.gpu_errors import is_out_of_memory
from ade_harness.runtime.queue import Loaders

_LABEL_COST = 0.3
"""Cost of a pixel of the original image, relative to one that goes through the network; see docs/performance.md."""


class NetworkPredictor:
    """Runs a network by a protocol.

    Args:
        model: the network.
        inference: ``inference`` node of the configuration.
        model_cfg: ``model`` node.
        kernels_choice: ``runtime.kernels``.
        confident: also give the confidence of each pixel; that needs all scores at the original size.
        classes: that are predicted; None are ADE20K's.
    """

    def __init__(
        self,
        model: LoadedModel,
        inference: InferenceConfig,
        model_cfg: ModelConfig,
        kernels_choice: str = "auto",
        confident: bool = False,
        classes: Classes | None = None,
    ) -> None:
        self.model = model
        self.confident = confident
        self.classes = classes or ade20k_classes()
        self.cfg = fitted(inference, model.fixed_size)
        self.class_map_cfg: list[int | None] | None = None if model_cfg.class_map is None else list(model_cfg.class_map)
        pixels = model_cfg.input
        bgr = pixels.channel_order == ChannelOrder.bgr if model.bgr is None else model.bgr
        self.statistics = PixelStatistics(model.mean, model.std, bgr, pixels.max_value)
        self.stride: int = pixels.stride
        named = self.class_map_cfg or model.class_names or self.classes.names
        if self.cfg.compile:
            require_backend(self.cfg.compile)
        self.forward = BatchedForward(model, self.cfg, len(named))
        self._kernels_choice = kernels_choice
        self._kernels: Kernels | None = None
        self._class_map: ClassMap | None = None
        self._frugal = False
        """Set once the label step has run out of memory: from then on full-size masks are merged one window or view at
        a time, bit-identically."""
        if model.channels is not None:
            self._class_map = self._resolved(model.channels)

    def _resolved(self, channels: int) -> ClassMap:
        try:
            return resolve_class_map(channels, self.class_map_cfg, self.model.class_names, self.classes)
        except HarnessError as error:  # what was noted of the model may be the reason: another output was meant
            raise HarnessError(" ".join([str(error), *(f"Note: {note}." for note in self.model.notes)])) from error

    @property
    def network(self) -> nn.Module:
        """The model's network."""
        return self.model.module

    def facts(self) -> dict[str, Any]:
        """Return where the weights come from."""
        return {"weights": self.model.weights, **self.model.facts}

    def loaders(self, workers: int | None, rank: int, world_size: int) -> Loaders:
        """Return as many as ``runtime.workers`` says."""
        return Loaders(workers)

    def stop(self) -> None:
        """Nothing is waited for."""

    def check(self, sizes: Mapping[str, Size]) -> None:
        """Refuse a protocol that the model cannot take, or that an image does not fit; see :class:`Predictor`."""
        checked: set[Size] = set()
        inputs: dict[Size, str] = {}
        most = 1
        for image_id, size in sizes.items():
            if size not in checked:
                checked.add(size)
                windows: Counter[Size] = Counter()
                for plan in plan_views(size, self.cfg):
                    check_plan(image_id, plan, self.cfg, self.model, self.stride)
                    inputs.setdefault(plan.window, image_id)
                    windows[plan.window] += len(plan.origins)
                most = max(most, *windows.values())
        self.forward.needed = most * self.cfg.images
        if self.cfg.compile:
            check_one_size(self.cfg.compile, inputs)
        require(
            self.cfg.compile != "cudagraphs"
            or not any(getattr(module, "aggregates", False) for module in self.network.modules()),
            "inference.compile=cudagraphs: has no effect on networks with deformable attention, of which torch makes no"
            " graph (they hold a constant of the CPU). Leave it out.",
        )

    def prepared_bytes(self, size: Size) -> int:
        """Return the bytes of all scales, three a pixel."""
        scales = {plan.sizes for plan in plan_views(size, self.cfg)}
        return 3 * sum(height * width for height, width in (chain[-1] if chain else size for chain in scales))

    def cost(self, size: Size) -> float:
        """Return the pixels that go through the network, and a share of those that are labelled."""
        return forward_pixels(plan_views(size, self.cfg)) + _LABEL_COST * size[0] * size[1]

    def group_key(self, size: Size) -> Hashable:
        """Images whose inputs have the same sizes may share a batch, if the protocol says so: windows mostly have."""
        if self.cfg.images == 1:
            return None
        plans = plan_views(size, self.cfg)
        if self.cfg.mode != Mode.whole:
            return tuple(plan.window for plan in plans)
        return tuple((plan.sizes[-1], plan.canvas) for plan in plans)

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize uint8 [H, W, 3] RGB to each scale of the protocol, in uint8 as the official loaders do."""
        rule = self.cfg.resize
        original = (image.shape[0], image.shape[1])
        made: dict[tuple[Size, ...], npt.NDArray[np.uint8]] = {(): image}
        plans = plan_views(original, self.cfg)
        for plan in plans:
            for step in range(1, len(plan.sizes) + 1):
                chain = plan.sizes[:step]
                if chain not in made:
                    made[chain] = resize_image(made[chain[:-1]], chain[-1], rule.backend, rule.antialias)
        # Pillow's arrays are read-only, and sharing the image itself would keep it writable elsewhere
        pixels = {p.sizes: made[p.sizes] if made[p.sizes].flags.owndata else np.array(made[p.sizes]) for p in plans}
        return Prepared(image_id, tuple(torch.from_numpy(p) for p in pixels.values()), original)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the kernels, which are a module: another process chooses its own."""
        return {**self.__dict__, "_kernels": None}

    def predict(self, batch: Sequence[Prepared], device: torch.device, watch: Stopwatch) -> list[Prediction]:
        """Run the network and return labels of the original size; see :class:`Predictor`."""
        if self._kernels is None:
            self._kernels = kernels.select(self._kernels_choice, device.type)
        plans = [plan_views(prepared.original_size, self.cfg) for prepared in batch]
        outputs = self._outputs(batch, plans, device, watch)
        predictions = []
        for prepared, views, output in zip(batch, plans, outputs, strict=True):
            with watch("labels"):
                predictions.append(self._prediction(prepared, views, output))
        return predictions

    def _prediction(
        self, prepared: Prepared, plans: Sequence[ViewPlan], outputs: list[list[Tensor | MaskLogits]]
    ) -> Prediction:
        """Label one image; once more with an emptied cache if memory is short, holding one window's or view's masks.

        In no smaller pieces: the kernels hold nothing of [C, H, W] of a dense system. What does is the product of a
        mask system's queries (with their masks, [Q, H, W]), which cuBLAS may sum in another order in pieces; the
        confidence of each pixel, and plain torch's average of probabilities, need all classes at a pixel.
        """
        invalid_share = self._check_scores(prepared.image_id, [o for window in outputs for o in window])
        for again in (True, False):
            try:
                labels = self._labels(plans, outputs, prepared.original_size, frugal=self._frugal)
                confidence = None
                if self.confident:
                    confidence = self._confidence(plans, outputs, prepared.original_size, frugal=self._frugal)
                return Prediction(labels, invalid_share, confidence)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # outside of the except block, where the traceback would keep tensors
            self._frugal = True
            if again and torch.cuda.is_available():
                torch.cuda.empty_cache()
        height, width = prepared.original_size
        less = []
        if self.confident:
            less.append("metrics.calibration=false")
        if isinstance(outputs[0][0], MaskLogits):
            less.append("runtime.accelerator=cpu (a mask system holds all classes and queries at full size)")
        elif self.cfg.tta.average == Average.probabilities and len(plans) > 1:
            less.append("a protocol that averages scores")
        raise ShortMemoryError(
            f"{prepared.image_id}: out of memory while labelling {width}x{height} ({reason})."
            f" Use {', or '.join(['a device with more memory', *less])}."
        )

    def views(self, prepared: Prepared, device: torch.device) -> tuple[list[View], ClassMap, Tensor]:
        """Run the network on one image.

        Returns:
            The scores of its views, in the order of summation; the class of each of their channels; the share of NaN
            and +inf.
        """
        if self._kernels is None:
            self._kernels = kernels.select(self._kernels_choice, device.type)
        plans = plan_views(prepared.original_size, self.cfg)
        [outputs] = self._outputs([prepared], [plans], device, Stopwatch(device))
        invalid_share = self._check_scores(prepared.image_id, [o for window in outputs for o in window])
        assert self._class_map is not None
        size = prepared.original_size
        views = [self._view(plan, output, size) for plan, output in zip(plans, outputs, strict=True)]
        return views, self._class_map, invalid_share

    def source_hash(self, image_id: str) -> str:
        """Nothing is read: the weights are recorded for the whole run."""
        return ""

    def changes(self) -> list[str]:
        """The weights are in memory."""
        return []

    def notes(self) -> list[str]:
        """Return the class map's remarks, and what the run had to do otherwise than asked."""
        notes = list(self.model.notes)
        if self.model.facts.get("part"):
            notes.append(f"of {self.model.facts['origin']}: {self.model.facts['part']}")
        if self.model.facts.get("backbone_part"):
            notes.append(f"of {self.model.facts['backbone_origin']}: {self.model.facts['backbone_part']}")
        notes += [self._class_map.note] if self._class_map is not None and self._class_map.note else []
        if self.cfg.resize.rule == ResizeRule.fit:
            size = "images as they are" if self.cfg.resize.height is None else "images fitted into the model's input"
            notes.append(
                f"inference={self.cfg.name} is not a published protocol ({size}, pixels normalised with mean"
                f" {_written(self.model.mean)} and std {_written(self.model.std)}): choose the model's own"
            )
        if self.model.resample is not None and self.cfg.name.startswith(f"{AS_SAVED}_"):
            notes.append(
                f"the model's image processor resizes with Pillow's {self.model.resample} filter, {self.cfg.name}"
                " bilinearly: the score may differ by it"
            )
        staying = _in_training_mode(self.network)
        if staying:
            notes.append(
                f"{len(staying)} modules of the network stay in training mode though it was put into evaluation mode"
                f" (such as {staying[0]}): dropout and statistics of batches change labels"
            )
        notes += [
            f"deformable attention: plain torch is used, which is slower: {reason}" for reason in FALLBACKS.values()
        ]
        if self.forward.passed_over:
            notes.append(
                f"the model returns {self.forward.passed_over + 1} scores of as many classes, of which the first is"
                " evaluated: if that is an auxiliary head, return the main one alone"
            )
        if self.forward.halved:
            notes.append(
                f"memory was short {self.forward.halved} times: the image was redone in smaller batches, whose float"
                f" sums may differ in the last bit; inference.batch={self.forward.fits} avoids it"
            )
        return notes

    def _outputs(
        self, batch: Sequence[Prepared], plans: Sequence[list[ViewPlan]], device: torch.device, watch: Stopwatch
    ) -> list[list[list[Tensor | MaskLogits]]]:
        """Run all windows of all views of all images, those of one size together.

        Returns:
            For each image, for each view, for each window the network's output.
        """
        windows: dict[Size, list[tuple[int, int, Tensor]]] = {}
        for image, (prepared, views) in enumerate(zip(batch, plans, strict=True)):
            distinct = list(dict.fromkeys(plan.sizes for plan in views))
            copied: dict[int, Tensor] = {}  # of each scale, which views and their mirrored ones share
            for view, plan in enumerate(views):
                with watch("copy"):
                    scale = distinct.index(plan.sizes)
                    if scale not in copied:
                        copied[scale] = prepared.pixels[scale].to(device, non_blocking=True)
                    canvas = self._canvas(copied[scale], plan)
                for top, left in plan.origins:
                    part = canvas[:, top : top + plan.window[0], left : left + plan.window[1]]
                    windows.setdefault(plan.window, []).append((image, view, part))
        outputs: list[list[list[Tensor | MaskLogits]]] = [[[] for _ in views] for views in plans]
        names = ", ".join(p.image_id for p in batch)
        for group in windows.values():
            with watch("forward"):
                results = self.forward([part for _, _, part in group], names)
            for (image, view, _), result in zip(group, results, strict=True):
                outputs[image][view].append(result)
        return outputs

    def _canvas(self, pixels: Tensor, plan: ViewPlan) -> Tensor:
        """Mirror, normalise, and pad: float32 [3, h, w]."""
        assert self._kernels is not None
        placement = Placement(plan.canvas, plan.offset, plan.flipped, self.cfg.resize.pad_value)
        return self._kernels.normalise(pixels, self.statistics, placement)

    def _check_scores(self, image_id: str, outputs: Sequence[Tensor | MaskLogits]) -> Tensor:
        """Find out what the channels mean, once; return the share of NaN and +inf."""
        first = outputs[0]
        channels = first.classes.shape[-1] - 1 if isinstance(first, MaskLogits) else first.shape[1]
        if self._class_map is None:
            self._class_map = self._resolved(channels)
        if self.model.channels not in (None, channels):
            raise HarnessError(
                f"{image_id}: the model outputs {channels} channels, {self.model.channels} were expected."
            )
        assert self._kernels is not None
        tensors = [t for o in outputs for t in ((o.classes, o.masks) if isinstance(o, MaskLogits) else (o,))]
        return self._kernels.invalid_share(tensors)

    def _labels(
        self,
        plans: Sequence[ViewPlan],
        outputs: list[list[Tensor | MaskLogits]],
        original: Size,
        frugal: bool = False,
    ) -> Tensor:
        """Merge, upsample and argmax, in the protocol's order of steps; `frugal` as for masks, same bits."""
        assert self._class_map is not None
        assert self._kernels is not None
        probabilities = self.cfg.tta.average == Average.probabilities
        if self.cfg.output.labels == LabelSize.input:
            view = self._view(plans[0], outputs[0], original, frugal)
            top, left, height, width = view.area
            labels = self._kernels.merge([replace(view, valid=None)], view.canvas, False)
            labels = labels[top : top + height, left : left + width]
            return self._class_map.classes_of(resize_labels(labels, original))
        first = outputs[0][0]
        one_by_one = False
        if isinstance(first, MaskLogits) and len(plans) > 1 and self.cfg.masks.resolution != MaskResolution.scores:
            channels, device = first.classes.shape[-1] - 1, first.masks.device
            one_by_one = frugal or not held_together(plans, channels, self.cfg.masks, original, device)
        if one_by_one:
            # the queries are the smallest form; their full-size scores are added up one view at a time
            total: Tensor | None = None
            for plan, output in zip(plans, outputs, strict=True):
                view = self._view(plan, output, original, frugal)
                if total is None:
                    total = torch.zeros((view.scores.shape[1], *original), device=view.scores.device)
                torch_kernels.accumulate(total, view, probabilities)
            assert total is not None
            return self._class_map.classes_of(self._kernels.label_map(total.div_(len(plans)), original))
        views = [self._view(plan, output, original, frugal) for plan, output in zip(plans, outputs, strict=True)]
        return self._class_map.classes_of(self._kernels.merge(views, original, probabilities))

    def _confidence(
        self,
        plans: Sequence[ViewPlan],
        outputs: list[list[Tensor | MaskLogits]],
        original: Size,
        frugal: bool = False,
    ) -> Tensor:
        """Return the largest class probability of each pixel, float32 [H, W]."""
        views = [self._view(plan, output, original, frugal) for plan, output in zip(plans, outputs, strict=True)]
        at_input = self.cfg.output.labels == LabelSize.input
        top, left, height, width = views[0].area
        size = views[0].canvas if at_input else original
        if at_input:
            views = [replace(views[0], valid=None)]
        probabilities = self.cfg.tta.average == Average.probabilities and len(views) > 1
        total = torch.zeros((views[0].scores.shape[1], *size), device=views[0].scores.device)
        for view in views:
            torch_kernels.accumulate(total, view, probabilities)
        total /= len(views)
        if isinstance(outputs[0][0], MaskLogits):  # sums over queries: not negative, and no distribution
            confidence = total.amax(0) / total.sum(0).clamp(min=torch.finfo(total.dtype).tiny)
        else:
            confidence = total.amax(0) if probabilities else torch.exp(total.amax(0) - total.logsumexp(0))
        if at_input:
            confidence = resize_labels(confidence[top : top + height, left : left + width], original)
        return confidence

    def _view(
        self, plan: ViewPlan, windows: Sequence[Tensor | MaskLogits], original: Size, frugal: bool = False
    ) -> View:
        """Collect the scores of a view's windows."""
        assert self._class_map is not None
        assert self._kernels is not None
        first = windows[0]
        if isinstance(first, MaskLogits):
            queries = [w for w in windows if isinstance(w, MaskLogits)]
            return mask_view(self._kernels, plan, queries, self.cfg.masks, self._class_map, original, frugal)
        class_map = self._class_map
        kept = [class_map.select(w[0]) for w in windows if isinstance(w, Tensor)]
        scores = kept[0][None] if len(kept) == 1 else torch.stack(kept)  # one window is not copied
        if self.cfg.output.upsample == Upsample.one_step and plan.window == plan.canvas:
            return whole(scores[0], original, flipped=plan.flipped)
        legacy = self.cfg.output.first_step == FirstStep.legacy_bilinear
        return View(scores, plan.origins, plan.window, plan.canvas, plan.valid, plan.flipped, legacy)


def _written(values: Sequence[float]) -> str:
    return "/".join(f"{v:g}" for v in values)


def _in_training_mode(network: nn.Module, name: str = "", seen: set[int] | None = None) -> list[str]:
    """Return the names of modules in training mode, but of an exported program, whose graph has one mode for ever."""
    seen = set() if seen is None else seen
    if id(network) in seen:  # shared by several
        return []
    seen.add(id(network))
    if isinstance(network, torch.fx.GraphModule) and "train" in vars(network):  # torch.export's, which refuse the other
        return []
    own = [name or "itself"] if getattr(network, "training", False) else []
    below = (_in_training_mode(part, f"{name}.{child}".lstrip("."), seen) for child, part in network.named_children())
    return own + [found for part in below for found in part]
