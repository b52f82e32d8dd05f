"""Networks and functions of the caller as predictors, and a loaded system as a function of an image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from ade_harness.api.state import begin, callers_network, callers_process, device_of
from ade_harness.config.schema import Config
from ade_harness.data.containers import MAX_FILE_BYTES
from ade_harness.data.decode import decode_image
from ade_harness.data.labels import NO_CLASS, Classes
from ade_harness.errors import HarnessError, text_of
from ade_harness.files.reading import expanded, read_regular
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.predictor import Prediction, Prepared
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import Size
from ade_harness.models.formats.transformers import describe_network
from ade_harness.models.identity import state_hash
from ade_harness.models.loaded import LoadedModel, names_of, statistics
from ade_harness.report.overlays import draw_prediction
from ade_harness.runs.directory import IN_MEMORY
from ade_harness.runtime.queue import Loaders


def network_predictor(network: nn.Module, cfg: Config, classes: Classes) -> NetworkPredictor:
    """Return a predictor that runs a network of the caller's, who goes on with it.

    Args:
        network: normalised images float32 [N, 3, H, W] to scores [N, C, h, w], or to mask classification.
        cfg: the whole configuration.
        classes: that it predicts.
    """
    device_of(network)  # of weights that are nowhere there is no hash
    names, notes = describe_network(network, cfg.model)
    names = getattr(network, "class_names", names)
    facts = {
        "origin": f"a {type(network).__qualname__} {IN_MEMORY}",
        "state_sha256": state_hash(network),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    exported: Any = sys.modules.get("ade_harness.models.formats.exported")  # a program of it has imported that
    sizes = exported.sizes_of(network) if exported is not None else {}
    model = LoadedModel(
        network, "in memory", **statistics(cfg.model), class_names=names_of(cfg.model, names), of_caller=True,
        facts=facts, notes=tuple(notes), **sizes,
    )  # fmt: skip
    return NetworkPredictor(model, cfg.inference, cfg.model, cfg.runtime.kernels, cfg.metrics.calibration, classes)


def unpickled(path: str) -> nn.Module:
    """Return the network that :func:`ade_harness.evaluate` wrote for its ranks.

    Args:
        path: of a file that this user's process has just written: reading a pickle runs what is in it.
    """
    network = torch.load(path, map_location="cpu", weights_only=False)
    if not isinstance(network, nn.Module):
        raise HarnessError(f"{path}: holds a {type(network).__name__}, expected an nn.Module.")
    _know_outputs(network)
    return network


def _know_outputs(network: nn.Module) -> None:
    """Tell transformers what its networks in this one record, which their constructors do and a pickle does not."""
    utilities = sys.modules.get("transformers.utils.output_capturing")
    registry: Any = getattr(utilities, "_CAN_RECORD_REGISTRY", None)
    models: Any = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    for module in network.modules() if registry is not None else ():
        if isinstance(module, models):
            registry[module] = module._can_record_outputs


class FunctionPredictor:
    """A function from an image to labels as a predictor; it is called by one thread, one image after another.

    Args:
        function: uint8 [H, W, 3] RGB to integers [H, W]: 0..C-1, and 255 for void.
        classes: that it predicts.
    """

    network = None

    def __init__(self, function: Callable[[npt.NDArray[np.uint8]], Any], classes: Classes) -> None:
        self.function, self.classes = function, classes

    def check(self, sizes: Mapping[str, Size]) -> None:
        """Nothing is known before it is called."""

    def facts(self) -> dict[str, Any]:
        """Return what the function calls itself."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return {"weights": "in memory", "origin": f"the function {name} {IN_MEMORY}"}

    def loaders(self, workers: int | None, rank: int, world_size: int) -> Loaders:
        """Return as many as were asked for."""
        return Loaders(workers)

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Hand the image over as it is; its pixels are the function's to change."""
        return Prepared(image_id, (torch.from_numpy(np.array(image)),), (image.shape[0], image.shape[1]))

    def predict(self, batch: Sequence[Prepared], device: torch.device, watch: Stopwatch) -> list[Prediction]:
        """Call the function for each image.

        Raises:
            HarnessError: it failed, or gave something else than a label map; names the image.
        """
        with watch("forward"):
            return [Prediction(self._labels(prepared).to(device)) for prepared in batch]

    def _labels(self, prepared: Prepared) -> Tensor:
        try:
            given = self.function(prepared.pixels[0].numpy())
        except HarnessError:
            raise
        except Exception as error:  # anybody's code
            reason = " ".join(f"{type(error).__name__}: {text_of(error)}".split())[:300]
            raise HarnessError(f"{prepared.image_id}: the function failed ({reason}).") from error
        size, classes = prepared.original_size, len(self.classes)
        try:
            found = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
        except Exception as error:  # ragged lists, sparse tensors, bfloat16, anybody's __array__
            what = f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
            reason = " ".join(text_of(error).split())[:120]
            raise HarnessError(
                f"{prepared.image_id}: the function returned {what}, not an array ({reason}); expected integers"
                f" {list(size)}: a label for each pixel of the image."
            ) from error
        if found.shape != size or not (np.issubdtype(found.dtype, np.integer)):
            raise HarnessError(
                f"{prepared.image_id}: the function returned {found.dtype} {list(found.shape)}, expected integers"
                f" {list(size)}: a label for each pixel of the image."
            )
        wrong = (found < 0) | ((found >= classes) & (found != NO_CLASS))
        if wrong.any():
            raise HarnessError(
                f"{prepared.image_id}: the function returned the label {int(found[wrong][0])}, expected 0 to"
                f" {classes - 1}, and {NO_CLASS} for void."
            )
        return torch.from_numpy(found.astype(np.uint8))

    def prepared_bytes(self, size: Size) -> int:
        """Return the bytes of an image."""
        return 3 * size[0] * size[1]

    def cost(self, size: Size) -> float:
        """Return the number of pixels."""
        return float(size[0] * size[1])

    def group_key(self, size: Size) -> Hashable:
        """No images share a call."""
        return None

    def source_hash(self, image_id: str) -> str:
        """Nothing is read."""
        return ""

    def notes(self) -> list[str]:
        """Nothing to say."""
        return []

    def changes(self) -> list[str]:
        """Nothing is known of the function."""
        return []

    def stop(self) -> None:
        """Nothing is waited for."""


class Segmenter:
    """A system by its own protocol, as a function of an image; may be called from several threads.

    ::

        segmenter = ade.load_model("segformer_b0")
        labels = segmenter(Image.open("street.jpg"))  # uint8 [H, W]: 0..149
        segmenter.show("street.jpg")                  # the image, the prediction and its legend, as a PIL image

    Args:
        predictor: of the system.
        cfg: its configuration.
        device: where it computes.
    """

    def __init__(self, predictor: NetworkPredictor, cfg: Config, device: torch.device) -> None:
        self._predictor, self._cfg, self.device = predictor, cfg, device
        predictor.network.to(device)

    @property
    def network(self) -> nn.Module:
        """The network alone: normalised images to scores."""
        return self._predictor.network

    @property
    def classes(self) -> Classes:
        """The classes that labels number."""
        return self._predictor.classes

    @property
    def protocol(self) -> str:
        """The name of the protocol in ``conf/inference``."""
        return self._cfg.inference.name

    @property
    def system(self) -> str:
        """The system's name in ``conf/model``."""
        return self._cfg.model.name

    @property
    def name(self) -> str:
        """The system, as tables call it."""
        return self._cfg.model.label or self._cfg.model.name

    def __call__(self, image: Image.Image | npt.NDArray[np.uint8] | str | Path) -> npt.NDArray[np.uint8]:
        """Return the label of each pixel, uint8 [H, W]: 0..C-1.

        Args:
            image: a PIL image, uint8 [H, W, 3] RGB or [H, W] grey of any size, or the path of a JPEG or PNG.

        Raises:
            HarnessError: it is no such image, or does not fit the protocol.
        """
        pixels, name = read_image(image, self._cfg.inference.exif)
        return self.predict(pixels, name)

    @property
    def facts(self) -> dict[str, Any]:
        """Where the weights come from."""
        return self._predictor.facts()

    def predict(self, pixels: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
        """Return the labels of uint8 [H, W, 3] RGB; `name` is how messages call the image."""
        size = (pixels.shape[0], pixels.shape[1])
        self._predictor.check({name: size})
        with callers_process(), callers_network(self.network, self.device):
            begin(str(self._cfg.inference.precision), self._cfg.runtime.seed)
            prepared = self._predictor.prepare(name, pixels)
            [prediction] = self._predictor.predict([prepared], self.device, Stopwatch(self.device))
            if prediction.invalid_share is not None and prediction.invalid_share > 0:
                raise HarnessError(
                    f"{name}: {100 * prediction.invalid_share.item():.3g}% of the model's scores are NaN or +inf."
                )
            labels: npt.NDArray[np.uint8] = prediction.labels.cpu().numpy()
            return labels

    def show(self, image: Image.Image | npt.NDArray[np.uint8] | str | Path) -> Image.Image:
        """Return the image beside its prediction in the data set's colours, with the names of the classes."""
        pixels, name = read_image(image, self._cfg.inference.exif)
        return draw_prediction(pixels, self.predict(pixels, name), self.classes)

    def __repr__(self) -> str:
        """Return one line."""
        facts = self.facts
        random = "WEIGHTS" if facts.get("weights") == "random" else "LAYERS" if facts.get("random_keys") else ""
        mark = f", RANDOM {random}" if random else ""
        return f"<Segmenter {self.name}, inference={self.protocol}, on {self.device}{mark}>"


def read_image(image: Any, exif: bool = True) -> tuple[npt.NDArray[np.uint8], str]:
    """Return uint8 [H, W, 3] RGB of what a caller calls an image, and a name for messages.

    Args:
        image: see :meth:`Segmenter.__call__`.
        exif: turn files, and PIL images that know it, as their EXIF orientation says.

    Raises:
        HarnessError: it is something else.
    """
    if isinstance(image, str | Path):
        path = expanded(image)
        return decode_image(read_regular(path, MAX_FILE_BYTES), str(path), exif), str(path)
    if isinstance(image, Image.Image):
        from PIL import ImageOps

        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise HarnessError(f"the image has PIL's mode {image.mode}: expected 8 bits per channel. Convert it first.")
        try:
            turned = ImageOps.exif_transpose(image) if exif else image
            return np.array(turned.convert("RGB")), "the image"
        except (OSError, ValueError, SyntaxError) as error:  # it is decoded now, and may be cut off, or closed
            raise HarnessError(f"the image cannot be decoded ({' '.join(str(error).split())[:200]}).") from error
    if not isinstance(image, np.ndarray):
        raise HarnessError(f"the image is a {type(image).__name__}, expected a PIL image, a uint8 array, or a path.")
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)) or not image.size:
        raise HarnessError(
            f"the image is {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3] RGB (0..255) or [H, W] grey."
        )
    return (np.repeat(image[:, :, None], 3, 2) if image.ndim == 2 else np.array(image, order="C")), "the image"
