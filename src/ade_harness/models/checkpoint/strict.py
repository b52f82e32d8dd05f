"""Load weights strictly: no key left over, none left random unless that is allowed and reported."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor, nn

from ade_harness.errors import HarnessError


@dataclass(frozen=True)
class Strictness:
    """How strictly weights are loaded, and how messages call them."""

    origin: str = "state_dict"
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    headless: bool = False
    """A linear head may be missing: it is to be trained."""
    of_file: Callable[[str], str] | None = None
    """The file's own name of a weight, from the one it has here; None: they are the same."""

    prefix: str = ""
    """What was taken from the beginning of the file's own names."""

    def both_names(self, key: str) -> str:
        """Return a weight's name, with the file's own beside it where that is another."""
        own = key if self.of_file is None else self.of_file(key)
        return key if own == key else f"{key} (in the file {own})"


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], keys: Strictness) -> None:
    """Load every key.

    The module takes the tensors of `state` for its own (which are pages of the file, read when they are needed), so
    there is no second copy of them in memory.

    Raises:
        HarnessError: a missing, unexpected or differently shaped key that no pattern allows.
    """
    own = module.state_dict()
    shapes = [
        f"{keys.both_names(key)} {list(state[key].shape)} (the model has {list(own[key].shape)})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    require_all_keys(keys, missing, unexpected, shapes, len(state))
    for key, value in state.items():
        whole = not (value.is_floating_point() or value.is_complex()) or value.is_quantized
        if key in own and own[key].is_floating_point() and (whole or value.is_complex()):
            raise HarnessError(
                f"{keys.origin}: {keys.both_names(key)} is {str(value.dtype).removeprefix('torch.')}, and the model's"
                " weights are floating-point numbers. Quantised weights need their scales: save them dequantised."
            )
    taken = {k: v.to(own[k].dtype) for k, v in state.items() if k in own}  # no copy where the dtype is the same
    module.load_state_dict(taken, strict=False, assign=True)


@dataclass
class LeftOver:
    """What was allowed not to fit."""

    random: list[str] = field(default_factory=list)
    """The model's keys that no file has filled."""
    unused: list[str] = field(default_factory=list)
    """Keys of files that the model does not have."""


_left_over: ContextVar[LeftOver | None] = ContextVar("left_over", default=None)


@contextmanager
def noting_left_over() -> Iterator[LeftOver]:
    """Collect what is left over by all that is loaded in this context."""
    found = LeftOver()
    token = _left_over.set(found)
    try:
        yield found
    finally:
        _left_over.reset(token)


_TAKES_NO_PART = re.compile(
    r"(^|\.)(aux|auxiliary)[^.]*\.|(^|\.)(criterion|loss|ema|teacher)[^.]*\."
    r"|(^|[._])(num_batches_tracked|relative_position_index|relative_coords_table|position_ids|attn_mask)$"
)
"""Names of what trainings and buffers leave in files, and no forward of an evaluation uses."""


def require_all_keys(
    keys: Strictness,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Sequence[str],
    of_file: int | None = None,
) -> None:
    """Raise HarnessError unless every key was used; patterns are shell style (``auxiliary_head.*``).

    Args:
        keys: how messages call the file and its keys, and what is allowed: what is left over is collected by
            :func:`noting_left_over`.
        missing: keys of the model that the file does not have.
        unexpected: keys of the file that the model does not have.
        shapes: keys of both that differ in shape.
        of_file: number of the file's keys, if it is known: of less than half a file nothing can be concluded,
            whatever is allowed.
    """
    missing, unexpected = list(missing), list(unexpected)
    unused = len(unexpected) + len(shapes)
    wrong_missing = _not_allowed(missing, keys.allow_missing)
    wrong_unexpected = _not_allowed(unexpected, keys.allow_unexpected)
    if wrong_missing or wrong_unexpected or shapes:
        parts = [
            f"{len(named)} {what}: {', '.join(named[:6])}{', ...' if len(named) > 6 else ''}"
            for what, named in (
                ("missing", [keys.both_names(key) for key in wrong_missing]),
                ("unexpected", [keys.both_names(key) for key in wrong_unexpected]),
                ("of another shape", list(shapes)),
            )
            if named
        ]
        advice = "Choose the model that the file was made for."
        prefixes = [keys.prefix + found for found in _common_prefixes(missing, unexpected)]
        if len(prefixes) == 1:
            advice = f"Its names are the model's below {prefixes[0]!r}: model.checkpoint_prefix={prefixes[0]}"
        elif prefixes:
            advice = (
                f"It holds several networks that fit, below {', '.join(map(repr, prefixes))}: choose one, as in"
                f" model.checkpoint_prefix={prefixes[0]}"
            )
        # of anything else, such as the layers of a deeper network, the score would be another network's
        if not wrong_missing and not shapes and all(_TAKES_NO_PART.search(key) for key in wrong_unexpected):
            advice += " Keys that the forward does not use can be named in model.allow_unexpected_keys."
        raise HarnessError(f"{keys.origin}: these weights do not fit the model. {'; '.join(parts)}. {advice}")
    if of_file is not None and 2 * (of_file - unused) < of_file:
        raise HarnessError(
            f"{keys.origin}: {of_file - unused} of the file's {of_file} keys are the model's, such as it has"
            f" {', '.join(sorted(unexpected)[:3])}. That is another model's file, whatever model.allow_unexpected_keys"
            " allows."
        )
    collected = _left_over.get()
    if collected is not None:
        collected.random += sorted(missing)
        collected.unused += sorted(unexpected)


def _common_prefixes(missing: Sequence[str], unexpected: Sequence[str]) -> list[str]:
    """Return the beginnings below which the file's names that are left over hold all missing ones, in their order."""
    fitting: list[str] = []
    for name in sorted(missing)[:1]:
        for prefix in sorted(key.removesuffix(name) for key in unexpected if key.endswith(f".{name}")):
            if {key.removeprefix(prefix) for key in unexpected if key.startswith(prefix)} >= set(missing):
                fitting.append(prefix)
    return fitting


def _not_allowed(keys: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return sorted(k for k in keys if not any(fnmatch.fnmatchcase(k, p) for p in patterns))
