"""Any nn.Module by its import path: ``model._target_``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from torch import nn
from torch.nn.parameter import is_lazy

from ade_harness.config.model import ModelConfig, Weights
from ade_harness.config.targets import require_target
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError, require, text_of
from ade_harness.files.logs import SILENT, log_level
from ade_harness.models.checkpoint.parts import read_part
from ade_harness.models.checkpoint.sources import choice_of, chosen_checkpoint, facts_of
from ade_harness.models.checkpoint.strict import Strictness, load_strictly
from ade_harness.models.identity import sources_of
from ade_harness.models.loaded import LoadedModel, names_of, statistics


def load(cfg: ModelConfig, threads: int, classes: Classes) -> LoadedModel:
    """Make the module by Hydra's own rules (nested ``_target_``, ``_partial_``, ``_args_``, its block-list).

    Raises:
        HarnessError: it cannot be imported or made, is no module, or its checkpoint does not fit.
    """
    target = cfg._target_ or ""
    module = _make(target, cfg)
    if not isinstance(module, nn.Module):
        raise HarnessError(f"model._target_={target}: gave a {type(module).__name__}, expected a torch.nn.Module.")
    unknown = [name for name, t in (*module.named_parameters(), *module.named_buffers()) if is_lazy(t) or t.is_meta]
    require(
        not unknown,
        f"model._target_={target}: its {unknown[0] if unknown else ''} has no values (a lazy layer, or one on the meta"
        " device). Make all of them in the constructor.",
    )
    checkpoint = chosen_checkpoint(cfg)
    if checkpoint is None:
        weights = "random" if cfg.weights == Weights.random else "constructed"
        facts: dict[str, Any] = {"origin": f"{target}, as constructed (seed {cfg.seed})"}
    else:
        own = module.state_dict()
        part = read_part(checkpoint.path, choice_of(cfg), lambda state: len(state.keys() & own.keys()))
        allowed = tuple(cfg.allow_missing_keys), tuple(cfg.allow_unexpected_keys)
        keys = Strictness(checkpoint.origin, *allowed, of_file=part.name_in_file, prefix=part.prefix)
        load_strictly(module, part.state, keys)
        weights, facts = "pretrained", facts_of(checkpoint, part)
    others = [getattr(get_object(name), "__module__", "") for name in (target, *_nested_targets(cfg.kwargs))]
    facts["source"] = ", ".join(sources_of(module, others)) or None
    names, notes = getattr(module, "class_names", None), tuple[str, ...]()
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        names, notes = None, ("the module's class_names are not a list of texts, and are not used",)
    names = names_of(cfg, None if names is None else list(names))
    return LoadedModel(module, weights, **statistics(cfg), class_names=names, notes=notes, facts=facts)


def _nested_targets(value: Any) -> Iterator[str]:
    """Yield every ``_target_`` within a module's arguments."""
    if isinstance(value, Mapping):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = list(value.values())
    for below in value if isinstance(value, list | tuple) else ():
        yield from _nested_targets(below)


def _makes_a_module(found: Any, target: str) -> bool:
    """Whether a target is of a kind that makes networks: os.system, and whatever a module has imported, is not."""
    if inspect.isclass(found):
        return issubclass(found, nn.Module)
    package = target.partition(".")[0]
    if inspect.ismethod(found):
        return inspect.isclass(found.__self__) and found.__self__.__module__.partition(".")[0] == package
    return inspect.isfunction(found) and found.__module__.partition(".")[0] == package


def _make(target: str, cfg: ModelConfig) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the console script does not
    require_target(target)
    try:
        with log_level("hydra.utils", SILENT):  # Hydra prints lines of its own
            found = get_object(target)
    except Exception as error:  # importing runs the user's code, which may fail in any way
        reason = " ".join(f"{type(error).__name__}: {text_of(error)}".split())[:300]
        raise HarnessError(
            f"model._target_={target}: cannot be imported ({reason}). Expected package.module.Name, importable from"
            f" {Path.cwd()} or installed."
        ) from error
    if not _makes_a_module(found, target):
        raise HarnessError(
            f"model._target_={target}: is a {type(found).__name__}, expected an nn.Module class, one of its class"
            " methods, or a function of the module that you name."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        try:
            return instantiate({"_target_": target, "_convert_": "all", **cfg.kwargs})
        except InstantiationException as error:
            cause = error.__cause__ or error
            if isinstance(cause, TypeError):
                raise HarnessError(
                    f"model._target_={target}: does not take these arguments ({cause})."
                    " Set them as model.kwargs.NAME=VALUE."
                ) from error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]
            raise HarnessError(
                f"model._target_={target}: its construction failed ({reason}). ADE_HARNESS_TRACEBACK=1 shows where."
            ) from error
