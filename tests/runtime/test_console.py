"""What is shown is what was given: no markup, no pictures."""

from __future__ import annotations

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
