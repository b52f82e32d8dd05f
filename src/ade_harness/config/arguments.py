"""Overrides as they are typed, made ready for Hydra: known keys, plain paths, a model's own protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ade_harness.config.dataset import DatasetConfig
from ade_harness.config.fields import place_keys
from ade_harness.config.files import choices, read_choice
from ade_harness.config.inference import InferenceConfig
from ade_harness.config.model import ModelConfig
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.runtime import RuntimeConfig, SlurmConfig
from ade_harness.config.schema import MetricsConfig, RunConfig, TrackingConfig
from ade_harness.errors import HarnessError, did_you_mean, nearest, require
from ade_harness.files.escapes import require_utf8, shortened

_FREE_KEYS = ("model.kwargs.", "model.architecture.", "runtime.slurm.extra.")
NODES: dict[str, Any] = {
    "model": ModelConfig,
    "dataset": DatasetConfig,
    "inference": InferenceConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "probe": ProbeConfig,
}
GROUPS = tuple(NODES)
OWN_PROTOCOLS = {"ss": "single-scale", "ms": "multi-scale"}
"""``inference=ss`` and ``inference=ms``: the model's own protocol."""


def prepare(
    overrides: Sequence[str], extra: Path | None = None, multirun: bool = False, primary: bool = False
) -> list[str]:
    """Check overrides, and write them as Hydra's grammar wants them.

    Args:
        overrides: as typed: paths, URLs and ids need no quotes; free-form keys no ``+``.
        extra: folder of ``--config-dir``.
        multirun: whether they may hold sweeps.
        primary: whether the primary configuration is the user's own, which may choose the model.

    Raises:
        HarnessError: an unknown key or choice, with the nearest known ones; or no override.
    """
    for text in overrides:
        require_utf8(text, shortened(text))
    ready = [_quoted(_timms(text), multirun) for text in overrides]
    for text in ready:
        _check(text, extra)
    known = not multirun and not model_is_open(ready, extra, primary)
    return [_opened(text) for text in (_with_own_protocol(ready, extra) if known else ready)]


def model_is_open(overrides: Sequence[str], extra: Path | None = None, primary: bool = False) -> bool:
    """Whether a file may choose the model, so that it is known only once Hydra has composed.

    Args:
        overrides: of the command.
        extra: folder of ``--config-dir``, whose own groups (``+experiment=NAME``) may override any other.
        primary: whether the primary configuration is the user's own.
    """
    named = any(text.startswith("model=") for text in overrides)
    return not named and (primary or any(_of_own_group(text, extra) for text in overrides))


def _of_own_group(text: str, extra: Path | None) -> bool:
    """Whether an override chooses from a group that the packaged configuration does not have."""
    key = text.partition("=")[0].lstrip("+").partition("@")[0]
    return extra is not None and bool(key) and key not in GROUPS and (extra / key).is_dir()


def mode_of(overrides: Sequence[str]) -> str | None:
    """Return what overrides set ``hydra.mode`` to, with or without ``+`` and quotes; None if none does."""
    found = (re.fullmatch(r"\+{0,2}hydra\.mode=(['\"]?)(.*)\1", text) for text in overrides)
    return next((one[2] for one in reversed([*found]) if one is not None), None)


_MAX_JOBS = 10_000
"""Jobs of a sweep: each is composed and checked before the first starts, in some tenths of a second."""


def limit_sweep(overrides: Sequence[str]) -> None:
    """Refuse a sweep of more jobs than anybody means, before Hydra lists them; overrides as :func:`prepare` gives them.

    Raises:
        HarnessError: names the override with the most values.
    """
    jobs, most = 1, (0, "")
    for text in overrides:
        found = OverridesParser.create().parse_override(text)
        values: Any = found._value if found.is_sweep_override() else None  # its public iterator makes them all
        number = len(getattr(values, "list", None) or ())
        if hasattr(values, "stop") and values.step:
            number = max(0, math.ceil((values.stop - values.start) / values.step))
        jobs, most = jobs * max(1, number), max(most, (number, text))
    require(jobs <= _MAX_JOBS, f"{most[1]}: a sweep of {jobs:,} jobs; at most {_MAX_JOBS:,} are taken.")


def with_recipe(overrides: Sequence[str], extra: Path | None = None, primary: bool = False) -> list[str]:
    """Return overrides of a training: the model's own recipe unless one is chosen, and the training split.

    Where a file may choose the model (:func:`model_is_open`), the recipe is left out: it is known only then.

    Raises:
        HarnessError: no recipe is known for the model.
    """
    own = [f"+{text}" if text.startswith("probe=") else text for text in overrides]
    if not any(text.startswith("dataset.split=") for text in own):
        own.append("dataset.split=training")
    if not any(text.startswith("+probe=") for text in own) and not model_is_open(overrides, extra, primary):
        name = _chosen_model(overrides)
        known_models = choices("model", extra)
        if name not in known_models:
            raise HarnessError(f"model={name}: unknown value.{known_choices('model', name, known_models)}")
        own.insert(0, own_recipe(name, read_choice("model", name, extra).get("probe"), extra))
    return own


def own_recipe(model: str, recipe: str | None, extra: Path | None = None) -> str:
    """Return the override that chooses a model's own recipe.

    Args:
        model: its name.
        recipe: ``model.probe``.
        extra: folder of ``--config-dir``.

    Raises:
        HarnessError: no recipe is known for the model.
    """
    if recipe is None:
        known = ", ".join(choices("probe", extra))
        raise HarnessError(f"model={model}: no recipe is published for it. Choose one: probe=NAME ({known}).")
    return f"+probe={recipe}"


def _timms(text: str) -> str:
    """Write ``model.backbone=NAME``, a timm backbone by its name, as the field it is."""
    key, equals, name = text.partition("=")
    return f"model.architecture.backbone.name={name}" if equals and key == "model.backbone" else text


def quote(value: str) -> str:
    """Return text in quotes of Hydra's grammar, where backslashes before a quote, and at the end, count double."""
    return "'" + re.sub(r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value) + "'"


def literal(value: str) -> str:
    """Return text in quotes that means itself: what looks like an interpolation in it is none."""
    return quote(without_interpolations(value))


def without_interpolations(value: str) -> str:
    """Return text for OmegaConf that means itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)


def _quoted(text: str, multirun: bool) -> str:
    """Quote a path, URL or id; what is quoted already, null or an interpolation stays as it is."""
    key, equals, value = text.partition("=")
    if not equals or key.lstrip("+") not in place_fields() or not value or value.lower() == "null":
        return text
    if key.startswith("hydra.") and value.startswith("~/"):  # which Hydra would make a folder of that name
        value = str(Path(value).expanduser())
        text = f"{key}={value}"
    if len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]:
        return text
    if "${" in value:
        return text if _interpolates(value) else f"{key}={quote(value.replace('${', chr(92) + '${'))}"
    if multirun and _parses(text):
        return text
    return f"{key}={quote(value)}"


def _interpolates(value: str) -> bool:
    """Whether all that looks like an interpolation is one: of a key of ours, or by a resolver; else it is text."""
    named = re.findall(r"\$\{([^}]*)\}", value)
    known = {*known_keys(), *(key.rpartition(".")[0] for key in known_keys())}
    prefixes = ("hydra.", "model.", "dataset.", "inference.", "runtime.", "run.")
    return bool(named) and all(name in known or name.startswith(prefixes) or _has_resolver(name) for name in named)


def _has_resolver(name: str) -> bool:
    """Whether the text within ``${...}`` calls a resolver: OmegaConf's, Hydra's, or one of a plugin."""
    resolver, colon, _ = name.partition(":")
    if not colon:
        return False
    if not OmegaConf.has_resolver(resolver) and resolver.isidentifier():
        Plugins.instance()  # imports those that are installed
    return resolver in _OF_APPLICATIONS or OmegaConf.has_resolver(resolver)


_OF_APPLICATIONS = ("hydra", "now")
"""Resolvers that Hydra registers once an application begins."""


def _parses(text: str) -> bool:
    try:
        OverridesParser.create().parse_override(text)
    except HydraException:
        return False
    return True


@cache
def place_fields() -> frozenset[str]:
    """Return the dotted keys of fields that hold a path, a URL or an id."""
    nodes = {**NODES, "run": RunConfig}
    own = (key for group, node in nodes.items() for key in place_keys(node, f"{group}."))
    return frozenset(("hydra.run.dir", "hydra.sweep.dir", *place_keys(SlurmConfig, "hydra.launcher."), *own))


def _chosen_model(overrides: Sequence[str]) -> str:
    return next((text.partition("=")[2] for text in reversed(overrides) if text.startswith("model=")), "demo")


def _with_own_protocol(overrides: Sequence[str], extra: Path | None) -> list[str]:
    """Replace inference=ss and inference=ms by the name of the model's own protocol."""
    chosen = next((text for text in overrides if text in ("inference=ss", "inference=ms")), None)
    if chosen is None:
        return list(overrides)
    model = _chosen_model(overrides)
    named = any(text.startswith("model=") for text in overrides)
    protocols = read_choice("model", model, extra).get("protocols", {})
    name = own_protocol(
        chosen.partition("=")[2], f"{model}{'' if named else ', which is the default: add model=NAME'}", protocols
    )
    return [f"inference={name}" if text == chosen else text for text in overrides]


def own_protocol(kind: str, model: str, protocols: Mapping[str, str | None]) -> str:
    """Return the name of a model's own protocol.

    Args:
        kind: a key of OWN_PROTOCOLS.
        model: its name.
        protocols: ``model.protocols``.

    Raises:
        HarnessError: none was published.
    """
    name = protocols.get(kind)
    if name is None:
        have = [f"inference={k} ({protocols[k]})" for k in OWN_PROTOCOLS if protocols.get(k) is not None]
        raise HarnessError(
            f"inference={kind}: no {OWN_PROTOCOLS[kind]} protocol was published for model={model}."
            f" {'It has ' + ', '.join(have) + '.' if have else 'Choose one by name: inference=NAME.'}"
        )
    return name


def _opened(text: str) -> str:
    """Let the free-form dictionaries take new keys without Hydra's ``+``, one by one or as ``{key: value, ...}``."""
    key = text.partition("=")[0]
    return f"++{text}" if f"{key}.".startswith(_FREE_KEYS) else text


def _check(text: str, extra: Path | None) -> None:
    """Refuse what Hydra's parser or our groups and keys do not know, with the nearest known ones."""
    if "=" not in text and not text.startswith("~"):
        raise HarnessError(f"{text!r}: expected key=value. `python -m ade_harness evaluate --help` lists the keys.")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise HarnessError(
            f"{shortened(text)}: not in Hydra's grammar ({shortened(reason)}). Quote the value:"
            f' "{shortened(_with_quotes(text))}".'
        ) from error
    key = override.key_or_group
    if key in GROUPS:
        known = choices(key, extra)
        value = override.value()
        if _is_no_choice(override) or (isinstance(value, str) and value not in known):
            given = text.partition("=")[2]
            raise HarnessError(f"{key}={shortened(given)}: unknown value.{known_choices(key, given[:100], known)}")
    elif key.startswith("hydra/") and _is_no_choice(override):
        raise HarnessError(f"{shortened(text)}: {key} takes the name of a choice.")
    elif key == "hydra.job.chdir" and override.value() is True:
        raise HarnessError(
            "hydra.job.chdir=true: has no effect: relative paths are taken from where the command is given, and a run"
            " directory holds all that a run writes. Leave it out."
        )
    elif key == "hydra.output_subdir" and override.value() is not None:
        raise HarnessError(
            "hydra.output_subdir: a run directory holds the configuration already (config.yaml, with what was typed in"
            " manifest.json). Leave it out."
        )
    elif key == "hydra.searchpath":
        raise HarnessError(
            "hydra.searchpath: choices are looked for in the package's configuration and in your own folder, which"
            " is checked before anything starts: give it as --config-dir=DIR."
        )
    elif extra is not None and (extra / key).is_dir():
        pass  # a group of the user's, such as +experiment=NAME
    elif not text.startswith(("~", "hydra.", "hydra/")) and not key.startswith(("hydra/", "hydra.", *_FREE_KEYS)):
        known = list(known_keys())
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise HarnessError(f"{key}: no such option.{did_you_mean(key, [*known, *GROUPS])} `--cfg job` lists all.")


def _is_no_choice(override: Override) -> bool:
    """Whether a group gets a number, null, true or false, which Hydra's composition does not expect."""
    plain = not override.is_delete() and not override.is_sweep_override()
    return plain and (override.value() is None or isinstance(override.value(), int | float))


def _with_quotes(text: str) -> str:
    """Return an override whose value is quoted; of a glob, its patterns."""
    key, _, value = text.partition("=")
    if value.startswith("glob(") and value.endswith(")"):
        patterns = (part.rpartition("=")[::2] for part in value[5:-1].split(","))
        quoted = (f"{name}={quote(pattern)}" if name else quote(pattern) for name, pattern in patterns)
        proposed = f"{key}=glob({','.join(quoted)})"
        if _parses(proposed) and "'[" not in proposed.partition("exclude=")[2]:  # a list of patterns is no pattern
            return proposed
    return f"{key}={quote(value)}"


_EVALUATION_ONLY = (
    "run.", "metrics.", "tracking", "probe", "hydra", "dataset.limit", "dataset.ids", "dataset.images", "dataset.root",
    "dataset.split", "dataset.check_headers",
    "runtime.slurm", *(f"runtime.{name}=" for name in (
        "devices", "num_nodes", "workers", "sharding", "supervise", "max_restarts", "requeue", "timeout_min",
    )),
)  # fmt: skip


def refuse_idle(overrides: Sequence[str], command: str) -> None:
    """Raise HarnessError for an override that only an evaluation or a training heeds."""
    idle = next((o for o in overrides if o.lstrip("+~").startswith(_EVALUATION_ONLY)), None)
    require(idle is None, f"{idle}: has no effect on {command}. Remove it.")


def known_choices(group: str, value: str, known: Sequence[str]) -> str:
    """Return the nearest of many choices, or all of a few, for a message."""
    if len(known) <= 5:
        return f"{did_you_mean(value, known)} Known: {', '.join(known)}."
    more = "`python -m ade_harness models`" if group == "model" else "`python -m ade_harness evaluate --help`"
    return f" Nearest: {nearest(value, known)}; {more} lists all."


@cache
def known_keys() -> tuple[str, ...]:
    """Return every dotted key of the schema."""
    nodes = {**NODES, "run": RunConfig, "metrics": MetricsConfig}
    return tuple(key for group, node in nodes.items() for key in _leaves(OmegaConf.structured(node), group))


def _leaves(cfg: DictConfig, prefix: str) -> Iterator[str]:
    for key in cfg:
        path = f"{prefix}.{key!s}"
        value = None if OmegaConf.is_missing(cfg, key) else cfg[key]
        if isinstance(value, DictConfig) and len(value):
            yield from _leaves(value, path)
        yield path
