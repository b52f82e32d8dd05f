"""The run's configuration: typed, composed by Hydra, checked before anything is loaded.

Every field here can be set on the command line as ``group.field=value``; the YAML files in ``conf/`` are named
choices of these fields. An unknown key, a value of the wrong type or out of range is one clear message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ade_harness.config.inference import InferenceConfig
from ade_harness.config.model import ModelConfig
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.runtime import RuntimeConfig
from ade_harness.config.schema import Config, DatasetConfig, MetricsConfig, RunConfig, TrackingConfig
from ade_harness.config.validate import validate
from ade_harness.errors import HarnessError, did_you_mean

_FREE_KEYS = ("model.kwargs.", "model.architecture.", "runtime.slurm.extra.")
_NODES: dict[str, Any] = {
    "model": ModelConfig,
    "dataset": DatasetConfig,
    "inference": InferenceConfig,
    "runtime": RuntimeConfig,
    "tracking": TrackingConfig,
    "probe": ProbeConfig,
}
GROUPS = tuple(_NODES)


def conf_dir() -> Path:
    """Return the folder of the YAML choices: inside the wheel, or the repository's conf/."""
    package = Path(__file__).parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


def register_schemas() -> None:
    """Tell Hydra the types."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, node in _NODES.items():
        store.store(group=group, name="schema", node=node)


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Return the names that a config group offers."""
    folders = [conf_dir(), *([extra] if extra else [])]
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def read_choice(group: str, name: str) -> Any:
    """Return a choice as its YAML file has it, typed; much faster than composing, and nothing of it is validated.

    Args:
        group: such as ``model``.
        name: of a packaged file of the group.
    """
    tree = OmegaConf.merge(OmegaConf.structured(_NODES[group]), _written(group, name))
    return OmegaConf.to_object(tree)


def _written(group: str, name: str) -> dict[str, Any]:
    content = yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for below in content.pop("defaults", ()):
        if isinstance(below, str) and below not in ("schema", "_self_"):  # another file of the group
            merged |= _written(group, below)
    merged |= content
    return merged


def compose_config(overrides: Sequence[str], extra: Path | None = None) -> Config:
    """Compose and check a configuration.

    Args:
        overrides: Hydra overrides, such as ``model=segformer_b0`` or ``dataset.limit=10``.
        extra: a folder of your own with the same groups, such as ``model/mine.yaml``.

    Raises:
        HarnessError: an unknown key or choice, a value of the wrong type or out of range.
    """
    if extra is not None and not extra.is_dir():
        raise HarnessError(f"--config-dir: {extra} is not a folder.")
    tree = compose_tree(_own_protocol([_quote_address(o) for o in overrides], extra), extra)
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise HarnessError(f"{missing[0]} must be set: add {missing[0]}=... to the command.")
    return checked(tree)


def compose_probe(overrides: Sequence[str], extra: Path | None = None) -> Config:
    """Compose the configuration of a training: with a ``probe`` node, the model's own recipe unless one is chosen.

    Args:
        overrides: as of :func:`compose_config`; ``probe=NAME`` and ``probe.field=value`` too.
        extra: as of :func:`compose_config`.

    Raises:
        HarnessError: as :func:`compose_config`; or no recipe is known for the model.
    """
    own = [f"+{o}" if o.startswith("probe=") else o for o in overrides]
    if not any(o.startswith("dataset.split=") for o in own):
        own.append("dataset.split=training")
    if not any(o.startswith("+probe=") for o in own):
        model = compose_config([o for o in overrides if o.startswith("model=")], extra).model
        known = ", ".join(choices("probe", extra))
        if model.probe is None:
            raise HarnessError(f"model={model.name}: no recipe was published for it. Choose one: probe=NAME ({known}).")
        own.insert(0, f"+probe={model.probe}")
    return compose_config(own, extra)


def compose_tree(overrides: Sequence[str], extra: Path | None = None) -> DictConfig:
    """Compose Hydra's tree of a configuration, in which mandatory values may be missing; raises as above."""
    register_schemas()
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[file://{extra.resolve()}]"] if extra else []
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            for text in overrides:
                _check_override(text, extra)
            return compose("config", overrides=[*map(open_dict_word, overrides), *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise HarnessError(_explain(error, overrides)) from error


def checked(tree: DictConfig) -> Config:
    """Return the typed and validated configuration of a composed tree.

    Raises:
        HarnessError: an interpolation that cannot be resolved, or a value out of range.
    """
    try:
        config = cast(Config, OmegaConf.to_object(tree))
    except OmegaConfBaseException as error:
        raise HarnessError(_explain(error, ())) from error
    validate(config)
    return config


def as_dict(config: Any) -> dict[str, Any]:
    """Return a configuration, or a node of it, as nested dictionaries of plain values; Enums by their names."""
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def as_yaml(content: Mapping[str, Any]) -> str:
    """Return plain values as YAML, in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_plain(below) for below in value]
    return str(value) if isinstance(value, StrEnum) else value


def _own_protocol(overrides: Sequence[str], extra: Path | None) -> list[str]:
    """Replace inference=ss and inference=ms by the name of the model's own protocol."""
    chosen = next((o for o in overrides if o in ("inference=ss", "inference=ms")), None)
    if chosen is None:
        return list(overrides)
    kind = chosen[-2:]
    model = compose_config([o for o in overrides if o.startswith("model=")], extra).model
    name = getattr(model.protocols, kind)
    if name is None:
        have = [f"inference={k} ({v})" for k, v in asdict(model.protocols).items() if v is not None]
        what = "single-scale" if kind == "ss" else "multi-scale"
        raise HarnessError(
            f"{chosen}: no {what} protocol was published for model={model.name}."
            f" {'It has ' + ', '.join(have) + '.' if have else 'Choose one by name: inference=NAME.'}"
        )
    return [f"inference={name}" if o == chosen else o for o in overrides]


def protocol_changes(inference: InferenceConfig) -> list[str]:
    """Return what of a protocol is not as the YAML file of its name says, such as ``tta.flip``.

    How it is computed (batches, precision, compilation) is not part of the protocol.
    """
    if inference.name not in choices("inference"):
        return []
    written, used = as_dict(compose_config([f"inference={inference.name}"]).inference), as_dict(inference)
    changed = []
    for group in ("exif", "resize", "mode", "window", "tta", "masks", "output"):
        one, two = written[group], used[group]
        if isinstance(one, dict):
            changed += [f"{group}.{key}" for key in one if one[key] != two[key]]
        elif one != two:
            changed.append(group)
    return changed


def stored_config(text: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that a run was made with, with some changes.

    Args:
        text: of its config.yaml.
        overrides: as of :func:`compose_config`.

    Raises:
        HarnessError: as :func:`compose_config`; or the text is no configuration of this version.
    """
    overrides = [_quote_address(o) for o in overrides]
    try:
        tree = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise HarnessError(
            f"config.yaml is damaged, or of another version ({str(error).splitlines()[0]}). Start a new run."
        ) from error
    if overrides:
        composed = compose_tree(_own_protocol(overrides, None))  # every mistake in them is found here
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group
            with open_dict(tree):
                OmegaConf.update(tree, key, OmegaConf.select(composed, key), merge=False)
    return checked(tree)


def stored_node(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Return one node of a stored configuration.

    Args:
        kind: its dataclass.
        content: plain values, of config.yaml.

    Raises:
        HarnessError: it is no such node.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(content)))
    except (OmegaConfBaseException, ValueError) as error:
        raise HarnessError(f"config.yaml is damaged, or of another version ({str(error).splitlines()[0]}).") from error


def _quote_address(text: str) -> str:
    """Quote a URL: Hydra's grammar has another use for = and &."""
    key, _, value = text.partition("=")
    is_plain = key == "model.url" and "://" in value and not value.startswith(("'", '"', "$")) and "'" not in value
    return f"{key}='{value}'" if is_plain else text


def open_dict_word(text: str) -> str:
    """Let the free-form dictionaries take new keys without Hydra's ``+``."""
    return f"++{text}" if text.startswith(_FREE_KEYS) else text


def _check_override(text: str, extra: Path | None) -> None:
    """Refuse what Hydra's parser or our groups and keys do not know, with the nearest known word."""
    if "=" not in text and not text.startswith("~"):
        raise HarnessError(f"{text!r}: expected key=value. `python -m ade_harness --help` lists the keys.")
    override = OverridesParser.create().parse_override(text)
    key = override.key_or_group
    if key in GROUPS:
        known = choices(key, extra)
        value = override.value()
        if isinstance(value, str) and value not in known:
            raise HarnessError(f"{key}={value}: no such choice.{did_you_mean(value, known)} Known: {', '.join(known)}.")
    elif not text.startswith(("~", "hydra.")) and not key.startswith(_FREE_KEYS):
        known = list(known_keys())
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise HarnessError(f"{key}: no such option.{did_you_mean(key, [*known, *GROUPS])} `--cfg job` lists all.")


@cache
def known_keys() -> tuple[str, ...]:
    """Return every dotted key of the schema."""
    nodes = {**_NODES, "run": RunConfig, "metrics": MetricsConfig}
    return tuple(key for group, node in nodes.items() for key in _leaves(OmegaConf.structured(node), group))


def _leaves(cfg: DictConfig, prefix: str) -> Iterator[str]:
    for key in cfg:
        path = f"{prefix}.{key!s}"
        value = None if OmegaConf.is_missing(cfg, key) else cfg[key]
        if isinstance(value, DictConfig) and len(value):
            yield from _leaves(value, path)
        yield path


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    skip = (
        "full_key:",
        "object_type=",
        "Set the environment",
        "reference_type=",
        "See https",
        "Config search path",
    )
    text = " ".join(line for line in lines if not line.startswith(skip))
    key = re.search(r"full_key: (\S+)", f"{error}\n{cause or ''}")
    choice = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text)
    if choice and key:
        known = choice[2].split(", ")
        return f"{key[1]}={choice[1]}: unknown value, expected one of {choice[2]}.{did_you_mean(choice[1], known)}"
    where = f" (key {key[1]})" if key and key[1] not in text else ""
    given = " ".join(overrides) or "(nothing)"
    return f"The configuration is not valid{where}: {text or type(error).__name__}. Given: {given}"
