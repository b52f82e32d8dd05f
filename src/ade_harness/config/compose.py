"""The run's configuration: typed, composed by Hydra, checked before anything is loaded.

Every field here can be set on the command line as ``group.field=value``; the YAML files in ``conf/`` are named
choices of these fields. An unknown key, a value of the wrong type or out of range is one clear message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ade_harness.config.schema import (
    Config,
    DatasetConfig,
    InferenceConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    RuntimeConfig,
    TrackingConfig,
)
from ade_harness.config.validate import validate
from ade_harness.errors import HarnessError, did_you_mean

_FREE_KEYS = ("model.kwargs.", "model.architecture.", "runtime.slurm.extra.")
GROUPS = ("model", "dataset", "inference", "runtime", "tracking")


def conf_dir() -> Path:
    """Return the folder of the YAML choices: inside the wheel, or the repository's conf/."""
    package = Path(__file__).parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


def register_schemas() -> None:
    """Tell Hydra the types."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, node in (
        ("model", ModelConfig),
        ("dataset", DatasetConfig),
        ("inference", InferenceConfig),
        ("runtime", RuntimeConfig),
        ("tracking", TrackingConfig),
    ):
        store.store(group=group, name="schema", node=node)


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Return the names that a config group offers."""
    folders = [conf_dir(), *([extra] if extra else [])]
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def compose_config(overrides: Sequence[str], extra: Path | None = None) -> DictConfig:
    """Compose and check a configuration.

    Args:
        overrides: Hydra overrides, such as ``model=segformer_b0`` or ``dataset.limit=10``.
        extra: a folder of your own with the same groups, such as ``model/mine.yaml``.

    Raises:
        HarnessError: an unknown key or choice, a value of the wrong type or out of range.
    """
    register_schemas()
    if extra is not None and not extra.is_dir():
        raise HarnessError(f"--config-dir: {extra} is not a folder.")
    overrides = _own_protocol([_quote_address(o) for o in overrides], extra)
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[file://{extra.resolve()}]"] if extra else []
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            for text in overrides:
                _check_override(text, extra)
            cfg = compose("config", overrides=[*map(open_dict_word, overrides), *search])
    except (HydraException, OmegaConfBaseException) as error:
        raise HarnessError(_explain(error, overrides)) from error
    _check_missing(cfg)
    validate(cfg)
    return cfg


def _own_protocol(overrides: Sequence[str], extra: Path | None) -> list[str]:
    """Replace inference=ss and inference=ms by the name of the model's own protocol."""
    chosen = next((o for o in overrides if o in ("inference=ss", "inference=ms")), None)
    if chosen is None:
        return list(overrides)
    kind = chosen[-2:]
    model = compose_config([o for o in overrides if o.startswith("model=")], extra).model
    name = model.protocols[kind]
    if name is None:
        have = [f"inference={k} ({v})" for k, v in model.protocols.items() if v is not None]
        what = "single-scale" if kind == "ss" else "multi-scale"
        raise HarnessError(
            f"{chosen}: no {what} protocol was published for model={model.name}."
            f" {'It has ' + ', '.join(have) + '.' if have else 'Choose one by name: inference=NAME.'}"
        )
    return [f"inference={name}" if o == chosen else o for o in overrides]


def protocol_changes(inference: DictConfig) -> list[str]:
    """Return what of a protocol is not as the YAML file of its name says, such as ``tta.flip``.

    How it is computed (batches, precision, compilation) is not part of the protocol.
    """
    if inference.name not in choices("inference"):
        return []
    written: Any = OmegaConf.to_container(compose_config([f"inference={inference.name}"]).inference, resolve=True)
    used: Any = OmegaConf.to_container(inference, resolve=True)
    changed = []
    for group in ("exif", "resize", "mode", "window", "tta", "masks", "output"):
        one, two = written[group], used[group]
        if isinstance(one, dict):
            changed += [f"{group}.{key}" for key in one if one[key] != two[key]]
        elif one != two:
            changed.append(group)
    return changed


def stored_config(text: str, overrides: Sequence[str]) -> DictConfig:
    """Return the configuration that a run was made with, with some changes.

    Args:
        text: of its config.yaml.
        overrides: as of :func:`compose_config`.

    Raises:
        HarnessError: as :func:`compose_config`; or the text is no configuration of this version.
    """
    overrides = [_quote_address(o) for o in overrides]
    composed = compose_config(overrides)  # every mistake in them is found here
    try:
        cfg = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise HarnessError(
            f"config.yaml is damaged, or of another version ({str(error).splitlines()[0]}). Start a new run."
        ) from error
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        with open_dict(cfg):
            OmegaConf.update(cfg, key, OmegaConf.select(composed, key), merge=False)
    validate(cfg)
    return cfg


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
    nodes = (ModelConfig, DatasetConfig, InferenceConfig, RuntimeConfig, TrackingConfig, RunConfig, MetricsConfig)
    pairs = zip((*GROUPS, "run", "metrics"), nodes, strict=True)
    return tuple(key for group, node in pairs for key in _leaves(OmegaConf.structured(node), group))


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
    where = f" (key {key[1]})" if key and key[1] not in text else ""
    given = " ".join(overrides) or "(nothing)"
    return f"The configuration is not valid{where}: {text or type(error).__name__}. Given: {given}"


def _check_missing(cfg: DictConfig) -> None:
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise HarnessError(f"{missing[0]} must be set: add {missing[0]}=... to the command.")
