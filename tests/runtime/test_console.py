"""What is shown is what was given: no markup, no pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from ade_harness.runtime.console import make_console, print_error, print_line

NAMES = ("runs/a:smile:b", "wandb:zzz:", "[bold]c[/bold]", "[red")


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str], name: str) -> None:
    print_line(make_console(), name)
    print_error(name)
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    console = make_console()
    console.print(table)
    console.print(name)
    out, err = capsys.readouterr()
    assert out.count(name) == 5
    assert err.strip() == name


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["models"], ["--info", "all"], ["--cfg", "job"], ["dataset.images=2", "tracking=none", "metrics.resamples=0"]],
)
def test_a_reader_that_leaves_ends_nothing(overrides: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ade_harness", *overrides]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    if overrides[0] != "--cfg":  # this one has no reader at all
        process.stdout.readline()
    process.stdout.close()
    printed = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 0, printed
    assert "BrokenPipe" not in printed
    assert "rror" not in printed
    assert overrides[0] != "dataset.images=2" or len(list(tmp_path.glob("runs/*/metrics.json"))) == 1
