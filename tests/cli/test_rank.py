"""What a supervisor hands over to its ranks: the configuration as it was composed, once."""

from __future__ import annotations

import json

import pytest

from ade_harness.config.compose import compose_config
from ade_harness.config.composed import Composed
from ade_harness.config.files import choices
from ade_harness.config.plain import as_dict, typed
from ade_harness.config.schema import Config
from tests.probe.composing import compose_probe

NEEDED = {
    "custom": ["model._target_=a.b"], "hf": ["model.id=x"], "http": ["model.url=http://x"],
    "onnx": ["model.path=x"], "deeplabv3plus_mnv2_mlperf": ["model.path=x"], "torchscript": ["model.path=x"], "exported": ["model.path=x"], "predictions": ["model.path=x"],
}  # fmt: skip


@pytest.mark.parametrize("model", choices("model"))
def test_a_configuration_survives_the_way_to_a_rank(model: str) -> None:
    data = [] if model == "demo" else ["dataset=ade20k", "dataset.root=x"]
    config = compose_config([f"model={model}", *NEEDED.get(model, []), *data, "metrics.level=0.9", "run.on_error=skip"])
    assert typed(Config, json.loads(json.dumps(as_dict(config)))) == config


def test_of_a_probe_too() -> None:
    config = compose_probe(["model=dinov2_g_linear", "dataset=ade20k", "dataset.root=x"])
    assert typed(Config, json.loads(json.dumps(as_dict(config)))) == config


def test_what_else_is_known_goes_along() -> None:
    composed = Composed.from_config(compose_config(["dataset.limit=2", "inference.resize.multiple_of=32"]))
    assert composed.changes == ["resize.multiple_of"]
    assert "dataset.limit=2" in (composed.repeat or [])
    content = json.loads(composed.as_json(work="evaluate"))
    assert content["work"] == "evaluate"
    assert Composed.from_json(content) == composed
