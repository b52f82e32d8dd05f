"""This project's own loop in the form that the benchmarks compare: the parts of an evaluation, in one process."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import Areas, Loop, TimedNetwork
from torch import nn

from ade_harness.config.compose import compose_config
from ade_harness.config.schema import Config
from ade_harness.data.ade20k import open_ade20k
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.evaluation.data import ImageItems, group_images
from ade_harness.evaluation.module import EvaluationModule
from ade_harness.evaluation.recorder import Recorder
from ade_harness.inference.network import NetworkPredictor
from ade_harness.models.loaded import LoadedModel
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerWriter
from ade_harness.runtime.coordination import Coordinator

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config(*overrides: str) -> Config:
    """Compose a configuration for a network that is made here."""
    return compose_config(["model=custom", "model._target_=a.b", "dataset=ade20k", "dataset.root=.", *overrides])


def predictor(network: nn.Module, kernels: str, *overrides: str) -> NetworkPredictor:
    """Return a predictor for `network`; `kernels` as ``runtime.kernels``."""
    cfg = config(*overrides)
    statistics = tuple(cfg.model.input.mean), tuple(cfg.model.input.std)
    model = LoadedModel(network, "random", *statistics, channels=150)
    return NetworkPredictor(model, cfg.inference, cfg.model, kernels)


class Evaluation:
    """Decode, prepare, predict, count and write the ledger for all images, as an evaluation's only rank does."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        network: nn.Module,
        kernels: str,
        *overrides: str,
        device: torch.device = CPU,
    ) -> None:
        self.dataset = dataset
        self.device = device
        self.made = predictor(network, kernels, *overrides)
        self.kernels = kernels
        self.stages: dict[str, float] = {}

    def __call__(self) -> Areas:
        """Return int64 [3, 150]: intersection, predicted and annotated pixels."""
        groups = group_images(list(self.dataset.read_headers()[0].values()), self.made, self.made.cfg.images)
        items = ImageItems(self.dataset, groups, self.made, set())
        with tempfile.TemporaryDirectory() as folder:
            writer = LedgerWriter(Path(folder) / "ledger")
            recorder = Recorder(Path(folder), self.dataset.classes, writer, LabelMaps(Path(folder), "none"))
            module = EvaluationModule(self.made, recorder, Coordinator(), self.kernels)
            for item in range(len(items)):
                module.process(items[item], self.device, 0)
            module.close(0)
        assert not module.failures, module.failures
        self.stages = module.stages
        matrix = recorder.matrix
        return np.stack([np.diag(matrix), matrix[:, :-1].sum(0), matrix.sum(1)])


def loop(folder: Path, network: nn.Module, kernels: str = "auto", *overrides: str) -> Loop:
    """Return this project's loop over a folder in the official layout."""
    timed = TimedNetwork(network)
    name = {"auto": "ade-harness", "torch": "ade-harness, plain torch kernels"}[kernels]
    body: Any = Evaluation(open_ade20k(folder, "validation"), timed, kernels, *overrides)
    return Loop(name, timed, body)
