"""Configurations of trainings."""

from __future__ import annotations

from ade_harness.config.arguments import prepare, with_recipe
from ade_harness.config.compose import checked, compose_tree
from ade_harness.config.schema import Config


def compose_probe(overrides: list[str]) -> Config:
    """Compose a training as the command line does."""
    return checked(compose_tree(prepare(with_recipe(overrides))))
