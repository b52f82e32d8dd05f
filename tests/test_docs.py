"""The documentation: a site without a broken link, its generated pages complete, its notebook run from end to end."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ade_harness.cli.commands import COMMANDS
from ade_harness.config.arguments import known_keys
from tests.conftest import REPOSITORY, Done

pytestmark = pytest.mark.slow  # the file takes more than a few seconds


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr  # a broken link, or a page in no menu
    return folder


def test_every_option_and_every_command_has_its_line(site: Path) -> None:
    options = (site / "reference/options/index.html").read_text()
    keys = [key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())]
    missing = [key for key in keys if f"<code>{key}</code>" not in options]
    assert missing == []
    commands = (site / "reference/commands/index.html").read_text()
    for command in COMMANDS:
        assert f'id="{command.name.replace(" ", "-")}"' in commands
        for argument in command.arguments:
            assert argument.names[-1] in commands or str(argument.settings["metavar"]).partition("|")[0] in commands


def test_the_python_reference_has_signatures_and_meanings(site: Path) -> None:
    page = (site / "reference/api/index.html").read_text()
    for name in ("evaluate", "Evaluation", "load_model", "compare", "SegmentationScores", "ADE20KEvaluation"):
        assert f'.{name}"' in page, name  # an anchor
    assert "Afterwards" in page or "the state of this process and of the model is restored" in page
    assert "<p>::</p>" not in page
    assert "doc-section-title" in page  # arguments and errors, out of the docstrings


def test_pages_ask_no_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "fonts.googleapis" not in text
        assert 'src="http' not in text


def test_a_broken_link_is_an_error(tmp_path: Path, site: Path) -> None:
    """The check can fail: the same settings, and one page that names another that is not there."""
    settings = (REPOSITORY / "mkdocs.yml").read_text()
    lines = settings[: settings.index("\nnav:")].replace("hooks: [scripts/docs_site.py]", "")
    (tmp_path / "mkdocs.yml").write_text(lines)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[there](nowhere.md)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr + done.stdout


def test_every_entry_of_metrics_json_is_explained(call: Callable[..., Done], tmp_path: Path) -> None:
    assert call("dataset.images=2", "run.dir=run", "tracking=none", "run.overlays=0").code == 0
    page = (REPOSITORY / "docs/run-directory.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| `metrics.json` |"))
    named = set(line.split("`")[1::2])
    assert set(json.loads((tmp_path / "run/metrics.json").read_text())) - named == set()


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install '.[docs]'")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    notebook = nbformat.read(REPOSITORY / "docs/notebooks/first_evaluation.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # none are kept in the repository
    again = [cell for cell in notebook.cells if "run_dir" in cell.source]  # as one does who reads and tries
    assert len(again) == 2
    notebook.cells += [nbformat.v4.new_code_cell("import time; time.sleep(1)"), *map(copy.deepcopy, again)]
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in shown if output["output_type"] == "error"]
    texts = " ".join(str(output.get("data", {}).get("text/plain", output.get("text", ""))) for output in shown)
    assert "mIoU" in texts
    assert "(96, 128)" in texts
    names = sorted(path.name.split("_")[1] for path in (tmp_path / "runs").iterdir())
    assert names == ["demo", "demo", "mine", "mine"]
