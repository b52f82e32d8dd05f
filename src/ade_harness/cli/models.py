"""The command `models`: the leaderboard's systems, and which can be run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from ade_harness.config.compose import read_choice
from ade_harness.config.model import ModelConfig
from ade_harness.leaderboard.published import published_rows


def print_catalogue(console: Console, ready: Sequence[str]) -> None:
    """Print the leaderboard with what can be run and how it was checked, then the other configurations.

    Args:
        console: where to.
        ready: names of the model configurations that there are.
    """
    table = Table(
        title="ADE20K leaderboard, as published by others: percent, nothing here was measured by this tool",
        caption="SS single scale, MS multi-scale and mirrored; error: largest difference from the scores of the code"
        " named, over the largest score, same weights, float32",
        box=HORIZONTALS,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_lines=True,
    )
    widths = {"leaderboard": 17, "SS / MS": 13, "what the source says": 31, "weights": 13, "model=": 23}
    for name in (*widths, "checked: error"):
        table.add_column(name, overflow="fold", width=widths.get(name))
    for row in published_rows():
        model = _model(row.config)
        table.add_row(
            f"{row.system}\n{row.score:.2f} {row.metric}",
            _published(model),
            row.source_note,
            model.about.weights,
            row.config,
            _parity(model),
        )
    console.print(table)
    others = [name for name in ready if name not in {r.config for r in published_rows()}]
    systems = Table(title="Other configurations", box=HORIZONTALS)
    for name in ("model=", "what", "SS / MS", "weights", "checked: error"):
        systems.add_column(name, overflow="fold", no_wrap=name == "model=")
    for name in others:
        model = _model(name)
        systems.add_row(name, model.label, _published(model), model.about.weights or "yours", _parity(model))
    console.print(systems)


def _model(name: str) -> ModelConfig:
    model: ModelConfig = read_choice("model", name)
    return model


def _published(model: ModelConfig) -> str:
    scores = (model.published.ss, model.published.ms)
    return "-" if scores == (None, None) else " / ".join("-" if s is None else f"{s:g}" for s in scores)


def _parity(model: ModelConfig) -> str:
    if not model.parity.against:
        return "-"
    error = "" if model.parity.error is None else f": {model.parity.error:.1e}" if model.parity.error else ": same bits"
    return f"{model.parity.against}{error}"
