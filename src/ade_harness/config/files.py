"""The YAML files of ``conf/``: where they are, which choices there are, and what is written in one."""

from __future__ import annotations

import math
import os
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ade_harness.errors import HarnessError

UNREADABLE = (yaml.YAMLError, UnicodeError, RecursionError)
"""What YAML and Hydra raise of a file that is no YAML in UTF-8, or nested without end."""
_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000
_MAX_ALIASES_BYTES = 16 << 20
"""Largest file that is searched for aliases; no choice is so large."""
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def conf_dir() -> Path:
    """Return the folder of the YAML choices: inside the wheel, or the repository's conf/."""
    package = Path(__file__).parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


_ADE20K = "ADEChallengeData2016"


def default_data_roots() -> list[Path]:
    """Return where ADE20K is looked for if nothing says where it is: here, and where `data download` puts it."""
    from ade_harness.files.fetch import cache_dir  # here: reading a choice needs no HTTP

    return [Path("data", _ADE20K), Path("data", f"{_ADE20K}.zip"), Path(_ADE20K), cache_dir() / "data" / _ADE20K]


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Return the names that a config group offers.

    Args:
        group: such as ``model``.
        extra: folder of ``--config-dir``.

    Returns:
        Names of its files, and of those in folders below it (``model=lab/mine``).
    """
    folders = [conf_dir(), *([extra] if extra else [])]
    roots = [folder / group for folder in folders]
    return sorted({p.relative_to(root).with_suffix("").as_posix() for root in roots for p in root.rglob("*.yaml")})


def read_choice(group: str, name: str, extra: Path | None = None) -> dict[str, Any]:
    """Return what a choice's file says, with the files of its group below it; much faster than composing.

    Args:
        group: such as ``model``.
        name: of a file of the group.
        extra: folder of ``--config-dir``, which takes precedence.

    Raises:
        HarnessError: a file that cannot be read, or that names itself among its defaults.
    """
    return _merged(group, name, extra, ())


def _merged(group: str, name: str, extra: Path | None, above: tuple[str, ...]) -> dict[str, Any]:
    folders = [*([extra] if extra else []), conf_dir()]
    paths = [folder / group / f"{name}.yaml" for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[-1])
    if name in above:
        raise HarnessError(f"{path}: its defaults are circular: {' -> '.join((*above, name))}.")
    content = _read(path)
    merged: dict[str, Any] = {}
    for below in content.pop("defaults", ()):
        named = below.partition("@")[0] if isinstance(below, str) else ""  # /model/demo@_here_ is demo
        named = named.removeprefix(f"/{group}/")
        if named not in ("", "schema", "_self_") and not named.startswith("/"):
            merged |= _merged(group, named, extra, (*above, name))
    merged |= content
    return merged


def _read(path: Path) -> dict[str, Any]:
    """Return the mapping that a file holds.

    Raises:
        HarnessError: names the file, the place and what was expected.
    """
    try:
        content = path.read_bytes()
        if len(content) > _MAX_BYTES:
            raise HarnessError(f"{path}: has {len(content):,} bytes; a configuration has at most {_MAX_BYTES:,}.")
        found = yaml.load(content.decode("utf-8-sig"), Loader=_Loader)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise HarnessError(f"{path}, line {line}: is not UTF-8. Save the file in that encoding.") from error
    except RecursionError as error:
        raise HarnessError(f"{path}: is nested too deeply to be read.") from error
    except yaml.YAMLError as error:
        raise HarnessError(f"{path}{_reason(error)}") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise HarnessError(f"{path}: holds a value that cannot be read ({str(error).partition(';')[0]}).") from error
    except OSError as error:
        raise HarnessError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if found is not None and not isinstance(found, dict):
        raise HarnessError(f"{path}: expected keys and values (`name: mine`), not {type(found).__name__}.")
    return found or {}


def refuse_bombs(folder: Path) -> None:
    """Refuse a folder of configurations in which a file's aliases stand for more values than memory holds.

    Hydra reads the file itself, and writes out every alias. What is no YAML at all is left to it: nobody may read it.
    Run directories below the folder are no configurations.

    Raises:
        HarnessError: names the file.
    """
    for place, below, names in os.walk(folder):
        below[:] = [] if "manifest.json" in names else sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if name.endswith(".yaml") and path.is_file():  # a pipe would be waited for
                found = path.stat()
                _refuse_bomb(path.resolve(), found.st_size, found.st_mtime_ns)


@cache
def _refuse_bomb(path: Path, size: int, changed: int) -> None:
    """Raise HarnessError for one file; `changed`: when, so that each state of it is looked at once."""
    try:
        content = path.read_bytes() if size <= _MAX_ALIASES_BYTES else b""
        if not (b"&" in content and b"*" in content):
            return
        node = yaml.compose(content.decode("utf-8-sig"), Loader=_Loader)
        number = 0 if node is None else _values(node, {})
    except (yaml.YAMLError, OSError, UnicodeError, RecursionError, ValueError):
        return
    if number > _MAX_VALUES:
        raise HarnessError(
            f"{path}: its aliases (*) stand for more than {_MAX_VALUES:,} values. Write out what is meant."
        )


def _values(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node is once all aliases are written out."""
    if id(node) not in known:
        known[id(node)] = math.inf  # of a node that holds itself
        below: Any = node.value if isinstance(node, yaml.CollectionNode) else ()
        nodes = (one for item in below for one in (item if isinstance(item, tuple) else (item,)))
        known[id(node)] = 1 + sum(_values(one, known) for one in nodes)
    return known[id(node)]


def _reason(error: yaml.YAMLError) -> str:
    """Return where YAML stumbled, and over what."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    reason = problem or " ".join(str(error).split())
    hint = " YAML is indented by spaces." if "'\\t'" in reason or "\\t" in reason else ""
    return f"{where}: is not plain YAML ({reason[:200]}).{hint}"


def unreadable_file(error: Exception) -> str | None:
    """Return what is wrong with the file that Hydra was reading when an error was raised; None if it can be read.

    Neither Hydra nor Python's codecs name it: it is the last ``*.yaml`` among the values of the functions that were
    running.
    """
    places = [
        value
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if "config_source" in frame.f_code.co_filename
        for value in frame.f_locals.values()
        if isinstance(value, str) and value.endswith(".yaml") and Path(value).is_file()
    ]
    try:
        _ = _read(Path(places[-1])) if places else None
    except HarnessError as found:
        return str(found)
    if isinstance(error, RecursionError):
        return f"{places[-1] if places else 'a file'}: is nested too deeply, or its defaults are circular."
    return None
