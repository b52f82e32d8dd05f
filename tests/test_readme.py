"""The README's and the docs' commands do what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from scripts.readme_commands import readme_command

from tests.conftest import REPOSITORY


def environment(**changes: str) -> dict[str, str]:
    """Return the environment of a newcomer's shell: none of this test run's settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTEST", "PYTHON"))}
    return kept | changes


def test_test_command_is_what_ci_runs() -> None:
    assert "readme_commands.py tests" in (REPOSITORY / ".ci/run").read_text()
    assert "-m pytest" in readme_command("tests")
    assert ".ci/run" in (REPOSITORY / ".github/workflows/ci.yml").read_text()


@pytest.mark.slow
def test_demo_command_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "ade-harness"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, clone / name)
    # what is installed here serves the new environment too: CI itself installs everything into an empty one
    subprocess.run([sys.executable, "-m", "venv", clone / ".venv"], check=True)
    site = next((clone / ".venv/lib").glob("python*/site-packages"))
    (site / "installed.pth").write_text(sysconfig.get_path("purelib"))
    cache = environment(ADE_HARNESS_CACHE=str(tmp_path / "cache"))
    command = readme_command("demo")
    done = subprocess.run(["bash", "-ec", command], cwd=clone, env=cache, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DEMO" in done.stdout
    assert "mIoU" in done.stdout
    assert len(list((clone / "runs").glob("*/metrics.json"))) == 1
    # installed, not editable: from another folder, with the wheel's own configuration
    again = subprocess.run(
        [clone / ".venv/bin/ade-harness", "tracking=none", "dataset.images=8"], cwd=tmp_path, env=cache, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr


def prose(page: Path) -> str:
    """Return a page without its Python and YAML blocks."""
    return re.sub(r"```(?:python|yaml)\n.*?```", "", page.read_text(), flags=re.DOTALL)


def test_every_option_in_the_readme_exists() -> None:
    from ade_harness.config.arguments import known_keys
    from ade_harness.config.files import choices
    from ade_harness.config.probe import ProbeConfig

    keys = {*known_keys(), "install", "model", "dataset", "inference", "tracking", "probe"}
    keys |= {"experiment"}  # a group of one's own
    keys |= {f"probe.{field}" for field in ProbeConfig.__dataclass_fields__}
    for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))):
        for key, value in re.findall(r"(?<![\w./(-])([a-z]+(?:\.[a-z_]+)*)=(\S*?)(?=[\s`|,;)\]]|$)", prose(page)):
            if page.name == "python.md" and "." not in key:
                continue  # an argument of a function, as its examples show, which tests/api/test_docs.py runs
            if page.name == "coming-from.md" and "." not in key and key not in keys:
                continue  # an option of the other framework
            assert key in keys or key.startswith(("model.kwargs", "model.architecture.", "hydra.")), (
                f"{page.name}: {key}"
            )
            if key in ("model", "inference", "probe") and re.fullmatch(r"[a-z0-9_]+", value):
                assert value in [*choices(key), "colour_net", "ss", "ms"], f"{page.name}: {key}={value}"


def blocks(page: Path, kind: str) -> dict[str, str]:
    text = page.read_text()
    return dict(re.findall(rf"<!-- {kind}: (\S+) -->\s*```\w+\n(.*?)```", text, re.DOTALL))


@pytest.mark.slow
def test_worked_example_of_a_custom_model(tmp_path: Path) -> None:
    page = REPOSITORY / "docs" / "models.md"
    for name, content in blocks(page, "file").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    commands = blocks(page, "command")
    assert set(commands) == {"custom", "yaml"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for name, command in commands.items():
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=tmp_path,
            env=environment(PATH=path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, name + done.stdout + done.stderr
    # the same seed makes the same weights, so both ways predict the same labels
    first, second = (tmp_path / n / "confusion_matrix.npy" for n in ("first_try", "second_try"))
    assert first.read_bytes() == second.read_bytes()
