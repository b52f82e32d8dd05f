"""The YAML files of ``conf/``: where they are, which choices there are, and what is written in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def conf_dir() -> Path:
    """Return the folder of the YAML choices: inside the wheel, or the repository's conf/."""
    package = Path(__file__).parents[1]
    packaged = package / "conf"
    return packaged if packaged.is_dir() else package.parents[1] / "conf"


_ADE20K = "ADEChallengeData2016"


def data_places() -> list[Path]:
    """Return where ADE20K is looked for if nothing says where it is: here, and where `data download` puts it."""
    from ade_harness.files.fetch import cache_dir  # here: reading a choice needs no HTTP

    return [Path("data", _ADE20K), Path("data", f"{_ADE20K}.zip"), Path(_ADE20K), cache_dir() / "data" / _ADE20K]


def choices(group: str, extra: Path | None = None) -> list[str]:
    """Return the names that a config group offers.

    Args:
        group: such as ``model``.
        extra: folder of ``--config-dir``.
    """
    folders = [conf_dir(), *([extra] if extra else [])]
    return sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})


def read_choice(group: str, name: str, extra: Path | None = None) -> dict[str, Any]:
    """Return what a choice's file says, with the files of its group below it; much faster than composing.

    Args:
        group: such as ``model``.
        name: of a file of the group.
        extra: folder of ``--config-dir``, which takes precedence.
    """
    folders = [*([extra] if extra else []), conf_dir()]
    paths = [folder / group / f"{name}.yaml" for folder in folders]
    path = next((path for path in paths if path.is_file()), paths[-1])
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    merged: dict[str, Any] = {}
    for below in content.pop("defaults", ()):
        if isinstance(below, str) and below not in ("schema", "_self_"):
            merged |= read_choice(group, below, extra)
    merged |= content
    return merged
