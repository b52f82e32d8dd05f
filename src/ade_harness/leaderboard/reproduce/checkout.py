"""Another commit of this package's own repository, as a temporary worktree."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ade_harness
from ade_harness.errors import HarnessError

_TIMEOUT_S = 300


@dataclass(frozen=True)
class Code:
    """Where the code of a repetition is."""

    environment: Mapping[str, str]
    """What Python needs to import it."""
    remarks: tuple[str, ...]
    """Why it is not the code of the run."""


@contextmanager
def checked_out_code(recorded: Mapping[str, Any], current: Mapping[str, Any], trusted: bool) -> Iterator[Code]:
    """Give the code that a run was made with, or this one and a remark.

    Args:
        recorded: ``code`` of the run's manifest.
        current: :func:`ade_harness.runs.provenance.code_state` of now.
        trusted: whether the run is one's own. Somebody else's may name a commit from before a hole was closed.

    Yields:
        The run's commit in a worktree that is removed afterwards; or this code, if it is that commit, or if this
        installation has no such commit.

    Raises:
        HarnessError: git cannot make the worktree.
    """
    commit = recorded.get("commit")
    if commit is not None and all(recorded.get(k) == current.get(k) for k in ("commit", "diff_sha256")):
        yield Code({}, ())
        return
    remarks = []
    if recorded.get("dirty"):
        remarks.append("the run had uncommitted changes (its code.diff), which are not applied")
    if commit is None:
        remarks.append(f"the run was made by an installed version {recorded.get('version')}, without a commit")
        yield Code({}, tuple(remarks))
        return
    root = Path(ade_harness.__file__).parents[2]
    installed = current["commit"] is None or current.get("built", False)
    if installed or not re.fullmatch(r"[0-9a-f]{7,64}", commit) or not _has(root, commit):
        where = "this is no git checkout" if installed else f"{root} has no such commit: git fetch"
        remarks.append(f"the run's commit {commit[:12]} is not here ({where}), so this code repeats it")
        yield Code({}, tuple(remarks))
        return
    if not trusted:
        remarks.append(
            f"the run's commit {commit[:12]} is not checked out, as the run was not made by you on this machine: this"
            " code repeats it (--trust checks it out)"
        )
        yield Code({}, tuple(remarks))
        return
    if not _is_known(root, commit):
        remarks.append(
            f"the run's commit {commit[:12]} is neither in the history of HEAD nor in a branch of {root}, so this code"
            " repeats it: look at that commit, and check it out if it is trusted"
        )
        yield Code({}, tuple(remarks))
        return
    with tempfile.TemporaryDirectory(prefix="ade-harness-") as folder:
        tree = Path(folder) / "worktree"
        _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            path = os.pathsep.join([str(tree / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
            yield Code({"PYTHONPATH": path}, tuple(remarks))
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _has(root: Path, commit: str) -> bool:
    try:
        _git(root, "cat-file", "-e", f"{commit}^{{commit}}")
    except HarnessError:
        return False
    return True


def _is_known(root: Path, commit: str) -> bool:
    """Whether a commit is in the user's own history: what a pull request or a fork has brought is not."""
    return bool(_git(root, "for-each-ref", "--contains", commit, "--count=1", "refs/heads")) or not _git(
        root, "rev-list", "--max-count=1", commit, "^HEAD"
    )


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
        )  # fmt: skip
        return str(done.stdout)
    except subprocess.CalledProcessError as error:
        reported = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise HarnessError(
            f"{root}: git {arguments[0]} failed ({reported}). Check the repository, then try again."
        ) from error
    except (OSError, subprocess.SubprocessError) as error:
        raise HarnessError(f"git {arguments[0]} failed ({error}). Is git installed?") from error
