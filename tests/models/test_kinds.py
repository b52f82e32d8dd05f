"""The registry of kinds: every line is true, and a new kind needs a file and a line."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ade_harness.config.compose import compose_config
from ade_harness.config.composed import Composed
from ade_harness.config.files import choices, read_choice
from ade_harness.config.kinds import KINDS, Gives, Kind
from ade_harness.config.model import ModelConfig
from ade_harness.config.schema import Config
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError
from ade_harness.evaluation.story import evaluate
from ade_harness.inference.folder import FolderPredictor
from ade_harness.inference.predictor import Prediction, Prepared
from ade_harness.models.checkpoint.family import Family
from ade_harness.models.registry import imported, systems
from ade_harness.runtime.console import make_console


@pytest.mark.parametrize("name", KINDS)
def test_every_line_names_what_is_there(name: str) -> None:
    kind = KINDS[name]
    assert isinstance(imported(kind), Family) == (kind.gives is Gives.family)
    assert callable(imported(kind)) == (kind.gives is not Gives.family)
    assert kind.needs is None or kind.needs in ModelConfig.__dataclass_fields__
    assert (kind.needs is None) == (kind.what == "")


def test_the_systems_are_those_of_the_configuration() -> None:
    assert {read_choice("model", name)["kind"] for name in choices("model")} == set(KINDS)
    assert systems()["segformer_b5"] == "segformer"
    assert not set(systems()) & {"demo", "hf", "custom", "onnx", "torchscript", "predictions", "http"}


@pytest.mark.parametrize(("kind", "near"), [("segfomer", "segformer"), ("onx", "onnx")])
def test_an_unknown_kind_is_refused_before_anything_is_loaded(kind: str, near: str) -> None:
    with pytest.raises(HarnessError, match=f"model.kind={kind}: unknown. Did you mean '{near}'"):
        compose_config([f"model.kind={kind}"])


class Striped:
    """A predictor as somebody else would write one: columns of classes."""

    network = None

    def __init__(self, width: int) -> None:
        self.width = width

    def check(self, sizes: Any) -> None:
        assert sizes

    def facts(self) -> dict[str, Any]:
        return {"weights": "none", "origin": f"stripes of {self.width} pixels"}

    loaders = FolderPredictor.loaders
    group_key = FolderPredictor.group_key
    cost, prepared_bytes = FolderPredictor.cost, FolderPredictor.prepared_bytes
    stop, changes = FolderPredictor.stop, FolderPredictor.changes

    def prepare(self, image_id: str, image: np.ndarray) -> Prepared:
        columns = (np.arange(image.shape[1]) // self.width % 150).astype(np.uint8)
        return Prepared(image_id, (torch.from_numpy(np.tile(columns, (image.shape[0], 1))),), image.shape[:2])

    def predict(self, batch: Sequence[Prepared], device: torch.device, watch: Any) -> list[Prediction]:
        return [Prediction(p.pixels[0]) for p in batch]

    def source_hash(self, image_id: str) -> str:
        return hashlib.blake2b(image_id.encode()).hexdigest()

    def notes(self) -> list[str]:
        return ["stripes are no segmentation"]


def open_stripes(cfg: Config, classes: Classes) -> Striped:
    return Striped(cfg.model.seed)


def test_a_new_kind_is_one_file_and_one_line(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "stripes", Kind(f"{__name__}:open_stripes", Gives.labels))
    overrides = [
        "model.kind=stripes",
        "model.seed=7",
        "dataset.limit=3",
        f"run.dir={tmp_path / 'run'}",
        "tracking=none",
    ]
    done = evaluate(Composed.from_config(compose_config([*overrides, "runtime.workers=0"])), make_console(result=False))
    assert done is not None
    result, record = done
    assert record.manifest["model"]["origin"] == "stripes of 7 pixels"
    assert "stripes are no segmentation" in result.notes
    assert SimpleNamespace(**record.manifest["dataset"]).images == 3
    with pytest.raises(HarnessError, match=r"metrics\.calibration needs a network's scores, and model\.kind=stripes"):
        compose_config([*overrides, "metrics.calibration=true"])
