"""The command `models`: the leaderboard's systems, and which can be run."""

from __future__ import annotations

import argparse
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from ade_harness.cli.answer import Answer
from ade_harness.config.files import choices, read_choice
from ade_harness.leaderboard.published import published_rows
from ade_harness.runtime.console import make_console


def run_models(options: argparse.Namespace) -> Answer:
    """Print the leaderboard with what can be run and how it was checked, then the other configurations."""
    models = {name: read_choice("model", name) for name in choices("model")}
    _print(make_console(), models)
    content = {
        name: {k: model.get(k) for k in ("label", "kind", "published", "protocols", "about", "parity")}
        for name, model in models.items()
    }
    return Answer({"models": content})


def _print(console: Console, models: dict[str, dict[str, Any]]) -> None:
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
        model = models[row.config]
        table.add_row(
            f"{row.system}\n{row.score:.2f} {row.metric}",
            _published(model),
            row.source_note,
            model.get("about", {}).get("weights", ""),
            row.config,
            _parity(model),
        )
    console.print(table)
    others = {name: model for name, model in models.items() if name not in {r.config for r in published_rows()}}
    systems = Table(title="Other configurations", box=HORIZONTALS)
    for name in ("model=", "what", "SS / MS", "weights", "checked: error"):
        systems.add_column(name, overflow="fold", no_wrap=name == "model=")
    for name, model in others.items():
        weights = model.get("about", {}).get("weights") or "yours"
        systems.add_row(name, model.get("label", ""), _published(model), weights, _parity(model))
    console.print(systems)


def _published(model: dict[str, Any]) -> str:
    scores = [model.get("published", {}).get(kind) for kind in ("ss", "ms")]
    return "-" if scores == [None, None] else " / ".join("-" if s is None else f"{s:g}" for s in scores)


def _parity(model: dict[str, Any]) -> str:
    found = model.get("parity", {})
    if not found.get("against"):
        return "-"
    error = found.get("error")
    text = "" if error is None else f": {error:.1e}" if error else ": bit-identical"
    return f"{found['against']}{text}"
