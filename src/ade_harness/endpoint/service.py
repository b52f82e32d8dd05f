"""A server: any model by its protocol, as an endpoint; docs/endpoints.md has the wire format.

The network runs in one thread, one image after another; whoever asks waits for it.
"""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import Any

import numpy as np
import torch

from ade_harness import __version__
from ade_harness.config.inference import Average, LabelSize
from ade_harness.config.schema import Config
from ade_harness.data.decode import decode_image, read_header
from ade_harness.data.factory import open_classes
from ade_harness.endpoint.predictor import LABELS_TYPE, SCORES_TYPE, encode
from ade_harness.endpoint.server import Body, RefusedError, Server
from ade_harness.errors import HarnessError
from ade_harness.files.escapes import escaped
from ade_harness.inference.factory import open_network
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.predictor import Prepared
from ade_harness.inference.stopwatch import Stopwatch
from ade_harness.kernels import reference
from ade_harness.runtime.ranks import make_trainer

_MAX_PIXELS = 64_000_000
"""Pixels of one image, and of all at a time; a network needs a hundred bytes and more for each."""
_MAX_SCORES_BYTES = 2 << 30
"""Scores of one image; they are copied into the answer."""
_MAX_ANSWERS_BYTES = 1 << 30
"""Scores of all answers at a time, beside that of one alone."""
_WAIT_S = 60.0
"""For room; a client that reads nothing is given up after as long."""
_MAX_WAITING = 64


@dataclass
class ModelService:
    """A model that answers requests from any thread, one at a time."""

    name: str
    predictor: NetworkPredictor
    device: torch.device
    apply_exif: bool
    forward: ThreadPoolExecutor
    """A pool of one thread."""
    _lock: Lock = field(default_factory=Lock)
    _waiting: int = 0
    _pixels: int = 0
    """Pixels of all images that are being decoded, are waiting, or are in the network."""
    _answers: int = 0
    """Bytes of all scores that are being made, or sent."""
    _answers_end: Condition = field(default_factory=Condition)

    def info(self) -> dict[str, Any]:
        """Return the reply to GET /info."""
        sha256 = self.predictor.facts().get("sha256")
        return {
            "name": self.name,
            "version": f"ade-harness {__version__}",
            "inference": self.predictor.cfg.name,
            "classes": list(self.predictor.classes.names),
            **({"sha256": sha256} if sha256 else {}),
        }

    @contextmanager
    def answer(self, data: bytes, scores: bool) -> Iterator[tuple[Body, str]]:
        """Give the label map (or scores) of an image file, as bytes, and their type, until they are sent.

        Scores are up to 2 GiB, and whoever has asked for them may read slowly: they wait for room before they are made.

        Raises:
            RefusedError: no such image, or no room in time.
        """
        try:
            height, width = read_header(data, "the image")
        except HarnessError as error:
            raise RefusedError(400, str(error).partition(" Replace the file")[0]) from error
        if height * width > _MAX_PIXELS:
            raise RefusedError(413, f"the image has {width}x{height} pixels, at most {_MAX_PIXELS:,} are accepted")
        if not scores:
            with self._place(height * width):
                array = self._answer(data, scores)
            yield (encode(array + np.uint8(1), "png"),), LABELS_TYPE  # 255, void, wraps to 0
            return
        with self._room(4 * len(self.predictor.classes) * height * width):
            with self._place(height * width):
                array = np.ascontiguousarray(self._answer(data, scores))
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
            yield (header.getvalue(), array.data.cast("B")), SCORES_TYPE  # not copied

    @contextmanager
    def _room(self, number: int) -> Iterator[None]:
        """Hold room for an answer of so many bytes; one alone may be of any size."""
        with self._answers_end:
            free = self._answers_end.wait_for(
                lambda: not self._answers or self._answers + number <= _MAX_ANSWERS_BYTES, _WAIT_S
            )
            if not free:
                raise RefusedError(503, "answers that nobody reads take all memory", **{"Retry-After": "1"})
            self._answers += number
        try:
            yield
        finally:
            with self._answers_end:
                self._answers -= number
                self._answers_end.notify_all()

    @contextmanager
    def _place(self, pixels: int) -> Iterator[None]:
        """Hold room for an image from before it is decoded: memory is for so many pixels at a time, whoever asks."""
        with self._lock:
            if self._waiting >= _MAX_WAITING or (self._waiting and self._pixels + pixels > _MAX_PIXELS):
                raise RefusedError(503, f"{self._waiting} images are waiting already", **{"Retry-After": "1"})
            self._waiting, self._pixels = self._waiting + 1, self._pixels + pixels
        try:
            yield
        finally:
            with self._lock:
                self._waiting, self._pixels = self._waiting - 1, self._pixels - pixels

    def _answer(self, data: bytes, scores: bool) -> np.ndarray:
        try:
            image = decode_image(data, "the image", self.apply_exif)
            self.predictor.check({"the image": (image.shape[0], image.shape[1])})
        except HarnessError as error:
            raise RefusedError(400, str(error).partition(" Replace the file")[0]) from error
        try:
            return self.forward.submit(self._predict, image, scores).result()
        except HarnessError as error:
            raise RefusedError(500, str(error)) from error

    def _predict(self, image: np.ndarray, scores: bool) -> np.ndarray:
        prepared = self.predictor.prepare("the image", image)
        if scores:
            return self._scores(prepared)
        [prediction] = self.predictor.predict([prepared], self.device, Stopwatch(self.device))
        _refuse_invalid(prediction.invalid_share)
        labels: np.ndarray = prediction.labels.cpu().numpy()
        return labels

    def _scores(self, prepared: Prepared) -> np.ndarray:
        """Return float32 [C, h, w] from which one bilinear interpolation and argmax make the protocol's labels."""
        if self.predictor.cfg.output.labels == LabelSize.input:
            raise RefusedError(406, "this protocol resizes labels, so it has no scores of the image: ask for labels")
        views, class_map, invalid_share = self.predictor.views(prepared, self.device)
        if not class_map.is_identity or len(class_map.class_of) != len(self.predictor.classes):
            raise RefusedError(406, "this model's channels are not the classes in order: ask for labels")
        _refuse_invalid(invalid_share)
        size, view = prepared.original_size, views[0]
        one_step = view.is_whole and view.canvas == size and not view.flipped and not view.legacy
        if len(views) == 1 and one_step:
            return view.scores[0].float().cpu().numpy()
        if 4 * len(self.predictor.classes) * size[0] * size[1] > _MAX_SCORES_BYTES:
            raise RefusedError(413, f"scores of {size[1]}x{size[0]} pixels are too large: ask for labels")
        total = torch.zeros((len(self.predictor.classes), *size), device=self.device)
        probabilities = len(views) > 1 and self.predictor.cfg.tta.average == Average.probabilities
        for view in views:
            reference.accumulate(total, view, probabilities)
        return total.div_(len(views)).cpu().numpy()


def _refuse_invalid(share: torch.Tensor | None) -> None:
    if share is not None and share > 0:
        raise HarnessError(f"{100 * share.item():.3g}% of the model's scores are NaN or +inf")


def open_service(cfg: Config) -> ModelService:
    """Load the model of a configuration onto its device, with the settings that an evaluation has.

    Raises:
        HarnessError: see :func:`ade_harness.inference.factory.open_network`.
    """
    cfg.runtime.devices = cfg.runtime.num_nodes = 1
    device = make_trainer(cfg.runtime).strategy.root_device
    cfg.metrics.calibration = False
    predictor = open_network(cfg, open_classes(cfg.dataset))
    predictor.network.to(device)
    thread = ThreadPoolExecutor(1, "forward", torch.set_num_threads, (cfg.runtime.threads,))
    return ModelService(cfg.model.name, predictor, device, cfg.inference.exif, thread)


def make_server(service: ModelService, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> Server:
    """Return a server that listens, and answers as soon as ``serve_forever`` is called.

    Raises:
        HarnessError: the address cannot be used.
    """
    try:
        return Server((host, port), service, token)
    except (OSError, OverflowError, TypeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        of_port = isinstance(error, OverflowError) or getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES)
        other = "--port" if of_port else "--host: an address of this machine, or 0.0.0.0 for all"
        raise HarnessError(
            f"serve: cannot listen on {escaped(host)} port {port} ({reason}). Choose another {other}."
        ) from error
