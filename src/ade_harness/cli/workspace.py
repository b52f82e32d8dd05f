"""The command `workspace`: a saved view of evaluations in W&B."""

from __future__ import annotations

import argparse

from ade_harness.cli.answer import Answer
from ade_harness.runtime.console import make_console, print_fact
from ade_harness.tracking.workspace import save_view


def run_workspace(options: argparse.Namespace) -> Answer:
    """Save the view and print its address; raises as :func:`ade_harness.tracking.workspace.save_view`."""
    url = save_view(options.entity, options.project, options.name)
    print_fact(make_console(), "view", url)
    return Answer({"url": url})
