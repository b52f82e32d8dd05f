"""The run's configuration: typed, composed by Hydra, checked before anything is loaded.

Every field here can be set on the command line as ``group.field=value``; the YAML files in ``conf/`` are named
choices of these fields. An unknown key, a value of the wrong type or out of range is one clear message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ade_harness.config.arguments import (
    NODES,
    OWN_PROTOCOLS,
    known_choices,
    own_protocol,
    prepare,
    quote,
    without_interpolations,
)
from ade_harness.config.dataset import DatasetKind
from ade_harness.config.fields import check_lists, check_ranges
from ade_harness.config.files import UNREADABLE, choices, conf_dir, default_data_roots, refuse_bombs, unreadable_file
from ade_harness.config.inference import InferenceConfig
from ade_harness.config.kinds import kind_of
from ade_harness.config.labels import distinct_label
from ade_harness.config.plain import as_dict
from ade_harness.config.runtime import SlurmConfig
from ade_harness.config.saved import AS_SAVED, apply_saved
from ade_harness.config.schema import Config
from ade_harness.config.validate import unread_lengths, validate
from ade_harness.errors import HarnessError, did_you_mean, require
from ade_harness.files.escapes import without_long_words

_LAUNCHERS: dict[str, dict[str, Any]] = {
    "process": {},
    "one_job": {"number": None},
    "list": {},
    "slurm": dict.fromkeys(SlurmConfig.__dataclass_fields__),
}
"""Hydra launchers of :mod:`hydra_plugins.ade_harness_launchers`; null of slurm's: what ``runtime.slurm`` says."""


_NO_VALUE = (OmegaConfBaseException, OverflowError)
"""What OmegaConf raises of a value that a field does not take; the second of whole numbers beyond any float."""
_PLAINEST = {"model": "custom", "dataset": "demo", "inference": "original_size"}


def register_schemas() -> None:
    """Tell Hydra the types, unless its store has them."""
    store = ConfigStore.instance()
    known = store.repo.get("schema.yaml")
    if known is not None and OmegaConf.get_type(known.node) is Config:
        return
    store.store(name="schema", node=Config)
    for group, node in NODES.items():  # `schema` has all these types: this is for users' files that name it
        store.store(group=group, name="schema", node=node)
    for name, settings in _LAUNCHERS.items():
        target = f"hydra_plugins.ade_harness_launchers.{name.title().replace('_', '')}Launcher"
        store.store(group="hydra/launcher", name=name, node={"_target_": target, **settings}, provider="ade_harness")


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
    if extra is not None:
        refuse_bombs(extra)
    ready = prepare(overrides, extra)
    tree = compose_tree(ready, extra)
    kind = "" if OmegaConf.is_missing(tree.inference, "name") else str(tree.inference.name)
    if kind in OWN_PROTOCOLS:  # a file has chosen the model
        tree = compose_tree(with_own_protocol(ready, kind, tree), extra)
    return checked(tree)


def with_own_protocol(overrides: Sequence[str], kind: str, tree: DictConfig) -> list[str]:
    """Return overrides that choose the own protocol of the model that was composed.

    Args:
        overrides: of Hydra's grammar.
        kind: a key of OWN_PROTOCOLS.
        tree: what they compose.

    Raises:
        HarnessError: no such protocol was published.
    """
    name = own_protocol(kind, str(tree.model.name), tree.model.protocols)
    return [*(text for text in overrides if text != f"inference={kind}"), f"inference={name}"]


def compose_tree(overrides: Sequence[str], extra: Path | None = None) -> DictConfig:
    """Compose Hydra's tree of a configuration, in which mandatory values may be missing; raises as above."""
    try:
        return _composed(overrides, extra)
    except (HydraException, ValueError, *_NO_VALUE, *UNREADABLE) as error:  # ValueError: of overrides of groups
        raise HarnessError(explain(error, overrides)) from error


def _composed(overrides: Sequence[str], extra: Path | None, **options: bool) -> DictConfig:
    """Compose with Hydra's own errors; `options` are those of :func:`hydra.compose`."""
    register_schemas()
    GlobalHydra.instance().clear()
    search = [f"hydra.searchpath=[{quote(f'file://{extra.resolve()}')}]"] if extra else []
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        return compose("config", overrides=[*overrides, *search], **options)


def files_choose_sweep(overrides: Sequence[str], extra: Path) -> bool:
    """Whether files of the user's set ``hydra.mode`` to MULTIRUN: then overrides may hold sweeps.

    Args:
        overrides: of the command.
        extra: folder of ``--config-dir``. Hydra is asked only if one of its files has the word.
    """
    files = (path for path in extra.rglob("*.yaml") if path.is_file())  # a pipe would be waited for
    if not any(RunMode.MULTIRUN.name in _text_of(path) for path in files):
        return False
    parser = OverridesParser.create()
    try:
        single = [text for text in prepare(overrides, extra, multirun=True) if not _sweeps(parser, text)]
        return bool(_composed(single, extra, return_hydra_config=True).hydra.mode == RunMode.MULTIRUN)
    except (HydraException, ValueError, HarnessError, *_NO_VALUE, *UNREADABLE):
        return False  # the same will be said of the command


def _text_of(path: Path) -> str:
    """Return a file's text, and none of one that cannot be read: whoever needs it says so."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _sweeps(parser: OverridesParser, text: str) -> bool:
    return bool(parser.parse_override(text).is_sweep_override())


def checked(tree: DictConfig) -> Config:
    """Return the typed and validated configuration of a composed tree.

    Raises:
        HarnessError: a mandatory value that is missing, an interpolation that cannot be resolved, a value out of range,
            or one that has no effect.
    """
    config = _validated(tree)
    _refuse_unread(config)
    return config


def _validated(tree: DictConfig) -> Config:
    """Return the typed configuration of a tree, also of one that an earlier version took; raises as `checked`."""
    try:
        missing = sorted(OmegaConf.missing_keys(tree))
        if missing:
            raise HarnessError(f"{missing[0]} must be set: add {missing[0]}=... to the command.")
        config = cast(Config, OmegaConf.to_object(tree))
    except _NO_VALUE as error:
        raise HarnessError(explain(error, ())) from error
    if config.dataset.kind == DatasetKind.ade20k and not config.dataset.root:
        config.dataset.root = next((str(place) for place in default_data_roots() if place.exists()), None)
    if config.inference.name == AS_SAVED and kind_of(config.model.kind).saves_protocol:
        apply_saved(config.inference, config.model, config.dataset.kind != DatasetKind.folder)
    validate(config)
    config.model.label = distinct_label(config.model)
    return config


def _refuse_unread(config: Config) -> None:
    """Refuse a length of the protocol that somebody has changed, and that has no effect; files may hold such."""
    unread = unread_lengths(config.inference)
    name = next((name for name in protocol_changes(config) if name in unread), None) if unread else None
    require(name is None, f"inference.{name}: has no effect: {unread.get(name or '')}. Remove it, or change that.")


def packaged_choices(config: Config) -> list[str]:
    """Return the overrides that choose the package's files of a configuration, or the plainest where it has its own."""
    names = {group: getattr(config, group).name for group in _PLAINEST}
    return [f"{group}={names[group] if names[group] in choices(group) else _PLAINEST[group]}" for group in _PLAINEST]


@cache
def packaged_tree(overrides: tuple[str, ...]) -> DictConfig:
    """Return what choices of packaged files compose; these do not change while a process runs."""
    return compose_tree(prepare(overrides))


def protocol_changes(config: Config) -> list[str]:
    """Return what of a protocol is not as the YAML file of its name says, such as ``tta.flip``.

    How it is computed (batches, precision, compilation) is not part of the protocol.
    """
    inference: InferenceConfig = config.inference
    if inference.name not in choices("inference"):
        return []
    # the same composition as that of `overrides_of`
    packaged: Any = OmegaConf.to_object(packaged_tree(tuple(packaged_choices(config))).inference)
    written, used = as_dict(packaged), as_dict(inference)
    changed = []
    for group in ("exif", "resize", "mode", "window", "tta", "masks", "output"):
        one, two = written[group], used[group]
        if isinstance(one, dict):
            changed += [f"{group}.{key}" for key in one if one[key] != two[key]]
        elif one != two:
            changed.append(group)
    return changed


def stored_config(content: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Return the configuration that a run was made with, with some changes.

    Args:
        content: of its config.yaml, plain values: an interpolation in it stays a text.
        overrides: as of :func:`compose_config`.

    Raises:
        HarnessError: as :func:`compose_config`; or the text is no configuration of this version.
    """
    overrides = prepare(overrides)
    try:
        tree = cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(_literal(content))))
    except (*_NO_VALUE, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise HarnessError(
            f"config.yaml is damaged, or of another version ({str(error).splitlines()[0]}). Start a new run."
        ) from error
    if overrides:
        composed = compose_tree(overrides)  # every mistake in them is found here
        for override in OverridesParser.create().parse_overrides(list(overrides)):
            key = override.key_or_group
            with open_dict(tree):
                OmegaConf.update(tree, key, OmegaConf.select(composed, key), merge=False)
    return _validated(tree)


def _literal(value: Any) -> Any:
    """Return plain values whose texts mean themselves to OmegaConf: what a run has stored is resolved already."""
    if isinstance(value, Mapping):
        return {key: _literal(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_literal(below) for below in value]
    return without_interpolations(value) if isinstance(value, str) else value


def stored_node(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Return one node of a stored configuration.

    Args:
        kind: its dataclass.
        content: plain values, of config.yaml.

    Raises:
        HarnessError: it is no such node.
    """
    try:
        node = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), _literal(content)))
    except (*_NO_VALUE, ValueError) as error:
        raise HarnessError(f"config.yaml is damaged, or of another version ({str(error).splitlines()[0]}).") from error
    check_lists(node)
    check_ranges(node)
    return node


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Return an error of Hydra, OmegaConf or YAML as one message that names the key or the file, and what was given."""
    broken = unreadable_file(error) if isinstance(error, (*UNREADABLE, ValueError)) else None
    if broken is not None:
        return broken
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
    absent = re.search(
        r"Could not find '(\S+)/([^'/]+)'\s+Available options in '[^']+':\s+(.*?)(?:\s+provider=|$)", text
    )
    if absent:
        known = [name for name in absent[3].split() if name != "schema"]
        return f"{absent[1]}={absent[2]}: unknown value.{known_choices(absent[1], absent[2], known)}"
    choice = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", text)
    if choice and key:
        known = choice[2].split(", ")
        return f"{key[1]}={choice[1]}: unknown value, expected one of {choice[2]}.{did_you_mean(choice[1], known)}"
    if "is not a ListConfig, list or tuple" in text:
        single = re.search(r"Error merging override \+*([^=\s]+)=(.*?) Invalid value", text)
        name, value = (single[1], single[2]) if single else (key[1] if key else "a key", "...")
        if value in ("true", "false"):
            return f"{name}={value}: expected a list of texts or numbers: {name}=[...]."
        return f"{name}={value}: expected a list: {name}=[{value}]."
    where = f" (key {key[1]})" if key and key[1] not in text else ""
    given = f" Given: {' '.join(overrides)}" if overrides else ""
    other = f"The configuration is not valid{where}: {(text or type(error).__name__).rstrip('.')}.{given}"
    # Hydra says an override up to three times
    return without_long_words(_wrong_type(text, key[1] if key else "") or other, _MAX_WORD)


_MAX_WORD = 1000
"""Characters of an override in a message."""


_TYPES = {
    "Integer": "an integer", "Float": "a number", "bool": "true or false",
    "List": "a list", "Dict": "keys and values",
}  # fmt: skip
"""What OmegaConf converts to, in words."""


def _wrong_type(text: str, key: str) -> str | None:
    """Return in one sentence what OmegaConf says of a value of another type than its key's; None if it is about others.

    Args:
        text: its message.
        key: that it names; "" if it names none.
    """
    merged = re.search(
        r"Error merging override \+*([^=\s]+)=(.*?) (?:Value '|Invalid type|Cannot (?:merge|assign|convert))", text
    )
    cast = re.search(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", text)
    cast = cast or re.search(r"Value '(.*)' is not a valid (bool)( )\(", text)
    assigned = re.search(r"Cannot assign \w+ to (\w+)", text)
    wanted = _TYPES.get((cast[3].strip() or cast[2]) if cast else assigned[1] if assigned else "")
    if merged and "is not a subclass of" in text:
        wanted = "keys and values"
    if merged and re.search(r"Cannot convert '\w+' to string", text):
        wanted = "a text"
    if merged and "Cannot merge DictConfig with ListConfig" in text:  # whichever of the two was given
        wanted = "keys and values" if merged[2].startswith("[") else "a list"
    name = key if cast and key else merged[1] if merged else key
    if wanted is None or not name:
        return None
    return f"{name}={cast[1] if cast else merged[2] if merged else '...'}: expected {wanted}."
