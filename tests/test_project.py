"""The project itself: imports go one way, the wheel is whole, the README is true."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from ade_harness.runs.provenance import code_state, describe_code
from tests.conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "ade_harness"
ORDER = (
    "errors", "files", "config", "runtime", "data", "kernels", "models", "inference", "endpoint", "metrics", "runs",
    "report", "tracking", "leaderboard", "evaluation", "probe", "api", "cli",
)  # fmt: skip
"""A module imports only from packages to its left, and from its own without a cycle. docs/architecture.md says why."""
NAMED = {"config.kinds": {"models", "inference", "endpoint"}, "config.compose": {"hydra_plugins"}}
"""What tables of a module name as text, to be imported by what lies to the right: each kind of model has its line."""
PLUGINS = sorted((REPOSITORY / "src" / "hydra_plugins").glob("*.py"))
"""Found by Hydra, which takes plugins from nowhere else: what sweeps start with, to the right of everything but `cli`."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: a relative import"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ade_harness":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                deeper = f"{base}.{alias.name}".lstrip(".")
                # the package's own names are those of `api`, to the right of all that could ask for them here
                assert base or deeper in MODULES or alias.name.startswith("__"), (
                    f"{path}: from ade_harness import {deeper}"
                )
                found.add(deeper if deeper in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("ade_harness.")}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ade_harness":
            assert node.attr.startswith("__"), f"{path}: ade_harness.{node.attr}"
    return found - {""}


def test_the_written_order_is_the_one_that_is_tested() -> None:
    text = (REPOSITORY / "docs/architecture.md").read_text()
    written = re.search(r"\n\n    (errors, [\w,\s]+?)\n\n", text)
    assert written is not None
    assert tuple(written[1].replace(",", " ").split()) == ORDER


def named_in(path: Path) -> set[str]:
    """Return the packages of modules that texts of a file name: ``ade_harness.models.systems``, ``hydra_plugins.x``."""
    constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    texts = [text for text in constants if isinstance(text, str)]
    found = {m[1] for text in texts if (m := re.fullmatch(r"ade_harness\.(\w+)(?:\.\w+)+(?::\w+)?", text))}
    return (found & set(ORDER)) | {"hydra_plugins" for text in texts if text.startswith("hydra_plugins.")}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_its_place_in_the_order() -> None:
    assert {package_of(m) for m in MODULES} - {"__init__", "__main__", ""} <= set(ORDER)
    top = {p.name for p in SOURCE.iterdir() if p.suffix == ".py"}
    assert top <= {"__init__.py", "__main__.py", "errors.py", "api.py"}  # the hall stays empty


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) in ORDER])
def test_a_module_imports_only_from_its_left(module: str) -> None:
    allowed = set(ORDER[: ORDER.index(package_of(module)) + 1])
    assert {name for name in imports_of(MODULES[module]) if package_of(name) not in allowed} == set()


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) in ORDER])
def test_what_a_module_names_as_text_is_known(module: str) -> None:
    right = named_in(MODULES[module]) - set(ORDER[: ORDER.index(package_of(module)) + 1])
    assert right == NAMED.get(module, set())


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_import_nothing_that_imports_them(path: Path) -> None:
    assert PLUGINS
    for module in imports_of(path):
        assert package_of(module) in ORDER
        assert "hydra_plugins" not in MODULES[module].read_text() or module == "config.compose"


def test_no_modules_import_each_other_in_a_cycle() -> None:
    graph = {module: imports_of(path) & MODULES.keys() - {module} for module, path in MODULES.items()}
    while True:  # take away what imports nothing that is left
        leaves = [module for module, names in graph.items() if not names & graph.keys()]
        if not leaves:
            break
        for module in leaves:
            del graph[module]
    inside = {m: sorted(names & graph.keys()) for m, names in graph.items()}
    assert not inside, f"cycle among {inside}"


def test_runtime_knows_nothing_of_segmentation() -> None:
    for module, path in MODULES.items():
        if package_of(module) == "runtime":
            others = {m for m in imports_of(path) if package_of(m) not in ("errors", "files", "runtime")}
            assert others <= {"config.runtime"}, module


def test_metrics_know_neither_files_nor_ranks() -> None:
    for path in (SOURCE / "metrics").glob("*.py"):
        kernels = {"kernels"} if path.stem == "segmentation_scores" else set()  # counts what a training loop predicts
        assert {package_of(m) for m in imports_of(path)} <= {"errors", "data", "metrics"} | kernels
        assert not re.search(r"\bopen\(|import torch\.distributed|Path\(", path.read_text()), path.name


def test_the_story_stays_short() -> None:
    assert len((SOURCE / "evaluation" / "story.py").read_text().splitlines()) <= 100


@pytest.mark.slow
def test_the_wheel_holds_configuration_weights_and_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(REPOSITORY)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert f"ade_harness/conf/{path.relative_to(REPOSITORY / 'conf')}" in names
    assert "ade_harness/models/formats/demo_network.safetensors" in names
    assert "ade_harness/data/ade20k_validation_sizes.csv" in names
    assert "ade_harness/leaderboard/published.yaml" in names
    assert not [n for n in names if n.startswith("tests")]
    with zipfile.ZipFile(wheel) as archive:  # the commit is frozen into what is installed
        archive.extractall(tmp_path / "installed")
    found = code_state(tmp_path / "installed/ade_harness")
    here = code_state()
    assert found["built"]
    for key in ("commit", "dirty", "origin", "diff_sha256", "tree", "src"):
        assert found[key] == here[key]
    assert here["commit"] is not None
    assert here["commit"][:10] in describe_code(found)
    assert ("with uncommitted changes" in describe_code(found)) == here["dirty"]
    (tmp_path / "installed/ade_harness/built_from.json").write_text("{")
    assert code_state(tmp_path / "installed/ade_harness")["commit"] is None


def test_malicious_and_unfitting_versions_are_excluded() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert "!=2.6.2,!=2.6.3" in text
    assert "omegaconf>=2.3,<2.4" in text
    pins = (REPOSITORY / "constraints.txt").read_text()
    assert "://" not in pins
    assert re.search(r"^lightning==(?!2\.6\.[23]$)", pins, re.M)


def test_pinned_versions_install_on_the_oldest_python_that_is_promised() -> None:
    """Such as Debian 12's 3.11.2: some projects ask for a later patch of the same minor version."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.M))
    found = {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions()}
    looked_at = {n: found[c] for n in pins if (c := canonicalize_name(n)) in found and found[c].version == pins[n]}
    assert len(looked_at) > 100
    for name, distribution in looked_at.items():
        wanted = distribution.metadata.get("Requires-Python") or ""
        assert SpecifierSet(wanted).contains(oldest), f"{name}=={pins[name]} needs Python {wanted}"


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
    "segmentation_models_pytorch",
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


def test_no_message_advises_what_makes_a_score_meaningless() -> None:
    """The help of `evaluate` names such options, with what they do; a message about a mistake names none."""
    switches = ("model.weights=random", "run.allow_changed", "allow_missing_keys=[")
    for path in [*SOURCE.rglob("*.py"), *PLUGINS]:
        tree = ast.parse(path.read_text())
        raised = [
            n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(("Error", "require"))
        ]
        for call in raised:
            texts = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not [s for s in switches if s in "".join(texts)], f"{path.name}:{call.lineno}"


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_files_that_developers_are_sent_to_exist(page: str) -> None:
    folders = ("conf", "src", "tests", "docs", "benchmarks", "scripts", "slurm")
    there = [path for folder in folders for path in (REPOSITORY / folder).rglob("*")]
    ends = {"/".join(path.parts[-n:]) for path in [*there, *REPOSITORY.iterdir()] for n in range(1, 6)}
    named = re.findall(
        r"`((?:[\w.-]+/)*(?:[\w.-]+\.(?:py|yaml|sh|toml|txt)|[\w.-]+/))`", (REPOSITORY / page).read_text()
    )
    assert len(named) > 10
    assert [name for name in named if name.rstrip("/") not in ends and "NAME" not in name] == []


def test_the_typed_configuration_is_handed_down() -> None:
    """Hydra hands its tree to the task function, in cli/evaluate.py; below that a configuration is a `Config`."""
    named = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for kind in [node.returns, *(argument.annotation for argument in node.args.args + node.args.kwonlyargs)]
        if kind is not None and "DictConfig" in ast.unparse(kind) and not module.startswith("config.")
    }
    assert named == {"cli.evaluate"}
