"""A configuration as the overrides that compose it again."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ade_harness.config.arguments import literal, prepare
from ade_harness.config.compose import checked, compose_tree, packaged_choices, packaged_tree
from ade_harness.config.fields import PATHS
from ade_harness.config.plain import as_dict, flatten
from ade_harness.config.schema import Config
from ade_harness.errors import HarnessError
from ade_harness.files.reading import expanded

GROUPS = ("model", "dataset", "inference", "metrics")
RUNTIME = ("runtime.seed", "runtime.threads", "runtime.deterministic", "runtime.kernels")
"""Fields of ``runtime`` that can change a bit. The number of ranks cannot."""
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
"""What Hydra's grammar takes for a string without quotes."""
_OWN = re.compile(
    r"(model|dataset|inference)=[\w.-]+|(model|dataset|inference|metrics)(\.[\w-]+)+=.*|"
    rf"({'|'.join(map(re.escape, (*RUNTIME, 'run.on_error')))})=.*",
    re.DOTALL,
)
"""Overrides that decide the counts."""


def overrides_of(cfg: Config) -> list[str] | None:
    """Return overrides for ``python -m ade_harness`` that compose what decides the counts of `cfg`.

    The configuration files are named where they are this package's; every value that differs from them is an
    override of its own, so that the overrides say the same without files of the user's. Paths become absolute.

    Args:
        cfg: a composed configuration.

    Returns:
        The overrides, without ``run`` and ``tracking``; None if a key cannot be written on a command line.
    """
    overrides = packaged_choices(cfg)
    try:
        wanted = _decisive(as_dict(cfg))
        base = packaged_tree(tuple(overrides))
        changes = _changes(_values_of(base), wanted)
        if changes and _decisive(as_dict(checked(_changed(base, changes)))) != wanted:
            return None
    except HarnessError:
        return None
    return [_absolute(override, wanted) for override in [*overrides, *changes]]


def _changed(base: DictConfig, changes: Sequence[str]) -> DictConfig:
    """Return a composed tree after more overrides of values, which Hydra applies last: a tenth of a composition.

    Raises:
        HarnessError: they cannot be applied.
    """
    tree = copy.deepcopy(base)
    try:
        for override in OverridesParser.create().parse_overrides(prepare(changes)):
            value: Any = override.value()
            OmegaConf.update(tree, override.key_or_group, value, merge=True, force_add=override.is_force_add())
    except (HydraException, OmegaConfBaseException) as error:
        raise HarnessError(str(error)) from error
    return tree


def unexpected_override(overrides: Sequence[str]) -> str | None:
    """Return the first override that :func:`overrides_of` never writes, such as one of Hydra's own; None if all are."""
    return next((override for override in overrides if not _OWN.fullmatch(override)), None)


def composed_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what overrides compose, by dotted keys, without checking that a user's own values are there.

    Raises:
        HarnessError: they do not compose.
    """
    return _values_of(compose_tree(prepare(overrides)))


def _values_of(tree: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    return _decisive(values)


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the counts, by dotted keys."""
    flat: dict[str, Any] = {}
    for group in GROUPS:
        flat |= flatten(config[group], group)
    for key in (*RUNTIME, "run.on_error"):
        group, _, name = key.partition(".")
        flat[key] = config[group][name]
    return flat


def _changes(base: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}={as_override_value(value)}" for key, value in wanted.items() if key not in base or base[key] != value
    ]


def as_override_value(value: Any) -> str:
    """Return a value as Hydra's override grammar writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{as_override_value(key)}:{as_override_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(as_override_value(v) for v in value) + "]"
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in ("null", "true", "false", "nan", "inf"):
            return value
        return literal(value)
    return repr(value)


def _absolute(override: str, wanted: Mapping[str, Any]) -> str:
    key, _, _ = override.partition("=")
    value = wanted.get(key)
    if key == "model.id" and not Path(str(value)).is_dir():
        return override  # of the hub
    if key not in (*PATHS, "model.id") or value is None:
        return override
    return f"{key}={as_override_value(str(expanded(value).resolve()))}"
