"""What a family of systems is: tables of weight names, and two functions that read and build an architecture."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.labels import Classes, usual_dataset
from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.key_tables import Table, count_mapped_keys, known_keys, name_there, to_hub_names
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.formats.transformers import load_into_transformers

SECTIONS = ("backbone", "adapter", "head")
"""Sections of ``model.architecture``."""


@dataclass(frozen=True)
class Family:
    """Systems of one architecture at any width and depth."""

    layouts: Mapping[str, Table]
    """Code base -> table from its names to those of the hub's files."""
    read: Callable[[Mapping[str, Tensor]], dict[str, Any]]
    """The architecture, as far as shapes of a state_dict in the hub's names say it."""
    build: Callable[[dict[str, Any], Mapping[str, Tensor] | None, Strictness], nn.Module]
    """The system, with these weights in the hub's names, or with random ones."""
    config: str = ""
    """The transformers configuration class whose fields an architecture has, if it has one."""
    backbone_fields: tuple[str, ...] = ()
    """Fields of ``architecture.backbone``, beside those of `config`."""
    adapter_fields: tuple[str, ...] = ()
    """Fields of ``architecture.adapter``."""
    head_fields: tuple[str, ...] = ()
    """Fields of ``architecture.head``."""
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
    """Fields that shapes do not say."""
    shapes_first: bool = False
    """What shapes say takes precedence over a configuration, whose values are not certain."""
    prepare: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """Applied to a state_dict before its names are looked up."""
    published: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Tensor]] = lambda hub, _: hub
    """Applied to weights of a file that is not the authors' own, in the hub's names, and to the architecture that is
    given: adds constants that such files lack."""

    def hub_names(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a state_dict of any known code base."""
        return to_hub_names(self.prepare(state), self.layouts)[0]

    def known(self, state: Mapping[str, Tensor]) -> int:
        """Return how many names of a state_dict the code base has that knows most of them."""
        names = self.prepare(state)
        return max(max(known_keys(names, table), count_mapped_keys(names, table)) for table in self.layouts.values())

    def _layout(self, state: Mapping[str, Tensor]) -> str:
        """Return which code base's names a state_dict has."""
        return to_hub_names(self.prepare(state), self.layouts)[1]

    def file_names(self, state: Mapping[str, Tensor]) -> Callable[[str], str] | None:
        """Return what names weights from the hub's names as this state_dict does; None if it has the hub's own."""
        layout = self._layout(state)
        return None if layout == "hub" else lambda key: name_there(key, self.layouts[layout])

    def used(self, hub: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out what takes no part in the forward."""
        return {k: v for k, v in hub.items() if not any(fnmatch.fnmatchcase(k, p) for p in self.unused)}

    def load(
        self,
        architecture: Mapping[str, Any],
        state: Mapping[str, Tensor] | None,
        keys: Strictness,
        classes: Classes | None = None,
        published: bool = False,
    ) -> nn.Module:
        """Build the system; `architecture` takes precedence over what the shapes of `state` say.

        Args:
            architecture: fields of the family, as ``model.architecture`` or flat (see :meth:`flat`); with a `state`,
                only those that shapes do not say are needed.
            state: weights in the names of any known code base; None draws random ones.
            keys: origin and allowed differences.
            classes: that it predicts; None are ADE20K's.
            published: whether `state` is of a file, whose constants are then those of the published one.

        Raises:
            HarnessError: keys or shapes do not fit, another number of classes, or an impossible architecture.
        """
        architecture, classes = self.flat(architecture), classes or ade20k_classes()
        hub = None if state is None else self.hub_names(state)
        if state is not None and hub is not None and published and self._layout(state) != "official":
            hub = dict(self.published(hub, architecture))
        keys = replace(
            keys,
            allow_missing=(*keys.allow_missing, "*num_batches_tracked"),  # evaluation never reads it
            of_file=None if state is None else _in_turn(self.file_names(state), keys.of_file),
        )
        read: dict[str, Any] = {}
        if hub is not None:
            self._check_classes(hub, keys, classes)
            read = self._read(hub, keys, whole=bool(architecture))
        fields = {**self.defaults, **read, **architecture, **(read if self.shapes_first else {})}
        fields["num_labels"] = len(classes)
        try:
            return self.build(fields, None if hub is None else self.used(hub), keys)
        except (IndexError, KeyError, ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise HarnessError(
                f"model.architecture={fields}: makes no network ({type(error).__name__}: {str(error).splitlines()[0]})."
            ) from error

    def flat(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of ``architecture.backbone``, ``.adapter`` and ``.head`` in one mapping.

        Flat fields are those of configurations that were written before there were sections; they win over sections.

        Raises:
            HarnessError: a field that the family does not have, or that belongs to another section.
        """
        sections = {name: architecture[name] for name in SECTIONS if isinstance(architecture.get(name), Mapping)}
        fields: dict[str, Any] = {}
        for section, content in sections.items():
            for name, value in content.items():
                right = self._section_of(name, f"{section}.{name}")
                if right not in (None, section):
                    key = f"model.architecture.{right}.{name}"
                    raise HarnessError(f"model.architecture.{section}.{name}: is a field of the {right}: use {key}.")
                fields[name] = value
        for name, value in architecture.items():
            if name not in sections:
                self._section_of(name, name)
                fields[name] = value
        return fields

    def _section_of(self, name: str, key: str) -> str | None:
        """Return the section of a field; None for one that shapes say anyway."""
        theirs = _config_fields(self.config) if self.config else ()
        own = {"head": self.head_fields, "adapter": self.adapter_fields, "backbone": (*self.backbone_fields, *theirs)}
        section = next((section for section, names in own.items() if name in names), None)
        if section is None and name not in _INFERRED_FROM_SHAPES:
            dotted = {n: f"{s}.{n}" for s, names in own.items() for n in names}
            near = [dotted[n] for n in difflib.get_close_matches(name, dotted, n=2)]
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            known = [f"those of {self.config} in backbone"] if self.config else []
            known += [key for n, key in dotted.items() if n not in theirs]
            raise HarnessError(f"model.architecture.{key}: no such field.{hint} Known: {', '.join(known)}.")
        return section

    def _read(self, hub: Mapping[str, Tensor], keys: Strictness, whole: bool) -> dict[str, Any]:
        try:
            return self.read(hub)
        except (KeyError, IndexError) as error:
            if whole:
                return {}  # the architecture is given: the strict loading that follows names what is missing
            found = f"it has {len(hub)} others, such as {', '.join(list(hub)[:3])}" if hub else "it is empty"
            raise HarnessError(f"{keys.origin}: {error} is missing; {found}. Is it from another model?") from error

    def _check_classes(self, hub: Mapping[str, Tensor], keys: Strictness, expected: Classes) -> None:
        weight = hub.get(self.classifier)
        classes = None if weight is None else weight.shape[0] - self.void
        if classes is not None and classes != len(expected):
            raise HarnessError(
                f"{keys.origin}: a classifier of {classes} classes{_trained_on(classes)}, {expected.dataset} has"
                f" {len(expected)}: this is a checkpoint of another data set."
            )


@cache
def _config_fields(config: str) -> tuple[str, ...]:
    import transformers

    return tuple(n for n in vars(getattr(transformers, config)()) if not n.startswith("_"))


_INFERRED_FROM_SHAPES = ("dim", "dims", "depth", "heads", "window", "img", "img_size", "head", "auxiliary", "layers")
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
        whole[key] = whole[key].float() + value.float()  # halves are summed as what they stand for
    return whole


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest ``{N}`` in the names that begin with `pattern`; 0 if there is none."""
    expression = re.compile(re.escape(pattern).replace(r"\{N\}", r"(\d+)"))
    return max((int(found[1]) + 1 for found in map(expression.match, state) if found), default=0)


def load_hub_names(cls: Any, config: Any, state: Mapping[str, Tensor] | None, keys: Strictness) -> nn.Module:
    """Build a transformers class with weights in the hub's names, or with random ones (on torch's default device)."""
    if state is None:
        network: nn.Module = cls(config).eval()
        return network
    return load_into_transformers(cls, config, state, keys)


def random_network(
    family: Family, architecture: Mapping[str, Any], seed: int, classes: Classes | None = None
) -> nn.Module:
    """Return a system with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.load(architecture, None, Strictness(), classes)


def _in_turn(first: Callable[[str], str] | None, then: Callable[[str], str] | None) -> Callable[[str], str] | None:
    """Return both renamings as one; None changes nothing."""
    if first is None or then is None:
        return first or then
    return lambda name: then(first(name))
