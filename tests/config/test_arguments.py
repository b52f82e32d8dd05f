"""Overrides as they are typed."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ade_harness.config.arguments import prepare
from ade_harness.config.compose import compose_config

HOSTILE = "/data/épreuve/ep=99-step=8, v2 (1) [a]/it's ${x} #;{b}.ckpt"


def test_free_form_dictionaries_take_new_keys() -> None:
    given = ["model=custom", "model._target_=a.B", "model.kwargs.a=1", "model.kwargs={b: {c: 2}}", "model.kwargs.b.d=3"]
    assert compose_config(given).model.kwargs == {"a": 1, "b": {"c": 2, "d": 3}}


@pytest.mark.parametrize("multirun", [False, True])
@pytest.mark.parametrize(
    "key",
    [
        "model.path", "model.backbone.url", "model.about.repository", "dataset.root", "run.dir", "runtime.slurm.folder",
        "hydra.launcher.folder", "hydra.launcher.container", "hydra.launcher.container_mounts", "hydra.launcher.python",
        "hydra.run.dir",
    ],
)  # fmt: skip
def test_paths_are_taken_as_they_are_typed(key: str, multirun: bool) -> None:
    [override] = prepare([f"{key}={HOSTILE}"], None, multirun=multirun)
    parsed = OverridesParser.create().parse_override(override)
    assert parsed.key_or_group == key
    assert not parsed.is_sweep_override()
    value = parsed.value()
    assert isinstance(value, str)
    assert value.replace("\\$", "$") == HOSTILE  # OmegaConf takes an escaped interpolation for its text
