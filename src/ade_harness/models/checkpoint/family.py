"""What a family of systems is: tables of weight names, and two functions that read and build an architecture."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.data.labels import NUM_CLASSES, usual_dataset
from ade_harness.errors import HarnessError, did_you_mean
from ade_harness.models.checkpoint.key_tables import Table, to_hub_names
from ade_harness.models.formats.transformers import load_into_transformers


@dataclass(frozen=True)
class Keys:
    """How strictly weights are loaded, and how messages call them."""

    origin: str = "state_dict"
    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    headless: bool = False
    """A linear head may be missing: it is to be trained."""


@dataclass(frozen=True)
class Family:
    """Systems of one architecture at any width and depth."""

    layouts: Mapping[str, Table]
    """Code base -> table from its names to those of the hub's files."""
    read: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    """The architecture, as far as shapes of a state_dict in the hub's names say it."""
    build: Callable[[dict[str, Any], Mapping[str, Tensor] | None, Keys], nn.Module]
    """The system, with these weights in the hub's names, or with random ones."""
    config: str = ""
    """The transformers configuration class whose fields an architecture has, if it has one."""
    extra: tuple[str, ...] = ()
    """Fields of our own."""
    unused: tuple[str, ...] = ()
    """Patterns of names in the hub's files that take no part in the forward."""
    classifier: str = "decode_head.classifier.weight"
    """The weight whose first dimension is the number of classes."""
    void: bool = False
    """Mask classification: there is one more class, "no object"."""
    at_mask_size: bool = False
    """Mask classification: queries are summed up at the masks' own size, as mmsegmentation's lineage does."""
    head: tuple[str, ...] = ()
    """What names of a head's own file begin with, if the frozen backbone is another file."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of what shapes do not say."""
    shapes_first: bool = False
    """What shapes say goes before a configuration, whose values are not certain."""
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """Applied to a state_dict before its names are looked up."""

    def hub_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a state_dict of any known code base."""
        return to_hub_names(self.prepare(state), self.layouts)[0]

    def used(self, hub: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out what takes no part in the forward."""
        return {k: v for k, v in hub.items() if not any(fnmatch.fnmatchcase(k, p) for p in self.unused)}

    def load(self, architecture: Mapping[str, Any], state: Mapping[str, Tensor] | None, keys: Keys) -> nn.Module:
        """Build the system; `architecture` goes before what the shapes of `state` say.

        Args:
            architecture: fields of the family; with a `state`, only those that shapes do not say are needed.
            state: weights in the names of any known code base; None draws random ones.
            keys: origin and allowed differences.

        Raises:
            HarnessError: keys or shapes do not fit, another number of classes, or an impossible architecture.
        """
        self._check_fields(architecture)
        hub = None if state is None else self.hub_names(state)
        keys = replace(keys, allow_missing=(*keys.allow_missing, "*num_batches_tracked"))  # evaluation never reads it
        read: dict[str, Any] = {}
        if hub is not None:
            self._check_classes(hub, keys)
            read = self._read(hub, keys, whole=bool(architecture))
        fields = {**self.defaults, **read, **architecture, **(read if self.shapes_first else {})}
        try:
            return self.build(fields, None if hub is None else self.used(hub), keys)
        except (IndexError, KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise HarnessError(
                f"model.architecture={fields}: makes no network ({type(error).__name__}: {str(error).splitlines()[0]})."
            ) from error

    def _check_fields(self, architecture: Mapping[str, Any]) -> None:
        known = {*self.extra}
        if self.config:
            import transformers

            known |= {n for n in vars(getattr(transformers, self.config)()) if not n.startswith("_")}
        for name in architecture:
            if name not in known and name not in _SAID_BY_SHAPES:
                raise HarnessError(
                    f"model.architecture.{name}: no such field.{did_you_mean(name, known)} Known: "
                    + ", ".join([*([f"those of {self.config}"] if self.config else []), *self.extra])
                    + "."
                )

    def _read(self, hub: Mapping[str, Tensor], keys: Keys, whole: bool) -> dict[str, Any]:
        try:
            return self.read(hub)
        except (KeyError, IndexError) as error:
            if whole:
                return {}  # the architecture is given: the strict loading that follows names what is missing
            found = f"it has {len(hub)} others, such as {', '.join(list(hub)[:3])}" if hub else "it is empty"
            raise HarnessError(f"{keys.origin}: {error} is missing; {found}. Is it of another system?") from error

    def _check_classes(self, hub: Mapping[str, Tensor], keys: Keys) -> None:
        weight = hub.get(self.classifier)
        classes = None if weight is None else weight.shape[0] - self.void
        if classes is not None and classes != NUM_CLASSES:
            raise HarnessError(
                f"{keys.origin}: a classifier of {classes} classes{_trained_on(classes)}, ADE20K has"
                f" {NUM_CLASSES}: this is a checkpoint of another data set."
            )


_SAID_BY_SHAPES = ("dim", "dims", "depth", "heads", "window", "img", "img_size", "head", "auxiliary", "layers")
"""Words of the official code that may be given to `from_official`, and that the shapes of weights say anyway."""


def _trained_on(classes: int) -> str:
    usual = usual_dataset(classes)
    return f" (usual for {usual})" if usual else ""


def add_delta(family: Family, delta: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights, in the hub's names, of a file that holds differences from a backbone's weights.

    Raises:
        HarnessError: the backbone's file lacks a weight, or has it in another shape.
    """
    whole, base = family.hub_names(delta), family.used(family.hub_names(backbone))
    known = {k: v for k, v in base.items() if k in whole}
    if not known:
        raise HarnessError(
            "model.backbone_checkpoint: no name of this file is in the model's. Is it the right backbone?"
        )
    for key, value in known.items():
        if value.shape != whole[key].shape:
            raise HarnessError(
                f"model.backbone_checkpoint: {key} is {list(value.shape)}, the model's {list(whole[key].shape)}."
                " Is it the backbone that the model was made from?"
            )
        whole[key] = whole[key] + value
    return whole


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest ``{N}`` in the names that begin with `pattern`; 0 if there is none."""
    expression = re.compile(re.escape(pattern).replace(r"\{N\}", r"(\d+)"))
    return max((int(found[1]) + 1 for found in map(expression.match, state) if found), default=0)


def load_hub_names(cls: Any, config: Any, state: Mapping[str, Tensor] | None, keys: Keys) -> nn.Module:
    """Build a transformers class with weights in the hub's names, or with random ones (on torch's default device)."""
    if state is None:
        network: nn.Module = cls(config).eval()
        return network
    return load_into_transformers(cls, config, state, keys.origin, keys.allow_missing, keys.allow_unexpected)


def quietly_random(family: Family, architecture: Mapping[str, Any], seed: int) -> nn.Module:
    """Return a system with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.load(architecture, None, Keys())
