"""The files of a submission from which somebody else repeats it: a script, a container, exact versions."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

SCRIPT, DOCKERFILE, CONSTRAINTS = "reproduce.sh", "Dockerfile", "constraints.txt"


def script_files(declaration: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of reproduce.sh, Dockerfile and constraints.txt: a pure function of the declaration.

    Args:
        declaration: the content of submission.yaml, checked (:mod:`ade_harness.leaderboard.submission.declaration`).
    """
    return {SCRIPT: _script(declaration), DOCKERFILE: _dockerfile(declaration), CONSTRAINTS: _constraints(declaration)}


def _plain(text: Any) -> str:
    """Return one line for a comment, whatever the text holds."""
    return re.sub(r"[^\x20-\x7e]", "?", str(text))


def _python(declaration: Mapping[str, Any]) -> str:
    """Return major.minor."""
    return ".".join(str(declaration["environment"]["python"]).split(".")[:2])


def _script(declaration: Mapping[str, Any]) -> str:
    code = declaration["code"]
    command = " ".join(map(shlex.quote, declaration["command"]))
    seeds = _plain(", ".join(f"{name}={value}" for name, value in declaration["seeds"].items()))
    score = f"{declaration['results'][0]['value']:.2f}"
    return f"""\
#!/usr/bin/env bash
# Repeats: {_plain(declaration["system"])}, mIoU {score}. Needs git, Python {_python(declaration)} and the data set.
#   ADE20K_ROOT=/path/to/ADEChallengeData2016 ./{SCRIPT} [runtime.devices=8 ...]
# ADE_HARNESS_REPOSITORY names a mirror of the repository, WORK the folder for code and virtual environment,
# PYTHON the interpreter.
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
: "${{ADE20K_ROOT:?set it to the folder or zip of ADEChallengeData2016}}"
repository=${{ADE_HARNESS_REPOSITORY:-{shlex.quote(code["repository"])}}}
commit={code["commit"]}
work=${{WORK:-$PWD/ade-harness-${{commit:0:12}}}}

[ -e "$work/.git" ] || git clone --quiet "$repository" "$work"
git -C "$work" checkout --quiet --detach "$commit"
[ -x "$work/.venv/bin/python" ] || "${{PYTHON:-python{_python(declaration)}}}" -m venv "$work/.venv"
"$work/.venv/bin/python" -m pip install -q -c "$bundle/{CONSTRAINTS}" -e "$work"

# This runs the evaluation again and compares it image by image. The evaluation alone, its seeds frozen
# ({seeds}), is
#   python -m ade_harness {command} dataset.root="$ADE20K_ROOT"
exec "$work/.venv/bin/python" -m ade_harness reproduce "$bundle" dataset.root="$ADE20K_ROOT" "$@"
"""


def _dockerfile(declaration: Mapping[str, Any]) -> str:
    code, environment = declaration["code"], declaration["environment"]
    machine = {
        "machine": f"{environment['platform']}, {environment['cpu']}",
        "GPU": ", ".join(environment["gpus"]) or "none",
        "CUDA": environment["cuda"],
        "driver": environment["driver"],
    }
    measured = "\n".join(f"# {name}: {_plain(value)}" for name, value in machine.items())
    return f"""\
# Measured on
{measured}
#   docker build -t submission .
#   docker run --gpus all --ipc=host -v /path/to/ADEChallengeData2016:/data:ro -v "$PWD/again:/again" submission
FROM python:{_python(declaration)}-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
RUN git clone {shlex.quote(code["repository"])} /ade-harness && git -C /ade-harness checkout --detach {code["commit"]}
COPY {CONSTRAINTS} /tmp/{CONSTRAINTS}
RUN pip install --no-cache-dir -c /tmp/{CONSTRAINTS} -e /ade-harness
COPY . /submission
ENTRYPOINT ["python", "-m", "ade_harness", "reproduce", "/submission", "dataset.root=/data", "--output", "/again/run"]
"""


def _constraints(declaration: Mapping[str, Any]) -> str:
    """Return pins; a build's name (2.13.0+cpu) is no version that an index has, so it is a comment."""
    lines = [
        f"# Versions of the run, Python {declaration['environment']['python']}; content hashes are in submission.yaml"
    ]
    for name, package in declaration["environment"]["packages"].items():
        version, _, build = str(package["version"]).partition("+")
        lines.append(f"{name}=={version}{f'  # build {build}' if build else ''}")
    return "\n".join(lines) + "\n"
