"""What callers from Python give: models, numbers, devices, options; as overrides of the command line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ade_harness.config.arguments import known_keys
from ade_harness.config.files import choices
from ade_harness.config.kinds import KINDS
from ade_harness.config.overrides import as_override_value
from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.files.documents import read_json
from ade_harness.files.reading import expanded

Model = nn.Module | str | Path | Callable[[npt.NDArray[np.uint8]], Any]

_FILES = {suffix: name for name, kind in KINDS.items() for suffix in kind.suffixes}


_OPTION = re.compile(
    r"(?<![\w.'/])((?:dataset|inference|metrics|model|runtime)(?:\.\w+)+|(?:dataset|inference|model)(?==))"
)
"""What may be an option in a message, as the command line spells it."""
_SPELT = {
    "dataset": "dataset=", "dataset.root": "root=", "dataset.limit": "limit=", "inference": "protocol=",
    "model": "the first argument", "model.checkpoint": "checkpoint=", "runtime.devices": "devices=",
    "runtime.workers": "workers=", "runtime.accelerator": "device=",
}  # fmt: skip
"""Options that are arguments from Python."""


@contextmanager
def spelt_for_python() -> Iterator[None]:
    """Add to an error that names an option of the command line how it is given from Python."""
    try:
        yield
    except HarnessError as error:
        text = str(error)
        known = {*known_keys(), "dataset", "inference", "model"}
        found = [key for key in dict.fromkeys(_OPTION.findall(text)) if key in known]
        if found and "options" not in text and "From Python" not in text:
            names = (_SPELT.get(key, f"options={{'{key}': ...}}") for key in found)
            error.args = (f"{text} (From Python: {', '.join(list(dict.fromkeys(names))[:3])}.)",)
        raise


def whole_number(name: str, value: Any, least: int) -> None:
    """Raise HarnessError unless an argument is a whole number of at least `least`."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise HarnessError(f"{name}={value!r}: expected a whole number from {least} up.")


def place_of(asked: Any, here: bool = True) -> torch.device:
    """Return a device; raises HarnessError for what is none, or, if it is to be used `here`, is not there."""
    try:
        device = torch.device(asked)
        if here:
            torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        reason = "" if len(reason) > 120 else f" ({reason})"  # torch lists every backend that it could have
        raise HarnessError(f"device={asked!r}: no such device here{reason}. Expected {', '.join(there)}.") from error
    if device.type == "meta":
        raise HarnessError(f"device={asked!r}: unsupported device; use cpu or cuda:0.")
    return device


def plain_name(argument: str, value: Any) -> None:
    """Raise HarnessError unless an argument is the name of a choice, or None."""
    if value is None or (isinstance(value, str) and re.fullmatch(r"[\w./-]+", value)):
        return
    raise HarnessError(f"{argument}={value!r}: expected a name, such as {_EXAMPLES[argument]!r}.")


_MAPPINGS = ("model.kwargs", "model.architecture", "runtime.slurm")
"""Options whose values are mappings of any keys."""
_EXAMPLES = {"dataset": "ade20k", "protocol": "mmseg_slide_512"}


def refuse_twice(given: Mapping[str, Any], options: Mapping[str, Any] | None) -> None:
    """Raise HarnessError for an option that is given as an argument too."""
    for key, value in given.items():
        if value is not None and key in (options or {}):
            raise HarnessError(f"options: {key} is given as an argument too. Leave one of them out.")


_ARGUMENTS = {
    "runtime.devices": "devices=",
    "runtime.accelerator": "device=",
    "runtime.workers": "workers=",
    "run.dir": "run_dir=",
}
"""What is an argument from Python, and has no effect otherwise."""


_IN_MEMORY_KEYS = ("name", "input", "class_map", "class_names", "label", "published", "about", "parity")
"""What `model.` says of a network in memory: what its input and its channels mean, and what is shown beside it."""


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HERE = ("runtime.kernels", "runtime.seed")
_OF_RUNS = ("run.label_maps",)
"""Options about ranks, and about run directories, that an evaluation in the caller's process has too."""


def is_tracked(options: Mapping[str, Any] | None) -> bool:
    """Whether options ask for W&B."""
    given = options if isinstance(options, Mapping) else {}
    keys = [str(key) for key in given]
    if "none" in (given.get("tracking"), given.get("tracking.kind")):
        return False
    return any(key.partition(".")[0] == "tracking" for key in keys)


def option_overrides(
    options: Mapping[str, Any] | None, memory: bool, runs: bool = False, function: bool = False, here: bool = True
) -> list[str]:
    """Return options by dotted keys as overrides.

    Args:
        options: dotted keys and values; None: none.
        memory: whether the network is in memory, so that nothing says how to make it.
        runs: whether a run directory may be written, which W&B may show.
        function: whether it is a function of an image to labels, to which nothing of a network applies.
        here: whether it is evaluated in this process, without ranks.

    Raises:
        HarnessError: they are no mapping, name what has an argument of its own, or would have no effect.
    """
    if not isinstance(options or {}, Mapping):
        raise HarnessError(f"options={options!r}: expected a mapping from dotted keys to values.")
    found = []
    for key, value in (options or {}).items():
        if not isinstance(key, str):
            raise HarnessError(f"options: {key!r} is no key: expected texts such as 'inference.tta.flip'.")
        if key in _ARGUMENTS:
            raise HarnessError(f"options: {key} is an argument from Python: {_ARGUMENTS[key]}.")
        group, _, field = str(key).partition(".")
        if isinstance(value, Mapping) and value and not key.startswith(_MAPPINGS):
            inner = next(iter(value))
            raise HarnessError(
                f"options: {key} is given a mapping: write one dotted key for each value, such as '{key}.{inner}'."
            )
        if group in ("hydra", "probe"):
            raise HarnessError(f"options: {key} has no effect: it is for the commands of the command line.")
        if group == "tracking" and not runs and value != "none":
            raise HarnessError(f"options: {key} has no effect: there is no run directory that W&B could show.")
        if memory and group == "model" and field.partition(".")[0] not in _IN_MEMORY_KEYS:
            raise HarnessError(
                f"options: {key} has no effect: the model is in memory. Its options are"
                f" {', '.join(f'model.{name}' for name in _IN_MEMORY_KEYS)}."
            )
        if group == "run" and not runs:
            raise HarnessError(f"options: {key} has no effect: there is no run directory.")
        if here and group in ("runtime", "run") and not key.startswith((*_HERE, *_OF_RUNS)):
            raise HarnessError(
                f"options: {key} has no effect: the evaluation runs in this process, without ranks, loader processes or"
                " restarts. Set threads with torch.set_num_threads, or use devices=2 or more."
            )
        if function and key.startswith(("model.input", "model.class_map", "model.class_names", "inference")):
            raise HarnessError(f"options: {key} has no effect: the model is a function of an image to labels.")
        found.append(f"{key}={as_override_value(plain(value))}")
    return found


def plain(value: Any) -> Any:
    """Return paths as texts, and numbers and arrays of NumPy and torch as Python's."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def model_overrides(model: Model, checkpoint: str | Path | None) -> list[str]:
    """Return the overrides that choose a model.

    Raises:
        HarnessError: a text that is neither a system nor a file, or something that is no model.
    """
    overrides = _by_name(model) if isinstance(model, str | Path) else _of_object(model)
    if checkpoint is not None and not isinstance(checkpoint, str | Path):
        raise HarnessError(
            f"checkpoint is a {type(checkpoint).__name__}, expected the path of a file. A state_dict goes into its"
            " network, net.load_state_dict(...), and the network is given."
        )
    if checkpoint is not None:
        if in_memory(model):
            raise HarnessError("checkpoint: load it into the network before: net.load_state_dict(...).")
        overrides.append(f"model.checkpoint={as_override_value(str(checkpoint))}")
    return overrides


def _by_name(model: str | Path) -> list[str]:
    """Return the overrides of a system's name, or of the path of a file or folder."""
    if not str(model).strip():
        raise HarnessError("model is an empty text, expected the name of a system, a path, or a network.")
    text, path = str(model), expanded(model)
    names = choices("model")
    if text in names:
        return [f"model={text}"]
    if path.is_dir():
        return [f"model={_kind_of_folder(path)}", f"model.id={as_override_value(str(path))}"]
    if path.suffix in _FILES and path.is_file():
        return [f"model={_FILES[path.suffix]}", f"model.path={as_override_value(str(path))}"]
    if path.is_file():
        raise HarnessError(
            f"{text!r}: looks like a weight file; also give its system: model='segformer_b0',"
            f" checkpoint={text!r}. Files that hold a network end in {', '.join(_FILES)}."
        )
    if path.suffix in _FILES:
        raise HarnessError(f"{text!r}: no such file.")
    if _is_timms(text):
        raise HarnessError(_no_head(text, f"{text!r} is a backbone of timm, which"))
    hub = f" A repository of the hub: model='hf', options={{'model.id': {text!r}}}."
    hub = hub if _HUB_ID.fullmatch(text) else ""
    raise HarnessError(
        f"{text!r}: no such system, file or folder.{did_you_mean(text, names)}{hub} Expected a name that"
        " `python -m ade_harness models` lists, an .onnx, TorchScript or .pt2 file, or a folder of"
        " transformers. A checkpoint goes with its system: model='segformer_b0', checkpoint=PATH."
    )


def _of_object(model: Any) -> list[str]:
    """Return the overrides that say what is in memory."""
    if isinstance(model, type) or not callable(model):
        raise HarnessError(
            f"model is a {type(model).__name__}"
            f"{f' ({model.__name__}): pass an object of it' if isinstance(model, type) else ''}; expected an nn.Module,"
            " the name of a system, a path (an ONNX graph goes as its .onnx file), or a function from an image to"
            " labels."
        )
    kind = type(getattr(model, "_orig_mod", model))  # of torch.compile's wrapper
    owner = getattr(model, "__self__", None)
    if isinstance(owner, nn.Module):
        raise HarnessError(
            f"model is a method of a {type(owner).__name__}: give the network itself. (A function gets an image as"
            " an array, and returns labels.)"
        )
    target = as_override_value(f"{kind.__module__}.{kind.__qualname__}")
    return [
        "model=custom", f"model._target_={target}", f"model.label={as_override_value(str(_called(model, kind)))}",
    ]  # fmt: skip


def _kind_of_folder(folder: Path) -> str:
    """Return "smp" for a folder that segmentation-models-pytorch has saved, "hf" for any other."""
    try:
        saved = read_json(folder / "config.json")
    except HarnessError:
        return "hf"
    of_smp = isinstance(saved, dict) and "model_type" not in saved and "encoder_name" in saved
    return "smp" if of_smp else "hf"


def _is_timms(name: str) -> bool:
    """Whether timm knows an architecture of that name."""
    import timm

    return bool(re.fullmatch(r"[\w.-]+", name)) and timm.is_model(name.partition(".")[0])


def _called(model: Any, kind: type) -> str:
    """Return what a model in memory is called: of wrappers, what they wrap."""
    if isinstance(model, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
        return _called(model.module, type(model.module))
    if isinstance(model, AveragedModel):
        return f"{_called(model.module, type(model.module))} (average)"
    if isinstance(model, torch.jit.ScriptModule):
        return str(getattr(model, "original_name", kind.__name__))
    return str(getattr(model, "__qualname__", kind.__qualname__)).rpartition("<locals>.")[2]


def as_network(model: Any) -> Any:
    """Return what is to be evaluated of a model in memory.

    A program of ``torch.export`` becomes a module that runs it. DistributedDataParallel and DataParallel give the
    network that they wrap: the former's forward waits for all ranks, of which perhaps one alone evaluates.

    Raises:
        HarnessError: the program takes something else than float32 images; or the network's weights are sharded over
            ranks.
    """
    if isinstance(model, nn.parallel.DataParallel | nn.parallel.DistributedDataParallel):
        return as_network(model.module)
    if isinstance(model, nn.Module):
        _refuse_sharded(model)
    exporting: Any = sys.modules.get("torch.export")  # what holds such a program has imported it
    if exporting is None or not isinstance(model, exporting.ExportedProgram):
        return model
    from ade_harness.models.formats.exported import ExportedModel  # imports what is for programs alone

    return ExportedModel(model)


def _refuse_sharded(network: nn.Module) -> None:
    """Raise HarnessError for a network whose weights FSDP or tensor parallelism has spread over ranks."""
    kinds = {type(p).__name__ for p in network.parameters()} | {type(module).__name__ for module in network.modules()}
    found = next((kind for kind in ("DTensor", "FullyShardedDataParallel") if kind in kinds), None)
    if found is not None:
        raise HarnessError(
            f"the network's weights are sharded over ranks ({found}): no rank can run it alone. Gather them, such as by"
            " torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True, load them into a"
            " network that is not sharded, and give that."
        )


@contextmanager
def backbone_named(model: Any) -> Iterator[None]:
    """Add to an error of a network that timm made why it may have come: such networks classify, or give features."""
    inner = getattr(model, "_orig_mod", model)  # of torch.compile
    try:
        yield
    except HarnessError as error:
        if not type(inner).__module__.startswith("timm."):
            raise
        config = getattr(inner, "pretrained_cfg", None)
        name = config.get("architecture") if isinstance(config, Mapping) else None
        raise HarnessError(
            f"{error} {_no_head(name or 'NAME', f'A {type(inner).__name__} as timm makes it')}"
        ) from error


def _no_head(name: str, what: str) -> str:
    return (
        f"{what} has no segmentation head. `python -m ade_harness probe model=timm model.backbone={name}` trains a"
        " linear one, and prints the command that evaluates it; docs/timm.md."
    )


def in_memory(model: Model) -> bool:
    """Whether it is an object of this process: a network or a function."""
    return not isinstance(model, str | Path)
