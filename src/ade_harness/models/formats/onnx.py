"""ONNX files through onnxruntime, as an nn.Module."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ade_harness.config.model import ModelConfig
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import file_hash
from ade_harness.files.reading import require_regular
from ade_harness.models.checkpoint.sources import model_file
from ade_harness.models.identity import companion_hashes
from ade_harness.models.loaded import UNBOUNDED, LoadedModel, names_of, require_channels_first, statistics

_LABELS = ("tensor(int64)", "tensor(int32)", "tensor(int16)", "tensor(int8)", "tensor(uint8)", "tensor(uint16)")
_SCORES = ("tensor(float)", "tensor(float16)", "tensor(double)")


class OnnxModel(nn.Module):
    """Runs a file with one image input; the first floating-point output of four dimensions is taken as scores.

    Without one, an output of integers [N, h, w] or [N, 1, h, w] is taken as labels: a file that ends in an argmax.

    Args:
        path: the .onnx file.
        threads: of one rank.
        output: name of the output that is taken.

    Raises:
        HarnessError: the file is not there, is no ONNX model, or has no such input or output.
    """

    def __init__(self, path: Path, threads: int, output: str | None = None) -> None:
        super().__init__()
        self.path = path
        self.threads = threads
        self._session: Any = None
        self._device: torch.device | None = None
        session = self._session_on(torch.device("cpu"))
        inputs = session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type != "tensor(float)":
            described = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise HarnessError(f"{path}: expected one input, float32 [N, 3, H, W]; the model has {described}.")
        require_channels_first(inputs[0].shape, str(path))
        self.input_name: str = inputs[0].name
        self.input_shape = tuple(inputs[0].shape)
        outputs = _usable(session.get_outputs())
        chosen = outputs if output is None else [o for o in outputs if o.name == output]
        if not chosen:
            described = ", ".join(f"{o.name} {o.type} {o.shape}" for o in session.get_outputs())
            asked = "" if output is None else f" named {output!r} (model.output)"
            labels = [o for o in session.get_outputs() if len(o.shape) == 3 and o.name == (output or o.name)]
            cast = f", and in a Cast of {labels[0].name} to int64" if labels else ""
            raise HarnessError(
                f"{path}: no output{asked} of floating-point scores [N, C, h, w] or of integer labels [N, h, w]; the"
                f" model has {described}. Labels: let the graph end in ArgMax over the channels{cast}."
            )
        self.output_name: str = chosen[0].name
        self.notes: tuple[str, ...] = ()
        """Which of several outputs is taken."""
        if output is None and len(outputs) > 1:
            others = ", ".join(o.name for o in outputs[1:])
            self.notes = (f"of the file's outputs {self.output_name} is taken, not {others}: model.output chooses",)
        self.channels: int | None = None
        """Number of channels of the scores, if the file says so."""
        if chosen[0].type in _SCORES and isinstance(chosen[0].shape[1], int):
            self.channels = chosen[0].shape[1]

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """(height, width) if the file takes no other."""
        height, width = self.input_shape[2:]
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    @property
    def side_limits(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Least and greatest height, and width, where the file fixes one of the two."""
        sides = [(side, side) if isinstance(side, int) else (0, UNBOUNDED) for side in self.input_shape[2:]]
        return None if self.fixed_size is not None or (0, UNBOUNDED) == sides[0] == sides[1] else (sides[0], sides[1])

    @property
    def fixed_batch(self) -> int | None:
        """Images per call if the file takes no other number."""
        return self.input_shape[0] if isinstance(self.input_shape[0], int) else None

    @property
    def class_names(self) -> list[str] | None:
        """Names in the file's metadata (keys names, classes or labels; JSON, a Python literal, or lines)."""
        stored = self._session_on(torch.device("cpu")).get_modelmeta().custom_metadata_map
        return next(
            (_parse_names(stored[k]) for k in ("names", "classes", "class_names", "labels") if k in stored),
            None,
        )

    def _session_on(self, device: torch.device) -> Any:
        if self._session is None or self._device != device:
            import onnxruntime

            require_regular(self.path, f"model.path={self.path}")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
            providers: list[Any] = ["CPUExecutionProvider"]
            if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                # this rank's GPU, full float32, and no choice of algorithm by timing, which would vary from run to run
                chosen = {"device_id": device.index or 0, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
                providers.insert(0, ("CUDAExecutionProvider", chosen))
            try:
                self._session = onnxruntime.InferenceSession(str(self.path), options, providers=providers)
            except Exception as error:  # onnxruntime's exceptions share no public base class
                reason = str(error).splitlines()[0]
                raise HarnessError(f"{self.path}: onnxruntime cannot load this file ({reason}).") from error
            if device.type == "cuda" and self._session.get_providers()[0] != "CUDAExecutionProvider":
                raise HarnessError(
                    f"{self.path}: this onnxruntime cannot use the GPU. Install onnxruntime-gpu in its place, or run"
                    " with runtime.accelerator=cpu."
                )
            self._device = device
        return self._session

    def forward(self, images: Tensor) -> Tensor:
        """Map images float32 [N, 3, H, W] to scores [N, C, h, w], or to labels [N, h, w]."""
        session = self._session_on(images.device)
        array = np.ascontiguousarray(images.detach().cpu().numpy())
        scores = session.run([self.output_name], {self.input_name: array})[0]
        if scores.dtype == np.uint16:  # torch does next to nothing with it
            scores = scores.astype(np.int32)
        return torch.from_numpy(scores).to(images.device)


def _usable(outputs: list[Any]) -> list[Any]:
    """Return outputs that hold predictions, scores before labels."""
    scores = [o for o in outputs if len(o.shape) == 4 and o.type in _SCORES]
    return scores + [o for o in outputs if _gives_labels(o)]


def _gives_labels(output: Any) -> bool:
    """Whether an output is a map of integers."""
    shape = output.shape
    # a channel whose number the file does not say is looked at with the first image
    one = len(shape) == 4 and (shape[1] == 1 or not isinstance(shape[1], int))
    return output.type in _LABELS and (len(shape) == 3 or one)


_MAX_NAMES_BYTES = 1 << 20


def _parse_names(text: str) -> list[str] | None:
    if len(text) > _MAX_NAMES_BYTES:
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # of brackets within brackets
            continue
        if isinstance(value, dict):
            # else it is something else, such as name to number
            numbered = all(str(key).isdecimal() and len(str(key)) < 10 for key in value)
            return [str(v) for _, v in sorted(value.items(), key=lambda item: int(item[0]))] if numbered else None
        if isinstance(value, list | tuple):
            return [str(v) for v in value]
    lines = [line for line in text.splitlines() if line.strip()]
    return lines if len(lines) > 1 else None


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load ``model.path``; raises as :class:`OnnxModel`."""
    path = model_file(cfg)
    module = OnnxModel(path, threads, cfg.output)
    facts: dict[str, Any] = {"origin": str(path), "sha256": file_hash(path, "sha256"), "parameters": None}
    beside = companion_hashes(path)
    if beside:
        facts["files"] = beside
    return LoadedModel(
        module,
        "pretrained",
        **statistics(cfg),
        class_names=names_of(cfg, module.class_names),
        channels=module.channels,
        fixed_size=module.fixed_size,
        fixed_batch=module.fixed_batch,
        side_limits=module.side_limits,
        notes=module.notes,
        facts=facts,
    )
