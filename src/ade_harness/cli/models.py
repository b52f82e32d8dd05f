"""The command `models`: the leaderboard's systems, which can be run, and how each was checked."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from ade_harness.cli.answer import Answer
from ade_harness.config.files import choices, read_choice
from ade_harness.errors import HarnessError, nearest
from ade_harness.leaderboard.published import PublishedRow, published_rows
from ade_harness.runtime.console import make_console, print_fact, print_line


def run_models(options: argparse.Namespace) -> Answer:
    """Print the leaderboard with what can be run, then the other configurations; or what is known of those named.

    Raises:
        HarnessError: a name that no model has.
    """
    models = {name: read_choice("model", name) for name in choices("model")}
    for name in options.names:
        if name not in models:
            raise HarnessError(f"models {name}: no such model. Nearest: {nearest(name, models)}; `models` lists all.")
    console = make_console()
    if options.names:
        for name in options.names:
            _describe(console, name, models[name])
    else:
        _print(console, models)
    content = {
        name: {k: model.get(k) for k in ("label", "kind", "published", "protocols", "about", "parity")}
        for name, model in models.items()
        if not options.names or name in options.names
    }
    return Answer({"models": content})


def _table(title: str) -> Table:
    """Return a table without lines: 80 columns are few."""
    return Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)


def _print(console: Console, models: dict[str, dict[str, Any]]) -> None:
    """Print one line for each system, in 80 columns."""
    rows = published_rows()
    table = _table("ADE20K leaderboard: published scores")
    for name, width in (("model=", 23), ("leaderboard", 23), ("score", 5), ("SS / MS", 13), ("weights", 11)):
        table.add_column(name, overflow="fold", width=width, justify="right" if name == "score" else "left")
    for row in rows:
        table.add_row(
            row.config, row.system, f"{row.score:.2f}", _published(models[row.config]), _weights(models[row.config])
        )
    console.print(table)
    systems = _table("Other configurations")
    for name, width in (("model=", 25), ("what", 27), ("SS / MS", 13), ("weights", 11)):
        systems.add_column(name, overflow="fold", width=width)
    for name, model in models.items():
        if name not in {row.config for row in rows}:
            systems.add_row(name, model.get("label", ""), _published(model), _weights(model))
    console.print(systems)
    print_line(console, "SS single scale, MS multi-scale with flip: percent mIoU as published.")
    print_line(console, "`models NAME` shows details: sources, protocols, how it was checked.")


def _describe(console: Console, name: str, model: dict[str, Any]) -> None:
    """Print what is known of one model."""
    about, published = model.get("about", {}), model.get("published", {})
    print_line(console, f"model={name}: {model.get('label', '')}", style="bold")
    facts = {
        "published": f"{_published(model)} (SS / MS)" if published else None,
        "by": published.get("protocol"),
        "source": published.get("source"),
        "leaderboard": "; ".join(_of_leaderboard(row) for row in published_rows() if row.config == name),
        "protocols": ", ".join(f"inference={k}: {v}" for k, v in model.get("protocols", {}).items() if v),
        "weights": _weights(model),
        "missing": model.get("missing"),
        "licence": model.get("official", {}).get("license") or model.get("hub", {}).get("license"),
        "paper": about.get("paper"),
        "code": " @ ".join(str(v) for v in (about.get("repository"), about.get("commit")) if v),
        "parameters": f"{about['parameters_m']:,.1f} M" if about.get("parameters_m") else None,
        "checked": None
        if _parity(model) == "-"
        else f"against {_parity(model)} (largest difference over largest score)",
    }
    for key, value in facts.items():
        if value:
            print_fact(console, key, str(value))


def _of_leaderboard(row: PublishedRow) -> str:
    return f"{row.system} {row.score:.2f} {row.metric}" + (f": {row.source_note}" if row.source_note else "")


def _weights(model: dict[str, Any]) -> str:
    return str(model.get("about", {}).get("weights") or "yours")


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
