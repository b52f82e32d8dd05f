"""Label maps from an endpoint, in place of a network of ours; docs/endpoints.md has the protocol."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ade_harness import kernels
from ade_harness.config.model import NO_CLASS_NAMES, Encoding, ModelConfig, Returns
from ade_harness.config.schema import Config
from ade_harness.data.decode import decode_labels, read_header
from ade_harness.data.labels import Classes, LabelStorage
from ade_harness.endpoint.client import Endpoint, read_token
from ade_harness.endpoint.http import Reply
from ade_harness.errors import HarnessError, require
from ade_harness.inference.folder import classes_of_stored
from ade_harness.inference.predictor import Prepared, ReadyLabels
from ade_harness.kernels.views import Size
from ade_harness.models.class_map import ClassMap, refuse_other_classes, resolve_class_map
from ade_harness.runtime.queue import Loaders

LABELS_TYPE, SCORES_TYPE = "image/png", "application/x-npy"
ENCODING_HEADER = "Label-Encoding"
_SCORES_TYPES = (SCORES_TYPE, "application/octet-stream")
_SPARE_BYTES = 1 << 16
"""For headers of files, and text in them."""
_MIN_SCORES = 512 * 512
"""Pixels of scores that any image may have, however small it is."""
_STORAGE = LabelStorage(advice="The endpoint has to send 8-bit grey.")


class EndpointPredictor(ReadyLabels):
    """Sends each image to an endpoint, and takes label maps or scores from it.

    Requests are made in :meth:`prepare`, that is in loader processes: as many are under way as there are loaders, and
    the scores' upsampling is shared by them too. What a loader hands over is a label map, whatever came.

    Args:
        model: ``model`` node of the configuration.
        classes: of the data set.
        endpoint: to be asked.
        info: what the server says of itself.
        kernels_choice: ``runtime.kernels``.

    Raises:
        HarnessError: ``model.class_map`` does not fit, or the server says that its classes are others.
    """

    def __init__(
        self, model: ModelConfig, classes: Classes, endpoint: Endpoint, info: dict[str, Any], kernels_choice: str
    ) -> None:
        self.endpoint = endpoint
        self.classes = len(classes)
        self.info = {key: text for key, text in info.items() if key not in ("classes", "odd")}
        of_server: tuple[str, ...] | None = info.get("classes")
        self._info = info
        self._remark: str | None = info.get("odd")
        if model.class_names is not None:  # the user knows better
            of_server = tuple(model.class_names)
        elif of_server is not None and of_server[0].strip().lower() in NO_CLASS_NAMES and self._holds_void(model):
            of_server = of_server[1:]  # named by the values that label maps hold
        self._classes_hash = None if of_server is None else hashlib.sha256("\n".join(of_server).encode()).hexdigest()
        self.send: str = model.http.send
        self.quality: int = model.http.jpeg_quality
        self.returns = model.http.returns
        self.encoding: str = model.encoding
        self.concurrency: int = model.http.concurrency
        self._class_map: ClassMap | None = None
        self._channels = len(classes)
        if self.returns == Returns.labels and of_server is not None:
            self._remark = refuse_other_classes(of_server, classes, endpoint.shown("info")) or self._remark
        if self.returns == Returns.scores:
            given = None if model.class_map is None else list(model.class_map)
            names = None if model.class_names is None else list(model.class_names)
            names = names if names is not None or of_server is None else list(of_server)
            self._channels = len(classes) if given is None else len(given)
            self._class_map = resolve_class_map(self._channels, given, names, classes)
            # loaders have no device; compiled before they are forked
            self._kernels = kernels.select("auto" if kernels_choice == "triton" else kernels_choice, "cpu")

    @staticmethod
    def _holds_void(model: ModelConfig) -> bool:
        """Whether label maps hold 0 for void."""
        return model.http.returns == Returns.labels and model.encoding == Encoding.official

    def check(self, sizes: Mapping[str, Size]) -> None:
        """Nothing is known of what a server can take."""

    def loaders(self, workers: int | None, rank: int, world_size: int) -> Loaders:
        """Return loaders of which each sends one request at a time, so that the ranks share the limit out."""
        limit = self.concurrency
        require(
            limit >= world_size,
            f"model.http.concurrency={limit}: each of the {world_size} ranks needs one request of its own. Set"
            " runtime.devices=1 (an endpoint's images need no GPU here, and one rank sends them all), or a higher"
            " limit.",
        )
        share = limit // world_size + (rank < limit % world_size)
        workers = share if workers is None else min(workers, share)
        return Loaders(workers, ahead=2, at_once=max(1, workers))

    def stop(self) -> None:
        """End the requests that loader processes wait for."""
        self.endpoint.stop()

    def prepare(self, image_id: str, image: npt.NDArray[np.uint8]) -> Prepared:
        """Send an image and return its label map.

        Raises:
            HarnessError: names image and address: no answer, or one that is not what was asked for.
        """
        size = (image.shape[0], image.shape[1])
        scores = self.returns == Returns.scores
        headers = {
            "Content-Type": "image/jpeg" if self.send == "jpeg" else "image/png",
            "Accept": SCORES_TYPE if scores else LABELS_TYPE,
        }
        maximum = self._max_bytes(size)
        reply = self.endpoint.ask("POST", "predict", image_id, headers, encode(image, self.send, self.quality), maximum)
        name = f"{image_id}: {self.endpoint.shown('predict')}"
        self._check_type(reply, _SCORES_TYPES if scores else (LABELS_TYPE,), name)
        labels = self._labels_of_scores(reply, size, name) if scores else self._labels(reply, size, name)
        return Prepared(image_id, (labels,), size)

    def _max_bytes(self, size: Size) -> int:
        if self.returns == Returns.labels:
            return 2 * size[0] * size[1] + _SPARE_BYTES
        return 4 * self._channels * max(size[0] * size[1], _MIN_SCORES) + _SPARE_BYTES

    def _check_type(self, reply: Reply, expected: Sequence[str], name: str) -> None:
        if not reply.body:
            raise HarnessError(f"{name}: answers {reply.status} and sends nothing. Expected {expected[0]}.")
        coding = reply.headers.get("content-encoding", "identity").strip().lower()
        if coding != "identity":
            raise HarnessError(f"{name}: sends its reply compressed, which was not asked for (Content-Encoding).")
        if reply.content_type not in expected:
            sent = self.endpoint.hide(reply.content_type)[:80] or "no Content-Type"
            raise HarnessError(f"{name}: sends {sent!r}, expected {expected[0]}{self.endpoint.quote(reply)}")

    def _labels(self, reply: Reply, size: Size, name: str) -> torch.Tensor:
        encoding = reply.headers.get(ENCODING_HEADER.lower(), self.encoding).strip().lower()
        if encoding != self.encoding:
            raise HarnessError(
                f"{name}: sends labels as {self.endpoint.hide(encoding)[:40]!r}, but model.encoding={self.encoding}."
                " Set model.encoding."
            )
        height, width = read_header(reply.body, name)  # before anything of that size is allocated
        if (height, width) != size:
            raise HarnessError(
                f"{name}: the label map is {width}x{height} (width x height), the image is"
                f" {size[1]}x{size[0]}: label maps must have the size of the image that was sent."
            )
        return torch.from_numpy(
            classes_of_stored(decode_labels(reply.body, name, _STORAGE), encoding, name, self.classes)
        )

    def _labels_of_scores(self, reply: Reply, size: Size, name: str) -> torch.Tensor:
        assert self._class_map is not None
        array = read_scores(reply.body, self._channels, name)
        scores = self._class_map.select(torch.from_numpy(array.astype(np.float32)))
        share = float(self._kernels.invalid_share([scores]))
        if share:
            raise HarnessError(f"{name}: {100 * share:.3g}% of the scores are NaN or +inf.")
        return self._class_map.classes_of(self._kernels.label_map(scores, size))

    def source_hash(self, image_id: str) -> str:
        """Nothing is read that could be hashed."""
        return ""

    def facts(self) -> dict[str, Any]:
        """Return what the manifest keeps: where the labels came from, and how the server describes itself."""
        origin = self._origin()
        sent = f"jpeg, quality {self.quality}" if self.send == "jpeg" else "png"
        facts = {
            "weights": "endpoint",
            "origin": origin,
            "sent": sent,
            "returned": str(self.returns),
            "server": self.info,
        }
        said = {"inference": self.info.get("inference"), "classes": self._classes_hash}
        if any(said.values()):  # decides what it answers with, as a configuration does
            facts["config_sha256"] = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        return {**facts, **({"sha256": self.info["sha256"]} if "sha256" in self.info else {})}

    def notes(self) -> list[str]:
        """Return what the user should know about predictions of an endpoint."""
        notes = [f"the predictions came from {self._origin()}: nobody can repeat this run without that endpoint"]
        if self.send == "jpeg":
            notes.append(
                f"images were sent as JPEG of quality {self.quality}, which changes their pixels: no published protocol"
                " does that (model.http.send=png)"
            )
        if self.endpoint.token and self.endpoint.is_open:
            notes.append("the token went over the network without encryption: https would hide it")
        if self._remark is not None:
            notes.append(self._remark)
        if self._class_map is not None and self._class_map.note:
            notes.append(self._class_map.note)
        return notes

    def changes(self) -> list[str]:
        """Ask ``/info`` once more: a server that was replaced meanwhile says so, if it describes itself at all."""
        try:
            now = dataclasses.replace(self.endpoint, retries=0).info()
        except HarnessError:  # it has answered all that it was asked
            return []
        both = ((name, self._info.get(name), now.get(name)) for name in {**self._info, **now})
        return [
            f"a replaced server: {name} was {_brief(then)} at the start and is {_brief(at_end)} now"
            for name, then, at_end in both if then != at_end
        ]  # fmt: skip

    def _origin(self) -> str:
        named = " ".join(self.info[k] for k in ("name", "version") if k in self.info)
        return f"{self.endpoint.shown('predict')}{f' ({named})' if named else ''}"


def _brief(value: Any) -> str:
    """Return what a server says of itself, short enough for a message."""
    text = "not said" if value is None else ", ".join(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_endpoint(cfg: Config, classes: Classes) -> EndpointPredictor:
    """Read the token, ask the endpoint whether it is there, and return its predictor.

    Args:
        cfg: the whole configuration.
        classes: of the data set.

    Raises:
        HarnessError: no token where one is named, or the endpoint does not answer, or refuses.
    """
    model, http = cfg.model, cfg.model.http
    endpoint = Endpoint(model.url or "", http.timeout_s, http.retries, read_token(http.token_env))
    return EndpointPredictor(model, classes, endpoint, endpoint.info(), cfg.runtime.kernels)


def encode(image: npt.NDArray[np.uint8], kind: str, quality: int = 95) -> bytes:
    """Return uint8 [H, W, 3] (or labels [H, W]) as the bytes of a file: "png" (without loss) or "jpeg"."""
    file = io.BytesIO()
    options: dict[str, Any] = {"quality": quality} if kind == "jpeg" else {"compress_level": 1}
    Image.fromarray(image).save(file, "JPEG" if kind == "jpeg" else "PNG", **options)
    return file.getvalue()


def read_scores(data: bytes, channels: int, name: str) -> npt.NDArray[Any]:
    """Return the array of a .npy file without running or allocating anything that its header asks for.

    Args:
        data: the file.
        channels: expected.
        name: leads messages.

    Returns:
        float16 or float32 [channels, h, w], h and w 1 or more.

    Raises:
        HarnessError: not such a file.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = read(file)
    except Exception as error:  # NumPy reads a header by Python's own parser, which fails in many ways
        raise HarnessError(f"{name}: the scores are no NumPy .npy file of version 1 or 2.") from error
    if dtype.hasobject:
        raise HarnessError(f"{name}: the scores hold pickled objects, which are never loaded. Expected float32.")
    if dtype.kind != "f" or dtype.itemsize not in (2, 4):
        raise HarnessError(f"{name}: the scores are {dtype}, expected float16 or float32.")
    if len(shape) != 3 or min(shape) < 1:
        raise HarnessError(f"{name}: the scores have the shape {list(shape)[:8]}, expected [{channels}, h, w].")
    if shape[0] != channels:
        raise HarnessError(
            f"{name}: the scores have {shape[0]} channels, expected {channels}. model.class_map says which class each"
            " channel is: one entry per channel (a class, or null to leave it out)."
        )
    left = len(data) - file.tell()
    if left != shape[0] * shape[1] * shape[2] * dtype.itemsize:
        raise HarnessError(f"{name}: the scores' header says {list(shape)} {dtype}, but {left:,} bytes follow it.")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
