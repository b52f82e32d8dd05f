"""The protocol as two steps: `prepare` on the host (worker processes), `predict` on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from ade_harness import kernels
from ade_harness.data.decode import decode_labels
from ade_harness.data.labels import NO_CLASS, NUM_CLASSES
from ade_harness.errors import HarnessError
from ade_harness.inference.resize import (
    Size,
    legacy_bilinear,
    padded_size,
    resize_image,
    resize_labels,
    target_sizes,
)
from ade_harness.models.class_map import ClassMap, resolve_class_map
from ade_harness.models.loading import LoadedModel, as_scores


@dataclass(frozen=True)
class Prepared:
    """What a worker hands to the device."""

    image_id: str
    pixels: Tensor
    """uint8 [h, w, 3] at the network's input size, not yet padded; or, without a network, the labels [H, W]."""
    original_size: Size


class Predictor(Protocol):
    """What evaluation needs of a model."""

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Make a worker's part of the prediction from uint8 [H, W, 3] RGB."""

    def predict(self, prepared: Prepared, device: torch.device) -> Tensor:
        """Return the label map, uint8 [H, W], 0..149 or 255 for none of the classes."""

    def source_hash(self, image_id: str) -> str:
        """Return a hash of the files that this image's prediction is read from, empty if there are none."""

    def notes(self) -> list[str]:
        """Return what the user should know about the predictions so far."""


class NetworkPredictor:
    """Runs a network by a protocol (``inference`` node of the configuration)."""

    def __init__(self, model: LoadedModel, inference: DictConfig, model_cfg: DictConfig) -> None:
        self.model = model
        self.cfg = _fitted(inference, model.fixed_size)
        self.class_map_cfg: list[int | None] | None = None if model_cfg.class_map is None else list(model_cfg.class_map)
        self.reverse_channels = model_cfg.input.channel_order == "bgr"
        self._class_map: ClassMap | None = None
        self._statistics = (torch.tensor(model.mean)[:, None, None], torch.tensor(model.std)[:, None, None])
        if model.channels is not None:
            self._class_map = resolve_class_map(model.channels, self.class_map_cfg, model.class_names)

    def check_sizes(self, sizes: Mapping[str, Size]) -> None:
        """Refuse a protocol that the model cannot take, or that an image does not fit, before the first image.

        Args:
            sizes: image id -> (height, width).
        """
        for image_id, size in sizes.items():
            resized = target_sizes(size, self.cfg.resize)[-1]
            if min(resized) < 1:
                raise HarnessError(f"{image_id}: inference.resize makes a size of {resized[1]}x{resized[0]}.")
            self._check_input(image_id, resized)

    def _check_input(self, image_id: str, size: Size) -> Size:
        padded = padded_size(size, self.cfg.resize)
        if size[0] > padded[0] or size[1] > padded[1]:
            raise HarnessError(
                f"{image_id}: {size[1]}x{size[0]} (width x height) after resizing does not fit"
                f" inference.resize.pad_to={[*padded]} (height, width)."
            )
        fixed = self.model.fixed_size
        if fixed is not None and fixed != padded:
            raise HarnessError(
                f"{image_id}: the model takes {fixed[1]}x{fixed[0]} (width x height) only, the protocol"
                f" {self.cfg.name} makes {padded[1]}x{padded[0]}. Choose inference=fit_512 with"
                f" inference.resize.side={max(fixed)} inference.resize.pad_to=[{fixed[0]},{fixed[1]}], or"
                f" inference.resize.rule=exact with height and width."
            )
        return padded

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Resize uint8 [H, W, 3] RGB to the network's input size, in uint8 as the official loaders do."""
        resize = self.cfg.resize
        original = (image.shape[0], image.shape[1])
        for size in target_sizes(original, resize):
            image = resize_image(image, size, resize.backend, resize.antialias)
        return Prepared(image_id, torch.from_numpy(np.array(image)), original)

    def predict(self, prepared: Prepared, device: torch.device) -> Tensor:
        """Run the network and return labels of the original size; see :class:`Predictor`."""
        images, size = self._input(prepared, device)
        scores = self._scores(images, prepared)
        return self._labels(scores, size, (images.shape[2], images.shape[3]), prepared.original_size)

    def source_hash(self, image_id: str) -> str:
        """Nothing is read: the weights are recorded for the whole run."""
        return ""

    def notes(self) -> list[str]:
        """Return the class map's remarks."""
        notes = [self._class_map.note] if self._class_map is not None and self._class_map.note else []
        if self.cfg.resize.rule == "fit":
            size = "images as they are" if self.cfg.resize.height is None else "images fitted into the model's input"
            notes.append(
                f"inference={self.cfg.name} is no published protocol ({size}, pixels normalised with mean"
                f" {_written(self.model.mean)} and std {_written(self.model.std)}): choose the model's own"
            )
        return notes

    def _input(self, prepared: Prepared, device: torch.device) -> tuple[Tensor, Size]:
        """Normalise and pad: float32 [1, 3, h, w], and the size without padding."""
        pixels = prepared.pixels.to(device, non_blocking=True).permute(2, 0, 1)
        if self.reverse_channels:
            pixels = pixels.flip(0)
        mean, std = (s.to(device) for s in self._statistics)
        image = (pixels.float() - mean) / std
        size = (image.shape[1], image.shape[2])
        padded = self._check_input(prepared.image_id, size)
        if padded != size:
            value = self.cfg.resize.pad_value
            fill = torch.zeros_like(mean) if value is None else (value - mean) / std
            canvas = fill.expand(3, *padded).clone()
            canvas[:, : size[0], : size[1]] = image
            image = canvas
        return image[None], size

    def _scores(self, images: Tensor, prepared: Prepared) -> Tensor:
        """Return float32 scores [C, h, w] of the kept channels."""
        try:
            output = self.model.module(images)
        except torch.OutOfMemoryError as error:
            raise HarnessError(
                f"{prepared.image_id}: out of GPU memory with an input of {list(images.shape)}."
                " Use a larger GPU or a protocol with smaller inputs."
            ) from error
        except HarnessError:
            raise
        except Exception as error:  # the network may be anybody's code
            reason = " ".join(str(error).split())[:300]
            raise HarnessError(
                f"{prepared.image_id}: the model failed on an input of {list(images.shape)}"
                f" ({type(error).__name__}: {reason}). ADE_HARNESS_TRACEBACK=1 shows where."
            ) from error
        batch = as_scores(output, prepared.image_id)
        if batch.shape[0] != images.shape[0] or batch.numel() == 0:
            raise HarnessError(
                f"{prepared.image_id}: the model returned {list(batch.shape)} for an input of {list(images.shape)},"
                " expected logits [N, C, h, w] with the same N."
            )
        scores = batch[0].float()
        if torch.isnan(scores).any():
            share = torch.isnan(scores).float().mean().item()
            raise HarnessError(
                f"{prepared.image_id}: {share:.1%} of the model's scores are NaN. Check the checkpoint, the pixel"
                " statistics (model.input) and the precision."
            )
        if self._class_map is None:
            self._class_map = resolve_class_map(scores.shape[0], self.class_map_cfg, self.model.class_names)
        if self.model.channels not in (None, scores.shape[0]):
            raise HarnessError(
                f"{prepared.image_id}: the model gives {scores.shape[0]} channels, {self.model.channels} were expected."
            )
        return self._class_map.select(scores)

    def _labels(self, scores: Tensor, size: Size, padded: Size, original: Size) -> Tensor:
        """Upsample and argmax, in the protocol's order of steps."""
        assert self._class_map is not None
        output = self.cfg.output
        if output.first_step == "legacy_bilinear":
            scores = legacy_bilinear(scores, padded)
        elif output.upsample == "two_step" and (padded != size or output.labels != "input"):
            scores = _bilinear(scores, padded)
        if output.labels == "input":
            labels = kernels.label_map(scores, padded)[: size[0], : size[1]]
            return self._class_map.classes_of(resize_labels(labels, original))
        if padded != size:
            scores = scores[:, : size[0], : size[1]]
        return self._class_map.classes_of(kernels.label_map(scores, original))


def _fitted(inference: DictConfig, fixed_size: Size | None) -> DictConfig:
    """Fill in the model's only input size where the protocol leaves it open."""
    if inference.resize.rule != "fit" or inference.resize.height is not None or fixed_size is None:
        return inference
    filled = inference.copy()
    filled.resize.height, filled.resize.width = fixed_size
    return filled


def _written(values: Sequence[float]) -> str:
    return "/".join(f"{v:g}" for v in values)


def _bilinear(scores: Tensor, size: Size) -> Tensor:
    if tuple(scores.shape[1:]) == size:
        return scores
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


class FolderPredictor:
    """Takes the label maps from PNG files ``<image id>.png`` made by any framework.

    Args:
        folder: where they are.
        encoding: "official" (0 none of the classes, 1..150) or "zero_based" (0..149, 255 none).

    Raises:
        HarnessError: no such folder.
    """

    def __init__(self, folder: Path, encoding: str) -> None:
        if not folder.is_dir():
            raise HarnessError(f"model.path={folder}: no such folder.")
        self.folder = folder
        self.encoding = encoding

    def missing(self, image_ids: list[str]) -> list[str]:
        """Return the ids that have no file."""
        return [i for i in image_ids if not (self.folder / f"{i}.png").is_file()]

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Read the image's label file and check it."""
        path = self.folder / f"{image_id}.png"
        stored = decode_labels(self._read(image_id), str(path))
        if stored.shape != image.shape[:2]:
            raise HarnessError(
                f"{path}: {stored.shape[1]}x{stored.shape[0]} (width x height), the image is"
                f" {image.shape[1]}x{image.shape[0]}: label files must have the original image's size."
            )
        return Prepared(image_id, torch.from_numpy(self._decode(stored, path)), (image.shape[0], image.shape[1]))

    def _decode(self, stored: npt.NDArray[np.uint8], path: Path) -> npt.NDArray[np.uint8]:
        table = np.full(256, NO_CLASS, np.uint8)
        allowed = np.zeros(256, bool)
        if self.encoding == "official":
            table[1 : NUM_CLASSES + 1] = np.arange(NUM_CLASSES)
            allowed[: NUM_CLASSES + 1] = True
            expected = "0 (none) and 1..150 (model.encoding=official); 0..149 with 255 is model.encoding=zero_based"
        else:
            table[:NUM_CLASSES] = np.arange(NUM_CLASSES)
            allowed[:NUM_CLASSES] = True
            allowed[NO_CLASS] = True
            expected = "0..149 and 255 (none) (model.encoding=zero_based); 0..150 is model.encoding=official"
        wrong = np.unique(stored[~allowed[stored]])
        if wrong.size:
            raise HarnessError(f"{path}: holds the value {wrong[0]}; expected {expected}.")
        labels: npt.NDArray[np.uint8] = table[stored]
        return labels

    def predict(self, prepared: Prepared, device: torch.device) -> Tensor:
        """Return the labels that were read."""
        return prepared.pixels.to(device, non_blocking=True)

    def source_hash(self, image_id: str) -> str:
        """Return BLAKE2b of the image's label file."""
        return hashlib.blake2b(self._read(image_id), digest_size=16).hexdigest()

    def _read(self, image_id: str) -> bytes:
        path = self.folder / f"{image_id}.png"
        try:
            return path.read_bytes()
        except OSError as error:
            raise HarnessError(f"{path}: cannot be read ({error.strerror}): one label PNG per image.") from error

    def notes(self) -> list[str]:
        """Nothing to remark."""
        return []


def label_hash(labels: Tensor) -> str:
    """Return BLAKE2b (16 bytes, hex) of a uint8 label map [H, W]: equal hashes mean equal labels."""
    return hashlib.blake2b(labels.cpu().contiguous().numpy().data, digest_size=16).hexdigest()
