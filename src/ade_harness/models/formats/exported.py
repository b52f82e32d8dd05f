"""Programs of torch.export (.pt2 files)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.export.passes import move_to_device_pass
from torch.utils._pytree import tree_unflatten

from ade_harness.config.model import ModelConfig
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.files.archive import check_expansion
from ade_harness.files.fetch import file_hash
from ade_harness.files.logs import SILENT, log_level
from ade_harness.models.checkpoint.sources import model_file, not_that
from ade_harness.models.loaded import UNBOUNDED, LoadedModel, names_of, require_channels_first, statistics


class ExportedModel(nn.Module):
    """Runs a program, on any device: constants in its graph move with it.

    Args:
        program: with one input, float32 [N, 3, H, W], by place or by name (``pixel_values=``).
        name: leads messages.

    Raises:
        HarnessError: it takes something else than float32 images.
    """

    def __init__(self, program: torch.export.ExportedProgram, name: str = "the program") -> None:
        super().__init__()
        shape = _image_shape(program, name)
        fixed = [size if isinstance(size, int) else None for size in shape]
        height, width = fixed[2:]
        self.fixed_size = (height, width) if height is not None and width is not None else None
        """(height, width) if it takes no other."""
        self.fixed_batch = fixed[0]
        """Images per call if it takes no other number."""
        self.side_limits = _side_limits(program, shape)
        """Least and greatest height, and width; None if they are not known, or fixed."""
        vary = not any(isinstance(side, int) for side in shape[2:])
        self.squares = bool(vary and shape[2].node.expr == shape[3].node.expr)
        """Whether it takes squares alone: height and width were exported as one size."""
        self.graph: nn.Module | None = program.module()
        self._program = program
        self._call = _arguments_of(program)
        self._device = next((tensor.device for tensor in program.state_dict.values()), torch.device("cpu"))

    def train(self, mode: bool = True) -> ExportedModel:
        """Do nothing: a program was exported in one mode, and refuses to be put into another."""
        self.training = mode
        return self

    def forward(self, images: Tensor) -> Any:
        """Return what the program returns."""
        if images.device != self._device:
            self.graph = None  # else its weights would be on the device twice
            self.graph = move_to_device_pass(self._program, str(images.device)).module()
            self._device = images.device
        assert self.graph is not None
        arguments, keywords = self._call(images)
        return self.graph(*arguments, **keywords)


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Load ``model.path``.

    Raises:
        HarnessError: it is no exported program, or takes something else than float32 images.
    """
    path = model_file(cfg)
    try:
        with zipfile.ZipFile(path) as archive:  # what is none is refused here: torch would leave it open
            check_expansion(archive.infolist(), path)
        with log_level("torch.export", SILENT):
            program = torch.export.load(str(path))
    except HarnessError:
        raise
    except Exception as error:  # torch's reader of a damaged file fails in any way
        what = "a program of torch.export"
        raise not_that(path, what, error, "TorchScript goes with model=torchscript, a state_dict") from error
    module = ExportedModel(program, str(path))
    facts = {"origin": str(path), "sha256": file_hash(path, "sha256")}
    return LoadedModel(
        module, "pretrained", **statistics(cfg), class_names=names_of(cfg), facts=facts, **sizes_of(module)
    )


def sizes_of(module: nn.Module) -> dict[str, Any]:
    """Return the inputs that a program takes as arguments of :class:`LoadedModel`; {} for other modules."""
    if not isinstance(module, ExportedModel):
        return {}
    return {name: getattr(module, name) for name in ("fixed_size", "fixed_batch", "side_limits", "squares")}


_Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def _arguments_of(program: torch.export.ExportedProgram) -> Callable[[Tensor], _Arguments]:
    """Return what makes a program's arguments of images, by place or by name, beside constants."""
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]

    def arguments(images: Tensor) -> _Arguments:
        flat = [spec.arg.value if isinstance(spec.arg, ConstantArgument) else images for spec in specs]
        found: _Arguments = tree_unflatten(flat, program.call_spec.in_spec)
        return found

    return arguments


def _side_limits(program: torch.export.ExportedProgram, shape: tuple[Any, ...]) -> Any:
    """Return least and greatest height, and width, of an input; None if they are not known, or fixed."""
    found = []
    if all(isinstance(side, int) for side in shape[2:]):
        return None  # `fixed_size` says it
    for side in shape[2:]:
        if isinstance(side, int):
            found.append((side, side))
            continue
        known = program.range_constraints.get(side.node.expr)
        if known is None:
            return None
        low, high = (max(0, min(UNBOUNDED, bound)) for bound in (known.lower, known.upper))  # may be infinite
        found.append((int(low), int(high)))
    return tuple(found)


def _image_shape(program: torch.export.ExportedProgram, name: str) -> tuple[Any, ...]:
    """Return the shape of a program's only input; sizes that may vary are no integers."""
    names = program.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    described = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {[str(size) for size in t.shape]}" for t in tensors)
    if (
        len(tensors) != 1
        or any(isinstance(v, torch.SymInt) for v in inputs)
        or tensors[0].ndim != 4
        or tensors[0].dtype != torch.float32
    ):
        raise HarnessError(
            f"{name}: expected one input, float32 [N, 3, H, W]; the program has {described or 'no tensor'}. Export the"
            " network in float32, alone, without its preprocessing."
        )
    require_channels_first(tuple(tensors[0].shape), name)
    return tuple(tensors[0].shape)
