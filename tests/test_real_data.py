"""Real images and a real model, where they are present (ADE_HARNESS_TEST_DATA, or ../shared/data beside the repository)."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import ade_harness as ade
from ade_harness.api.callback import ADE20KEvaluation
from ade_harness.metrics.segmentation_scores import SegmentationScores
from tests.conftest import REPOSITORY, Done

DATA = Path(os.environ.get("ADE_HARNESS_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
MODEL = DATA / "deeplabv3plus_mnv2" / "deeplabv3plus_mnv2_ade20k32.onnx"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODEL.is_file(),
        reason="needs real ADE20K images and a trained model: set ADE_HARNESS_TEST_DATA to a folder with"
        " ADEChallengeData2016/ and deeplabv3plus_mnv2/deeplabv3plus_mnv2_ade20k32.onnx",
    ),
]


def test_a_trained_model_on_real_images(cli: Callable[..., Done], tmp_path: Path) -> None:
    overrides = (
        "model=deeplabv3plus_mnv2_mlperf", f"model.path={MODEL}", "dataset=ade20k",
        f"dataset.root={DATA / 'ADEChallengeData2016'}", "tracking=none", "runtime.accelerator=cpu",
    )  # fmt: skip
    for ranks in (1, 2):
        done = cli(*overrides, f"runtime.devices={ranks}", f"run.dir=run{ranks}")
        assert done.code == 0, done.err
        assert "PARTIAL: 33 of 2,000 images" in done.out
    metrics = json.loads((tmp_path / "run1/metrics.json").read_text())
    assert metrics["pixels"] == 7_761_862
    # An independent implementation with the PyTorch form of this network measured 0.7529, 0.1665 and 0.0977; the ONNX
    # graph's floats differ in the last digits: 0.75284, 0.16653, 0.09770.
    assert metrics["pixel_accuracy"] == pytest.approx(0.7529, abs=1e-4)
    assert metrics["mIoU"] == pytest.approx(0.1665, abs=1e-4)
    assert metrics["mIoU_csail"] == pytest.approx(0.0977, abs=1e-4)
    first, second = (np.load(tmp_path / f"run{n}/confusion_matrix.npy") for n in (1, 2))
    assert np.array_equal(first, second)
    hashes = [pd.read_parquet(tmp_path / f"run{n}/ledger").sort_values("image_id").label_hash.tolist() for n in (1, 2)]
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 33
    before = torch.get_num_threads()  # in memory too: the same labels, counts and scores
    result = ade.evaluate(
        "deeplabv3plus_mnv2_mlperf", root=DATA / "ADEChallengeData2016", options={"model.path": str(MODEL)}
    )
    assert [row.label_hash for row in result.rows] == hashes[0]
    assert np.array_equal(result.matrix, first)
    run = ade.load_run(tmp_path / "run1")
    assert (result.scores, result.interval, result.marks) == (run.scores, run.interval, run.marks)
    assert torch.get_num_threads() == before
    # the metric of training loops, fed image by image, counts the same pixels
    predictor = ade.load_model("deeplabv3plus_mnv2_mlperf", options={"model.path": str(MODEL)})
    metric = SegmentationScores(150)
    folder = DATA / "ADEChallengeData2016"
    for row in result.rows:
        truth = np.array(Image.open(folder / f"annotations/validation/{row.image_id}.png")).astype(np.int64) - 1
        truth[truth < 0] = 255
        labels = predictor(Image.open(folder / f"images/validation/{row.image_id}.jpg"))
        metric.update(torch.from_numpy(labels)[None].long(), torch.from_numpy(truth)[None])
    assert np.array_equal(metric.matrix.numpy(), first)
    assert {name: float(value) for name, value in metric.compute().items()} == result.scores


SHIM = """
import importlib.util
spec = importlib.util.spec_from_file_location("deeplab", {path!r})
deeplab = importlib.util.module_from_spec(spec)
spec.loader.exec_module(deeplab)
Net = deeplab.DeepLabV3PlusMNV2
"""


def test_the_same_model_as_a_custom_torch_model(cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "shim.py").write_text(SHIM.format(path=str(MODEL.parent / "deeplabv3plus_mnv2.py")))
    done = cli(
        "model=deeplabv3plus_mnv2_mlperf", "model.kind=custom", "model._target_=shim.Net", "dataset=ade20k",
        f"model.checkpoint={MODEL.with_suffix('.safetensors')}", f"dataset.root={DATA / 'ADEChallengeData2016'}",
        "tracking=none", "run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    # the independent implementation's figures, all four digits: it ran this PyTorch form of the network
    found = [round(metrics[key], 4) for key in ("pixel_accuracy", "mIoU", "mIoU_csail")]
    assert found == [0.7529, 0.1665, 0.0977]
    # in a training of the same network, the callback has the command line's labels and counts
    spec = importlib.util.spec_from_file_location("deeplab", MODEL.parent / "deeplabv3plus_mnv2.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.DeepLabV3PlusMNV2()
    network.load_state_dict(load_file(MODEL.with_suffix(".safetensors")))
    mine = yaml.safe_load((REPOSITORY / "conf/model/deeplabv3plus_mnv2_mlperf.yaml").read_text())
    options = {"model.class_map": mine["class_map"], **{f"model.input.{k}": v for k, v in mine["input"].items()}}
    callback = ADE20KEvaluation(DATA / "ADEChallengeData2016", "mlperf_deeplab", network="network", options=options)
    training = Still(network)
    torch.set_num_threads(1)  # as the command line's ranks: sums of two threads are other sums
    pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback],
    ).fit(training, torch.utils.data.DataLoader(torch.zeros(1, 1)))  # fmt: skip
    run = ade.load_run(tmp_path / "run")
    assert callback.result is not None
    assert [row.label_hash for row in callback.result.rows] == [row.label_hash for row in run.rows]
    assert np.array_equal(callback.result.matrix, run.matrix)
    assert callback.result.scores == run.scores


class Still(pl.LightningModule):
    """A training that changes nothing."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.number = network, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        """Return a loss that is always 0."""
        return self.number * batch.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train the number alone."""
        return torch.optim.SGD([self.number], lr=1.0)


def test_verify_of_real_files(cli: Callable[..., Done]) -> None:
    done = cli("data", "verify", DATA / "ADEChallengeData2016")
    assert done.code == 2  # a part of the set, and nothing wrong with it
    assert "33 of 2000 validation pairs" in done.out
    assert "7,761,862 labelled" in done.out
    assert "problem:" not in done.out
