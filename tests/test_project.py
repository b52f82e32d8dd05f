"""The project itself: imports go one way, the wheel is whole, the README is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "ade_harness"
ORDER = (
    "errors", "runtime", "config", "config_words", "data", "models", "inference", "kernels", "runs", "metrics", "report", "tracking", "leaderboard",
)  # fmt: skip
ALLOWED_BACK = {("inference", "kernels")}


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ade_harness"):
            part = node.module.split(".")[1] if "." in node.module else ""
            names |= {part} if part else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("package", [p for p in ORDER if (SOURCE / p).is_dir()])
def test_a_module_imports_only_from_its_left(package: str) -> None:
    allowed = set(ORDER[: ORDER.index(package) + 1])
    for path in (SOURCE / package).glob("*.py"):
        for name in imports_of(path) - allowed:
            assert (package, name) in ALLOWED_BACK, f"{path.name} imports {name}"


def test_runtime_knows_nothing_of_segmentation() -> None:
    for path in (SOURCE / "runtime").glob("*.py"):
        assert imports_of(path) <= {"errors", "runtime"}, path.name


def test_metrics_know_neither_files_nor_ranks() -> None:
    for path in (SOURCE / "metrics").glob("*.py"):
        assert imports_of(path) <= {"errors", "data", "runs", "metrics"}
        assert not re.search(r"\bopen\(|import torch\.distributed|Path\(", path.read_text()), path.name


def test_the_story_stays_short() -> None:
    assert len((SOURCE / "evaluation.py").read_text().splitlines()) <= 150


@pytest.mark.slow
def test_the_wheel_holds_configuration_weights_and_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert f"ade_harness/conf/{path.relative_to(REPOSITORY / 'conf')}" in names
    assert "ade_harness/models/demo_network.safetensors" in names
    assert "ade_harness/data/ade20k_validation_sizes.csv" in names
    assert "ade_harness/leaderboard/published.yaml" in names
    assert not [n for n in names if n.startswith("tests")]


def test_malicious_and_unfitting_versions_are_excluded() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert "!=2.6.2,!=2.6.3" in text
    assert "omegaconf>=2.3,<2.4" in text
    pins = (REPOSITORY / "constraints.txt").read_text()
    assert "://" not in pins
    assert re.search(r"^lightning==(?!2\.6\.[23]$)", pins, re.M)


def test_every_protocol_has_a_source_and_stands_in_the_docs() -> None:
    page = (REPOSITORY / "docs" / "protocols.md").read_text()
    files = sorted((REPOSITORY / "conf" / "inference").glob("*.yaml"))
    assert len(files) > 25
    for path in files:
        text = yaml.safe_load(path.read_text())
        assert text["name"] == path.stem
        assert text["source"], path
        assert f"`{path.stem}`" in page, path


_DISTRIBUTION = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra-core"}
_OPTIONAL = {
    "submitit",
    "triton",
    "timm",
    "wandb_workspaces",
}  # imported where they are used, with a message that names them


def test_what_is_imported_is_declared() -> None:
    """The package must work without the development extras: each import is a declared dependency."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!; \[]", d)[0].lower().replace("-", "_") for d in declared}
    for file in sorted((REPOSITORY / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {m.partition(".")[0] for m in modules} - sys.stdlib_module_names - {"ade_harness"}:
                wanted = _DISTRIBUTION.get(module, module).lower().replace("-", "_")
                assert module in _OPTIONAL or wanted in names, f"{file.name} imports {module}"
