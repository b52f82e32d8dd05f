"""A batch of images through a predictor, its counts on their way to the host: what nothing on a GPU waits for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ade_harness.errors import HarnessError
from ade_harness.evaluation.data import LoadedImage
from ade_harness.inference.predictor import Prediction, Predictor
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import Kernels
from ade_harness.kernels.confidence import count_confidence


@dataclass(frozen=True)
class Launched:
    """A batch whose results the device may still be working on."""

    images: list[LoadedImage]
    predictions: list[Prediction]
    counts: list[Tensor]
    calibrations: list[Tensor]
    """int64 [15, 3], or [] if they were not asked for."""
    watch: Stopwatch
    done: torch.cuda.Event | None

    def wait(self) -> dict[str, float]:
        """Wait until all results are on the host; returns the seconds of each stage."""
        if self.done is not None:
            self.done.synchronize()
        return self.watch.seconds()


def launch(
    images: list[LoadedImage], predictor: Predictor, device: torch.device, chosen: Kernels, classes: int
) -> Launched:
    """Predict and count a batch.

    Args:
        images: of the batch.
        predictor: images to labels.
        device: where its network is.
        chosen: the kernels that count.
        classes: of the data set.
    """
    watch = Stopwatch(device)
    predictions = predictor.predict([image.prepared for image in images], device, watch)
    counts, calibrations = [], []
    with watch("counts"):
        for image, prediction in zip(images, predictions, strict=True):
            target = image.target.to(device, non_blocking=True)
            counts.append(chosen.count(prediction.labels, target, classes))
            confidence = prediction.confidence
            calibrations.append(None if confidence is None else count_confidence(confidence, prediction.labels, target))
    with watch("copy"):
        counts = [_to_host(c) for c in counts]
        calibrated = [torch.zeros(0, dtype=torch.int64) if c is None else _to_host(c) for c in calibrations]
        predictions = [Prediction(_to_host(p.labels), _to_host(p.invalid_share)) for p in predictions]
    done = None
    if device.type == "cuda":
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record()
    return Launched(images, predictions, counts, calibrated, watch, done)


def refuse_invalid(image_id: str, share: Tensor | None) -> None:
    """Raise HarnessError if some of an image's scores are NaN or +inf."""
    if share is not None and share > 0:
        raise HarnessError(
            f"{image_id}: {100 * share.item():.3g}% of the model's scores are NaN or +inf. Check the checkpoint, the"
            " pixel statistics (model.input) and the precision: half precision overflows above 65,504. (A network that"
            " returns labels: some are none of its channels.)"
        )


def _to_host(tensor: Tensor | None) -> Tensor:
    """Start copying a tensor to the host; on a GPU it is there when the stream has come this far."""
    if tensor is None:
        return torch.zeros(())
    if tensor.device.type == "cpu":
        return tensor
    tensor = tensor.contiguous()  # what is not goes through memory that is not pinned, and waits
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
