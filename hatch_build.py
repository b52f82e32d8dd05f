"""Writes the commit into what is built, so that an installed package knows which code it is: `pip install .` too.

Hatchling calls it. An editable installation needs nothing: its checkout is asked when a run starts.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NAME = "built_from.json"


class CommitHook(BuildHookInterface):
    """Adds ``ade_harness/built_from.json``: commit, origin, whether the tree was changed, and a hash of the changes."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        if version == "editable":
            return
        root = Path(self.root)
        packed = root / "src/ade_harness" / NAME  # in a source distribution, which has no git
        target = f"src/ade_harness/{NAME}" if self.target_name == "sdist" else f"ade_harness/{NAME}"
        found = state_of(root)
        if found is None:
            return  # `packed` is collected like any other file, if it is there
        if packed.exists():
            raise SystemExit(f"{packed}: belongs into source distributions alone. Remove it from the checkout.")
        folder = Path(tempfile.mkdtemp(prefix="ade-harness-build-"))
        (folder / NAME).write_text(json.dumps(found, indent=2) + "\n")
        build_data["force_include"][str(folder / NAME)] = target


def state_of(root: Path) -> dict[str, Any] | None:
    """Return the state of the checkout whose root this is; None if it is none."""
    top = git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top.strip()).resolve() != root.resolve():
        return None
    commit, origin = git(root, "rev-parse", "HEAD"), git(root, "remote", "get-url", "origin")
    diff = git(root, "diff", "HEAD", "--no-ext-diff") or ""
    deciding = git(root, "diff", "HEAD", "--no-ext-diff", "--", "src", "conf") or ""
    trees = git(root, "rev-parse", "HEAD:src", "HEAD:conf")
    source = (trees or "").partition("\n")[0] + (git(root, "diff", "HEAD", "--no-ext-diff", "--", "src") or "")
    for name in (git(root, "ls-files", "--others", "--exclude-standard", "src", "conf") or "").splitlines():
        new = f"\n+++ new file {name}\n{(root / name).read_text(errors='replace')}"
        diff, deciding, source = diff + new, deciding + new, source + (new if name.startswith("src/") else "")
    return {
        "commit": commit.strip() if commit else None,
        "origin": re.sub(r"//[^/@]*@", "//", origin.strip()) if origin else None,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(deciding.encode()).hexdigest() if deciding else None,
        "tree": hashlib.sha256(trees.encode()).hexdigest() if trees else None,
        "src": hashlib.sha256(source.encode()).hexdigest() if trees else None,
    }


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints; None if it fails or is not there."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
