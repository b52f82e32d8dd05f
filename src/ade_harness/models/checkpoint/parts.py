"""Which part of a trainer's file is the network: wrappers, averaged weights, prefixes of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ade_harness.config.model import CheckpointWeights
from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.files import StateDict, read_content

Known = Callable[[StateDict], int]
"""How many names of a state_dict are a network's."""


@dataclass(frozen=True)
class Choice:
    """What the user states about a file; what is not stated is found out, or asked."""

    prefix: str | None = None
    """``model.checkpoint_prefix``."""
    weights: CheckpointWeights | None = None
    """``model.checkpoint_weights``."""
    prefix_option: str = "model.checkpoint_prefix="
    weights_option: str = "model.checkpoint_weights="
    """How the user's command spells the two, for messages."""


@dataclass(frozen=True)
class Part:
    """A state_dict, and which part of its file it is."""

    state: StateDict
    where: tuple[str, ...] = ()
    """Such as ``state_dict``, ``names that begin with 'module.'``; empty if it is the whole file."""
    beside: tuple[str, ...] = ()
    """What else the file holds, and how it is chosen."""
    averaged: bool = False
    """Whether its names say that the weights are an average over the training."""
    prefix: str = ""
    """What the file's own names have before those of `state`."""
    wrapped: Mapping[str, str] = field(default_factory=dict)
    """The file's own names where those of wrappers were taken out, by the others."""

    def name_in_file(self, name: str) -> str:
        """Return the file's own name of a weight."""
        return self.wrapped.get(self.prefix + name, self.prefix + name)

    @property
    def place(self) -> str:
        """Which part of the file it is, without what is said of others; empty for a whole file."""
        return ", ".join(self.where)

    def __str__(self) -> str:
        """Return what a run's notes and manifest say of it; empty for a whole file."""
        return "; ".join([", ".join(self.where), *self.beside] if self.where else self.beside)


_PLAIN = ("state_dict", "model", "model_state_dict", "net", "network", "module", "params", "weights")
"""Where trainers put the weights, the usual first."""
_AVERAGED = re.compile(r"(^|[^a-z])(ema|swa|avg|average|averaged|shadow|polyak)([^a-z]|$)")
"""Words in the names of averaged weights: ``ema_state_dict``, ``modelEMA``, ``state_dict_ema``, ``average_model``."""
_SIDES = ("student", "teacher")
"""Networks of one training, beside each other; only the user can say which is meant, unless one alone fits."""
_STEPS = ("n_averaged", "steps")
"""Counters among averaged weights: torch's AveragedModel, mmengine."""
_NO_NETWORK = re.compile(r"optim|sched|scaler|loss|criterion|(^|[^a-z])(rng|meters?|metrics?)([^a-z]|$)")
"""Words in the names of what trainers keep beside networks, with tensors in it; "parameters" is none of them."""
_PREFIXES = (
    "module.",
    "model.",
    "net.",
    "network.",
    "_orig_mod.",
    "_forward_module.",
    "online_model.",
    "student.",
    "teacher.",
)
_LIGHTNINGS_TRAINED = "current_model_state"
"""Where Lightning's WeightAveraging puts what was trained: ``state_dict`` holds the average."""
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing add to names where they wrap a part of a network."""
_EXTRA = "_extra_state"
"""What modules add to a state_dict by ``get_extra_state``: any object, and no weight."""
_MAX_NESTED = 3
_MAX_WRAPPERS = 8


def read_part(path: Path, choice: Choice | None = None, known: Known | None = None) -> Part:
    """Read the weights of a file.

    Args:
        path: of the file.
        choice: what the user says.
        known: how many names of a state_dict are the network's; None takes names as they are, or without the
            ``module.`` that all have.

    Raises:
        HarnessError: the file is damaged or holds pickled code; it holds no state_dict, or several that could be meant;
            or not what `choice` names.
    """
    choice = choice or Choice()
    part = take_part(read_content(path), path, choice, known)
    for name, value in part.state.items():
        kind = _no_weight(value)
        if kind is not None:
            raise HarnessError(
                f"{path}: {part.name_in_file(name)} is {kind}. Weights are dense floating-point numbers: save them so"
                " (.to_dense(), .dequantize(), or multiplied by their scales)."
            )
    return part


def _no_weight(value: Tensor) -> str | None:
    """Return what a tensor is that no network here can take as a weight; None for others."""
    if value.is_quantized:
        return "quantised"
    if value.is_nested or value.layout != torch.strided:
        return "nested" if value.is_nested else f"sparse ({str(value.layout).removeprefix('torch.')})"
    small = value.is_floating_point() and value.element_size() < 2
    return f"of 8 bits ({str(value.dtype).removeprefix('torch.')})" if small else None


def take_part(content: Any, path: Path, choice: Choice, known: Known | None = None) -> Part:
    """Return the network's weights in what a file holds; as :func:`read_part`, whose errors it raises."""
    part = _without_wrappers(_unwrapped(content, path, choice))
    if choice.prefix is not None:
        part = _below(part, choice.prefix, path, choice)
    elif known is not None:
        part = _recognised(part, path, choice, known)
    elif _all_begin(part.state, "module."):
        part = _below(part, "module.", path, choice)
    if choice.weights == "ema" and not part.averaged:
        found = f", only {part.where[0]}" if part.where else ""
        raise HarnessError(
            f"{choice.weights_option}ema: no averaged weights were found in {path}{found}. Leave it out; those that a"
            " callback keeps for itself are not read."
        )
    return part


def _is_state(value: Any) -> bool:
    """Whether most values are tensors and the others plain: extra states, and counters that trainers put beside."""
    if not isinstance(value, Mapping):
        return False
    others = [(k, v) for k, v in value.items() if not isinstance(v, Tensor)]
    plain = all(str(k).endswith(_EXTRA) or v is None or isinstance(v, bool | int | float | str) for k, v in others)
    return plain and 2 * len(others) <= len(value) and len(value) > len(others)


def _unwrapped(content: Any, path: Path, choice: Choice) -> Part:
    """Open the mappings that trainers put around a state_dict."""
    where: list[str] = []
    beside: list[str] = []
    is_averaged = False
    while not _is_state(content):
        if not isinstance(content, Mapping) or len(where) == _MAX_WRAPPERS:  # a pickle may hold itself
            raise HarnessError(f"{path}: holds no state_dict (a mapping from names to tensors).")
        inside = _networks(content)
        if content and all("optim" in str(name).lower() for name in inside or content):
            raise HarnessError(
                f"{path}: holds no weights of a network, only {', '.join(map(str, list(content)[:5]))}. Give the file"
                " that the trainer wrote beside it."
            )
        sides = {f"{side}.": inside.pop(side) for side in _SIDES if side in inside}
        averaged = [name for name in inside if _is_averaged(name)]
        plain = sorted((name for name in inside if name not in averaged), key=_usual_first)
        swapped = _is_mmengines(content) and bool(averaged) and bool(plain)
        if swapped:
            averaged, plain = plain[:1], averaged
        elif _LIGHTNINGS_TRAINED in plain and "state_dict" in plain:
            averaged, plain, swapped = ["state_dict"], [_LIGHTNINGS_TRAINED], True
        if sides and not plain and not averaged:
            content = {prefix + k: v for prefix, state in sides.items() for k, v in _flat(state).items()}
            break
        taken, other, note = _which(plain, averaged, swapped, path, choice)
        is_averaged = is_averaged or taken in averaged
        where.append(taken)
        beside += note
        rest = [n for n in (*plain, *averaged, *(side[:-1] for side in sides)) if n not in (taken, other)]
        beside += [f"{', '.join(rest)} beside it: not read"] if rest else []
        content = inside[taken]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    is_averaged = is_averaged or any(name == _STEPS[0] and _counts_steps(name, v) for name, v in tensors.items())
    state = {name: v for name, v in tensors.items() if not _counts_steps(name, v)}
    return Part(state, tuple(where), tuple(beside), is_averaged)


def _networks(content: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the entries with tensors, without what is no network: an optimizer's moments, a loss's centre."""
    inside = {str(k): v for k, v in content.items() if isinstance(v, Mapping) and _state_inside(v) is not None}
    inside = {name: value for name, value in inside.items() if "param_groups" not in value}  # any optimizer of torch's
    return {name: value for name, value in inside.items() if not _NO_NETWORK.search(name.lower())} or inside


def _without_wrappers(part: Part) -> Part:
    """Take out what wrappers of a network's parts add to names, and the second copy of mmcv's EMAHook.

    That hook keeps buffers such as ``ema_backbone_conv1_weight``, and exchanges them with the weights after each epoch
    of a runner that counts epochs: which of the two are averaged, the file does not say.
    """
    plain: dict[str, str] = {}
    for name in part.state:
        start, rest = 0, name
        while prefix := next((p for p in _PREFIXES if rest.startswith(p)), None):  # noted by their own names
            start, rest = start + len(prefix), rest[len(prefix) :]
        plain[name] = name[:start] + _WRAPPERS.sub("", rest)
    copies = {f"ema_{name.replace('.', '_')}" for name in part.state}
    state = {plain[name]: value for name, value in part.state.items() if name not in copies}
    wrapped = {ours: name for name, ours in plain.items() if ours != name}
    beside = list(part.beside)
    if wrapped:
        beside.append("names without those of torch.compile's, FSDP's or checkpointing's wrappers")
    if len(state) < len(part.state):
        beside.append(f"{len(part.state) - len(state)} weights of mmcv's EMAHook (ema_...) were not read")
    return replace(part, state=state, wrapped=wrapped, beside=tuple(beside))


def _state_inside(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the first state_dict in there, the outermost ones first; a pickle may hold itself."""
    seen: set[int] = set()
    left = [value]
    for one in left:  # which grows
        if id(one) in seen:  # two names of one mapping, again in each of its own: 2^n ways to it
            continue
        if _is_state(one):
            return one
        seen.add(id(one))
        left += [v for v in one.values() if isinstance(v, Mapping)]
    return None


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """Open the wrappers that may be around a side's state_dict."""
    return dict(_state_inside(value) or {})


def _usual_first(name: str) -> tuple[int, str]:
    return (_PLAIN.index(name) if name in _PLAIN else len(_PLAIN), name)


def _is_mmengines(content: Mapping[str, Any]) -> bool:
    """Whether mmengine wrote it, whose EMAHook puts the averaged weights in ``state_dict`` and the others beside."""
    meta = content.get("meta")
    return "message_hub" in content or (isinstance(meta, Mapping) and "mmengine_version" in meta)


def _counts_steps(name: str, value: Tensor) -> bool:
    return name in _STEPS and value.numel() == 1


def _which(
    plain: list[str], averaged: list[str], swapped: bool, path: Path, choice: Choice
) -> tuple[str, str | None, list[str]]:
    """Return the entry to take, the other one that could have been meant, and a note on it."""
    if not plain and not averaged:
        raise HarnessError(f"{path}: holds no state_dict (a mapping from names to tensors).")
    if len(plain) > 1 and plain[0] not in _PLAIN:
        raise HarnessError(
            f"{path}: holds several networks ({', '.join(plain)}). Write the one that is meant to a file of its own."
        )
    asked = choice.weights
    if asked == "model" and not plain:
        raise HarnessError(f"{choice.weights_option}model: {path} holds averaged weights alone: {averaged[0]}.")
    # mmengine's own loader, and everybody's after it, takes state_dict: the averaged ones
    takes_averaged = not plain or (bool(averaged) and (asked == "ema" or (asked is None and swapped)))
    taken = averaged[0] if takes_averaged else plain[0]
    if not (plain and averaged):
        return taken, None, []
    other, name = ("model", plain[0]) if takes_averaged else ("ema", averaged[0])
    what = "the averaged weights" if takes_averaged else "the weights that were trained"
    kind = "the averaged ones" if other == "ema" else "those that were trained"
    return taken, name, [f"{what}; {kind} are in {name}: {choice.weights_option}{other}"]


def _all_begin(state: StateDict, prefix: str) -> bool:
    return bool(state) and all(name.startswith(prefix) for name in state)


def _stripped(state: StateDict, prefix: str) -> StateDict:
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and not _counts_steps(name.removeprefix(prefix), value)
    }


def _below(part: Part, prefix: str, path: Path, choice: Choice) -> Part:
    """Return the weights whose names begin with `prefix`, without it."""
    if not prefix.endswith(".") and any(name.startswith(f"{prefix}.") for name in part.state):
        prefix = f"{prefix}."
    state = _stripped(part.state, prefix)
    if not state:
        raise HarnessError(
            f"{choice.prefix_option}{prefix}: no name in {path} begins with it; they are such as"
            f" {', '.join(list(part.state)[:3])}."
        )
    rest = len(part.state) - len(state)
    others = (f"{rest} of {len(part.state)} weights have other names and were not read",) if rest else ()
    where = (*part.where, f"names that begin with {prefix!r}")
    averaged = part.averaged or _is_average(prefix)
    beside = (*part.beside, *others)
    return replace(part, state=state, where=where, beside=beside, averaged=averaged, prefix=part.prefix + prefix)


def _recognised(part: Part, path: Path, choice: Choice, known: Known) -> Part:
    """Return the weights below the one prefix that makes them the network's; as they are if none does.

    Raises:
        HarnessError: several prefixes do.
    """
    fitting = [prefix for prefix in _prefixes(part.state) if _mostly(_stripped(part.state, prefix), known)]
    fitting = [p for p in fitting if not any(p != above and p.startswith(above) for above in fitting)]  # the outermost
    averaged = [prefix for prefix in fitting if _is_average(prefix)]
    plain = [prefix for prefix in fitting if prefix not in averaged]
    unprefixed = {k: v for k, v in part.state.items() if not k.startswith(tuple(averaged))} if averaged else part.state
    if _mostly(unprefixed, known) and not (averaged and choice.weights == "ema"):
        beside = [f"the averaged weights begin with {p!r}: {choice.weights_option}ema" for p in averaged[:1]]
        return replace(part, state=unprefixed, beside=(*part.beside, *beside))
    plain += [""] if averaged and _mostly(unprefixed, known) else []
    chosen = (averaged or plain) if choice.weights == "ema" else (plain or averaged)
    if choice.weights == "model" and not plain and averaged:
        raise HarnessError(f"{choice.weights_option}model: {path} holds averaged weights alone: {averaged[0]}")
    if len(chosen) > 1:
        counts = ", ".join(f"{prefix} ({len(_stripped(part.state, prefix))})" for prefix in chosen)
        raise HarnessError(
            f"{path}: holds several networks that fit, by how their names begin: {counts}. Choose one with"
            f" {choice.prefix_option}{chosen[0]}"
        )
    if not chosen:
        return part
    found = _below(part, chosen[0], path, choice)
    if averaged and plain:
        other = "those that were trained: " if chosen[0] in averaged else "the averaged ones: "
        switch = choice.weights_option + ("model" if chosen[0] in averaged else "ema")
        found = replace(found, beside=(*found.beside, other + switch))
    return found


def _is_averaged(name: str) -> bool:
    """Whether a name's words, with underscores or capitals, say that it is an average."""
    return bool(_AVERAGED.search(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()))


def _is_average(prefix: str) -> bool:
    """Whether one of the names in a prefix is that of averaged weights, as in ``module.ema_model.``."""
    return any(_is_averaged(name) for name in prefix.split("."))


def _mostly(state: StateDict, known: Known) -> bool:
    return bool(state) and 2 * known(state) >= len(state)


def _prefixes(state: Iterable[str], above: str = "", depth: int = _MAX_NESTED) -> list[str]:
    """Return the prefixes that names have, and those below each: ``module.``, ``module.student.``."""
    names = list(state)
    firsts = dict.fromkeys(f"{name.partition('.')[0]}." for name in names if "." in name)
    found = [p for p in _PREFIXES if p in firsts] + [p for p in firsts if _is_averaged(p[:-1])]
    below = {p: [name.removeprefix(p) for name in names if name.startswith(p)] for p in found}
    deeper = [prefix for p in found if depth > 1 for prefix in _prefixes(below[p], above + p, depth - 1)]
    return [above + p for p in found] + deeper
