"""The metric and the callback, in training loops."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger

import ade_harness as ade
from ade_harness.api import callback as callback_module
from ade_harness.errors import HarnessError
from ade_harness.metrics import SegmentationScores, scores
from ade_harness.metrics.confusion import mean_dice
from tests.api.networks import Colours
from tests.conftest import REPOSITORY

SMALL = {"dataset.images": 5, "metrics.resamples": 0}
BUFFER, WEIGHT = "norm.running_mean", "layer.weight"


def slow_matrix(labels: torch.Tensor, target: torch.Tensor, classes: int, ignore: int | None) -> np.ndarray:
    matrix = np.zeros((classes, classes + 1), np.int64)
    for predicted, truth in zip(labels.flatten().tolist(), target.flatten().tolist(), strict=True):
        if truth != ignore:
            matrix[truth, predicted if 0 <= predicted < classes else classes] += 1
    return matrix


@given(
    st.sampled_from([2, 5, 150, 254, 255, 256, 300]), st.integers(0, 2**31), st.sampled_from(["labels", "same", "small"]),
    st.sampled_from([255, -1, 0, None, 1000]), st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_metric_counts_every_pixel(
    classes: int, seed: int, kind: str, ignore: int | None, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(seed)
    if classes > torch.iinfo(dtype).max or (
        ignore is not None and not torch.iinfo(dtype).min <= ignore <= torch.iinfo(dtype).max
    ):
        dtype = torch.int64
    target = torch.randint(0, classes, (2, 9, 7), generator=draw)
    if ignore is not None:
        target[torch.rand(target.shape, generator=draw) < 0.3] = ignore
    if kind == "labels":
        given_ = torch.randint(-2, classes + 3, target.shape, generator=draw)
        labels = given_
    else:
        given_ = torch.randn(2, classes, *((9, 7) if kind == "same" else (4, 3)), generator=draw)
        labels = F.interpolate(given_, (9, 7), mode="bilinear").argmax(1)
    metric = SegmentationScores(classes, ignore_index=ignore)
    metric.update(given_, target.to(dtype))
    expected = slow_matrix(labels, target, classes, ignore)
    assert np.array_equal(metric.matrix.numpy(), expected)
    found = {k: float(v) for k, v in metric.compute().items()}
    assert found == {**scores(expected).as_dict(), "mean_dice": mean_dice(expected)}
    one = SegmentationScores(classes, ignore_index=ignore)
    for number in range(2):
        one.update(given_[number], target[number].to(dtype))  # without N
    assert torch.equal(one.matrix, metric.matrix)


def test_counts_are_exact_beyond_the_integers_of_float32() -> None:
    metric = SegmentationScores(2)
    metric.matrix += 2**24
    metric.update(torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 1).long())
    assert metric.matrix.tolist() == [[2**24 + 1, 2**24, 2**24], [2**24] * 3]
    again = pickle.loads(pickle.dumps(metric))
    assert torch.equal(again.matrix, metric.matrix)
    metric.persistent(True)
    fresh = SegmentationScores(2)
    fresh.persistent(True)
    fresh.load_state_dict(metric.state_dict())
    assert torch.equal(fresh.matrix, metric.matrix)
    assert metric.class_iou().shape == (2,)
    figure, _ = metric.plot()
    assert type(figure).__module__ == "matplotlib.figure"
    metric.reset()
    assert not metric.matrix.any()


@pytest.mark.parametrize(
    ("predictions", "target", "message"),
    [
        (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), "target is torch.float32, expected integers"),
        (torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4).long(), r"expected scores \[1, 3, 'h', 'w'\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4).long(), r"\[2, 3, 4, 4\] for a target of \[1, 4, 4\]"),
        (torch.zeros(1, 5, 4).long(), torch.zeros(1, 4, 4).long(), "or integer labels"),
        (torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), 7), "the target holds 7, expected 0 to 2, or ignore_index=255"),
        (torch.zeros(1, 4, 4).long(), torch.full((1, 4, 4), -1), "the target holds -1"),
    ],
)  # fmt: skip
def test_what_the_metric_refuses(predictions: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationScores(3).update(predictions, target)
    with pytest.raises(ValueError, match="num_classes=0"):
        SegmentationScores(0)


def test_a_refused_batch_is_not_counted() -> None:
    metric = SegmentationScores(3)
    target = torch.zeros(2, 4, 4).long()
    target[1, 0, 0] = 99
    with pytest.raises(ValueError, match="the target holds 99"):
        metric.update(torch.zeros(2, 4, 4).long(), target)
    assert not metric.matrix.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_counts_stay_integers_whatever_the_metric_is_converted_to(dtype: torch.dtype) -> None:
    metric = SegmentationScores(2).set_dtype(dtype)
    module = torch.nn.ModuleList([metric]).to(dtype)
    metric.matrix += 2**24
    metric.update(torch.zeros(1, 1, 1).long(), torch.zeros(1, 1, 1).long())
    assert module[0].matrix.dtype == torch.int64
    assert int(metric.matrix[0, 0]) == 2**24 + 1


def test_metrics_that_ignore_other_values_share_no_counts() -> None:
    """A MetricCollection looks for equal states after the first batch, which may hold none of the values."""
    together = torchmetrics.MetricCollection(
        {"all": SegmentationScores(3, ignore_index=None), "first": SegmentationScores(3, ignore_index=0),
         "same": SegmentationScores(3, ignore_index=0)}
    )  # fmt: skip
    for target in ([[1, 2]], [[0, 1]]):
        together.update(torch.tensor([[1, 1]]), torch.tensor(target))
    assert int(together["all"].matrix.sum()) == 4
    assert int(together["first"].matrix.sum()) == int(together["same"].matrix.sum()) == 3
    assert ["first", "same"] in together.compute_groups.values()


def test_each_epoch_counts_its_own_pixels() -> None:
    """As docs/python.md and the class teach it: Lightning does not reset what is logged as a dict."""
    counted: list[int] = []

    class Watched(Trained):
        def on_validation_epoch_end(self) -> None:
            counted.append(int(self.metric.matrix.sum()))
            super().on_validation_epoch_end()

    fit([], max_epochs=3, module=Watched())
    assert counted == [2 * 2 * 256, *[8 * 256] * 3]  # two batches before the training, then eight images
    guide = (REPOSITORY / "docs/python.md").read_text()
    taught = guide[guide.index("self.log_dict(") :].splitlines()
    assert "self.scores.reset()" in taught[1]
    assert "scores.reset()" in str(SegmentationScores.__doc__)


def test_without_validation_a_wrong_target_is_not_counted() -> None:
    metric = SegmentationScores(3, validate_args=False)
    metric.update(torch.zeros(1, 1, 2).long(), torch.tensor([[[1, 7]]]))
    assert metric.matrix.sum() == 1


class Trained(pl.LightningModule):
    """A network that is trained on noise, with dropout and batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Colours()
        self.losses: list[float] = []
        self.metric = SegmentationScores(150)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        scores = self(batch + torch.randn(1))
        loss = scores.square().mean() + scores.mean()
        self.losses.append(float(loss))
        return loss

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        target = (batch[:, 0].abs() * 40).long() % 150
        self.metric.update(self(batch), target)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metric.compute())
        self.metric.reset()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(callbacks: list[pl.Callback], module: Trained | None = None, **options: Any) -> tuple[Trained, pl.Trainer]:
    module = Trained() if module is None else module
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks,
        **{"max_epochs": 2, "logger": False, "enable_checkpointing": False, **options},
    )  # fmt: skip
    pl.seed_everything(5, verbose=False)
    images = torch.randn(8, 3, 16, 16)
    loaders = (torch.utils.data.DataLoader(images, batch_size=2, shuffle=True) for _ in range(2))
    trainer.fit(module, *loaders)
    return module, trainer


def test_training_is_the_same_with_and_without_the_callback() -> None:
    callback = ade.ADE20KEvaluation(dataset="demo", protocol="original_size", network="net", options=SMALL)
    plain, _ = fit([])
    watched, trainer = fit([callback])
    assert watched.losses == plain.losses
    assert len(plain.losses) == 8
    for one, two in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, two)
    assert watched.training
    assert callback.result is not None
    expected = ade.evaluate(watched.net, dataset="demo", protocol="original_size", options=SMALL)
    assert callback.result.scores == expected.scores
    assert np.array_equal(callback.result.matrix, expected.matrix)
    logged = {name for name in trainer.callback_metrics if name.startswith("ade20k/")}
    assert logged == {f"ade20k/{name}" for name in expected.scores}
    assert "ade20k/mean_dice" in logged
    assert float(trainer.callback_metrics["ade20k/mIoU"]) == pytest.approx(expected.mIoU, abs=1e-7)  # kept as float32
    assert 0 <= float(trainer.callback_metrics["mIoU"]) <= 1  # of the metric


def test_the_callback_as_seldom_as_asked() -> None:
    begun: list[int] = []

    class Counted(ade.ADE20KEvaluation):
        def _evaluate(self, trainer: pl.Trainer, *arguments: Any) -> Any:
            begun.append(trainer.current_epoch)
            return super()._evaluate(trainer, *arguments)

    fit([Counted(dataset="demo", protocol="original_size", every_n_epochs=5, limit=2, options=SMALL)])
    assert begun == [1]  # the last one


def of_demo(**options: Any) -> ade.ADE20KEvaluation:
    return ade.ADE20KEvaluation(
        **{"dataset": "demo", "protocol": "original_size", "network": "net", "limit": 2, "options": SMALL, **options}
    )


def test_a_checkpoint_and_an_early_stop_by_our_score(tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, monitor="ade20k/mIoU", mode="max", save_top_k=1)
    stop = EarlyStopping(monitor="ade20k/mIoU", mode="max", patience=5)
    found: list[float] = []

    class Kept(ade.ADE20KEvaluation):
        def _evaluate(self, *arguments: Any) -> Any:
            result = super()._evaluate(*arguments)
            found.append(result.mIoU)
            return result

    callback = Kept(dataset="demo", protocol="original_size", network="net", limit=2, options=SMALL)
    fit([callback, stop, best], enable_checkpointing=True)
    assert len(found) == 2
    assert best.best_model_score is not None
    for seen in (best.best_model_score, stop.best_score):  # of the epoch that has just ended; kept as float32
        assert float(seen) == pytest.approx(max(found), abs=1e-7)
    seldom = ModelCheckpoint(dirpath=tmp_path / "b", monitor="ade20k/mIoU", mode="max", every_n_epochs=2)
    fit([of_demo(every_n_epochs=2), seldom], enable_checkpointing=True)
    assert seldom.best_model_score is not None


@pytest.mark.parametrize(
    ("monitor", "options", "remedy"),
    [
        (lambda: ModelCheckpoint(monitor="ade20k/mIoU"), {"every_n_epochs": 2}, "Give it every_n_epochs=2"),
        (lambda: ModelCheckpoint(monitor="ade20k/mIoU", save_on_train_epoch_end=False), {}, "save_on_train_epoch_end=True"),
        (lambda: EarlyStopping(monitor="ade20k/fwIoU"), {"every_n_epochs": 2}, "Give it strict=False"),
        (lambda: EarlyStopping(monitor="ade20k/fwIoU", check_on_train_epoch_end=False), {}, "check_on_train_epoch_end=True"),
    ],
)  # fmt: skip
def test_who_would_look_for_a_score_when_there_is_none_is_found_before_the_training(
    monitor: Callable[[], pl.Callback], options: dict[str, Any], remedy: str
) -> None:
    module = Trained()
    with pytest.raises(HarnessError, match=rf"would look when there is no new score\. .*{remedy}"):
        fit([of_demo(**options), monitor()], module, enable_checkpointing=True)
    assert module.losses == []
    with pytest.raises(HarnessError, match="Put it behind ADE20KEvaluation in the list"):
        fit([EarlyStopping(monitor="ade20k/mIoU"), of_demo()])


def test_the_callbacks_of_the_other_package_are_known() -> None:
    """`import pytorch_lightning as pl` has classes of its own: their averages and monitors count too."""
    others = pytest.importorskip("pytorch_lightning.callbacks", reason="pip install pytorch-lightning")

    class Mine(others.EarlyStopping):  # type: ignore[misc, name-defined]
        pass

    assert callback_module._is(others.WeightAveraging(), "WeightAveraging")
    assert callback_module._is(Mine("x"), "EarlyStopping")
    assert callback_module._is(ModelCheckpoint(), "ModelCheckpoint")
    assert not callback_module._is(others.EarlyStopping("x"), "ModelCheckpoint")
    assert not callback_module._is(type("EarlyStopping", (), {})(), "EarlyStopping")  # somebody else's of that name


def test_the_average_that_is_saved_is_what_is_evaluated(tmp_path: Path) -> None:
    callback, average = of_demo(), WeightAveraging(avg_fn=lambda old, new, _: old * 0.5 + new * 0.5)
    best = ModelCheckpoint(dirpath=tmp_path, monitor="ade20k/mIoU", mode="max", save_top_k=-1)
    fit([callback, average, best], enable_checkpointing=True, max_epochs=1)
    [path] = tmp_path.glob("*.ckpt")
    saved = Trained()
    saved.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    expected = ade.evaluate(saved.net, dataset="demo", protocol="original_size", limit=2, options=SMALL)
    assert callback.result is not None
    assert np.array_equal(callback.result.matrix, expected.matrix)
    trained = Trained()
    trained.load_state_dict(torch.load(path, weights_only=False)["current_model_state"])
    assert not torch.equal(saved.net.state_dict()[WEIGHT], trained.net.state_dict()[WEIGHT])


def test_a_quick_run_of_the_trainer_evaluates_one_image() -> None:
    callback = of_demo()
    module, _ = fit([callback], fast_dev_run=True)
    assert len(module.losses) == 1
    assert callback.result is None


def test_mistakes_of_the_callback() -> None:
    with pytest.raises(HarnessError, match="every_n_epochs=0"):
        ade.ADE20KEvaluation(dataset="demo", every_n_epochs=0)
    with pytest.raises(HarnessError, match="inference=nothing: unknown value.*From Python: protocol="):
        ade.ADE20KEvaluation(dataset="demo", protocol="nothing")
    with pytest.raises(HarnessError, match=r"network='decoder' failed on a Trained \(AttributeError: 'Trained' object"):
        fit([ade.ADE20KEvaluation(dataset="demo", network="decoder", options=SMALL)])
    with pytest.raises(HarnessError, match=r"failed on a Trained \(KeyError: 'x'\); expected one of its nn.Modules"):
        fit([ade.ADE20KEvaluation(dataset="demo", network=lambda _: {}["x"], options=SMALL)])
    with pytest.raises(HarnessError, match="'global_step' gives a int, expected an nn.Module of Trained"):
        fit([ade.ADE20KEvaluation(dataset="demo", network="global_step", options=SMALL)])

    with pytest.raises(HarnessError, match="/nowhere: no such folder or zip"):
        fit([ade.ADE20KEvaluation(root="/nowhere", network="net", options=SMALL)], max_epochs=0)
    with pytest.raises(HarnessError, match="prefix=None: expected a string"):
        ade.ADE20KEvaluation(dataset="demo", prefix=None)  # type: ignore[arg-type]
    with pytest.raises(HarnessError, match="workers=-1: expected a whole number"):
        ade.ADE20KEvaluation(dataset="demo", workers=-1)

    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        """Named as one that shards."""

    with pytest.raises(HarnessError, match="FSDPStrategy shards the network"):
        fit([ade.ADE20KEvaluation(dataset="demo", options=SMALL)], strategy=FSDPStrategy("cpu"))


@pytest.mark.parametrize(
    ("options", "channels", "message"),
    [
        (
            {"precision": "bf16-true"},
            150,
            r"weights are bfloat16.* \(From Python: options={'inference.precision': ...}",
        ),
        ({"precision": "64-true"}, 150, "weights are float64"),
        ({}, 21, "outputs 21 channels, ADE20K has 150"),
        ({}, 0, "no idea"),
    ],
)
def test_what_cannot_work_is_found_before_the_training(options: dict[str, Any], channels: int, message: str) -> None:
    class Other(Trained):
        def __init__(self) -> None:
            super().__init__()
            if channels == 21:
                self.net = torch.nn.Conv2d(3, 21, 4, 4)
            elif not channels:
                self.net = Broken()

    class Broken(torch.nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 150, 4, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) == 1:
                raise RuntimeError("no idea")
            return super().forward(images)

    module = Other()
    with pytest.raises(HarnessError, match=message):
        fit([ade.ADE20KEvaluation(dataset="demo", network="net", options=SMALL)], module, **options)
    assert module.losses == []


_TWO = """
import json
import torch
import ade_harness as ade
from tests.api.test_training import BUFFER, SMALL, fit
torch.set_num_threads(1)
plain, trainer = fit([], strategy="ddp", devices=2)
metrics = [float(trainer.callback_metrics["mIoU"])]
callback = ade.ADE20KEvaluation(dataset="demo", protocol="original_size", network="net", options=SMALL, workers=1)
alone, _ = fit([callback], strategy="ddp", devices=2, limit_val_batches=0)  # no forward of DDP's has compared buffers
found_alone = [callback.result.matrix.tolist(), alone.net.state_dict()[BUFFER].tolist()]
module, trainer = fit([callback], strategy="ddp", devices=2)
metrics.append(float(trainer.callback_metrics["mIoU"]))
again = ade.evaluate(module.net, dataset="demo", protocol="original_size", options=SMALL)  # alone, within DDP
found = {"losses": [plain.losses, module.losses], "metrics": metrics, "world": trainer.world_size,
         "scores": callback.result.scores, "ranks": sorted({r.rank for r in callback.result.rows}),
         "images": callback.result.images, "alone": again.scores, "buffers": found_alone,
         "of_buffers": ade.evaluate(alone.net, dataset="demo", protocol="original_size", options=SMALL).matrix.tolist()}
with open(f"rank{trainer.global_rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.mark.slow
def test_two_ranks_count_each_image_once(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(_TWO)
    done = subprocess.run(
        [sys.executable, "two.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    # each rank's batch statistics are its own, and stay so; what is evaluated are rank 0's, which it would save
    assert first["buffers"][1] != second["buffers"][1]
    assert first["buffers"][0] == second["buffers"][0] == first["of_buffers"] != second["of_buffers"]
    for watched in (first, second):
        plain, with_callback = watched["losses"]
        assert len(plain) > 0
        assert plain == with_callback
        assert watched["metrics"][0] == watched["metrics"][1]  # of torchmetrics' sum over ranks
        assert watched["world"] == 2
    assert first["losses"] != second["losses"]  # each rank has images of its own
    assert first["scores"] == second["scores"] == first["alone"] == second["alone"]
    assert first["images"] == 5
    assert first["ranks"] == [0, 1]


def test_one_score_alone_is_a_number_for_log_and_tracker() -> None:
    class Logs(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 5, 1)
            self.scores = SegmentationScores(5, score="mIoU")

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            output: torch.Tensor = self.layer(batch)
            self.scores.update(output.detach(), output.detach().argmax(1).roll(index, 1))
            self.log("mIoU", self.scores, on_step=False, on_epoch=True)  # Lightning computes and resets it
            return output.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    module = Logs()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=1))
    every = SegmentationScores(5)
    for index, image in enumerate(images):
        output = module.layer(image[None])
        every.update(output, output.argmax(1).roll(index, 1))
    assert float(trainer.callback_metrics["mIoU"]) == pytest.approx(float(every.compute()["mIoU"]), abs=1e-6)  # float32

    tracker = torchmetrics.MetricTracker(SegmentationScores(2, score="pixel_accuracy"))
    for right in (1, 3, 2):
        tracker.increment()
        labels = torch.tensor([[[0] * right + [1] * (4 - right)]])
        tracker.update(labels, torch.zeros(1, 1, 4, dtype=torch.int64))
    assert tracker.best_metric() == 0.75
    with pytest.raises(ValueError, match="score='miou': expected one of mIoU, "):
        SegmentationScores(score="miou")


def test_scores_are_in_the_trainers_own_logger(tmp_path: Path) -> None:
    """Lightning's, as its users read it: one row an evaluation, at the trainer's step."""
    results = []

    class Keeps(ade.ADE20KEvaluation):
        def on_train_epoch_end(self, *arguments: Any) -> None:
            super().on_train_epoch_end(*arguments)
            results.append(self.result)

    callback = Keeps(dataset="demo", protocol="original_size", network="net", options=SMALL)
    fit([callback], logger=CSVLogger(tmp_path, "logs", "0"), log_every_n_steps=1)
    with (tmp_path / "logs/0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["ade20k/mIoU"]]
    assert [(row["epoch"], row["step"]) for row in rows] == [("0", "3"), ("1", "7")]
    for row, result in zip(rows, results, strict=True):
        assert result is not None
        for name in ("mIoU", "pixel_accuracy", "mean_accuracy", "fwIoU"):  # Lightning keeps float32
            assert float(row[f"ade20k/{name}"]) == pytest.approx(result.metrics[name], abs=1e-7), name


@pytest.mark.parametrize(
    ("predictions", "message"),
    [
        (torch.randn(1, 4, 8, 8).to_sparse(), "preds: a sparse_coo tensor, expected a dense one"),
        (torch.nested.nested_tensor([torch.randn(4, 8, 8)]), "preds: a nested tensor, expected a dense one"),
        (torch.full((1, 4, 8, 8), torch.nan), r"preds hold NaN or \+inf"),
        (torch.full((1, 4, 8, 8), torch.inf), r"preds hold NaN or \+inf"),
        (torch.quantize_per_tensor(torch.rand(1, 4, 8, 8), 0.1, 0, torch.quint8), "preds: a quantised tensor"),
    ],
)
def test_scores_without_a_best_class_are_refused(predictions: torch.Tensor, message: str) -> None:
    metric = SegmentationScores(4)
    assert all(np.isnan(float(value)) for value in metric.compute().values())  # nothing counted is not 0 %
    metric = SegmentationScores(4)
    with pytest.raises(ValueError, match=message):
        metric.update(predictions, torch.zeros(1, 8, 8, dtype=torch.int64))
    assert int(metric.matrix.sum()) == 0


@pytest.mark.parametrize("outside", [True, False])
def test_the_metric_counts_in_and_out_of_inference_mode(outside: bool) -> None:
    with torch.inference_mode(not outside):
        metric = SegmentationScores(4)
    with torch.inference_mode(outside):
        metric.update(torch.randn(1, 4, 8, 8), torch.randint(0, 4, (1, 8, 8)))
    metric.update(torch.randn(1, 4, 8, 8), torch.randint(0, 4, (1, 8, 8)))
    assert int(metric.matrix.sum()) == 128


@pytest.mark.parametrize("name", ["miou", "loss"])
def test_a_score_that_is_not_logged_is_found_before_the_training(name: str, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor=f"ade20k/{name}", save_on_train_epoch_end=True)
    with pytest.raises(
        HarnessError, match=rf"monitor='ade20k/{name}'\): no such score\. .* ade20k/mIoU, .* ade20k/mean_dice"
    ):
        fit([ade.ADE20KEvaluation(dataset="demo", options=SMALL, network="net"), checkpoint], enable_checkpointing=True)


def test_scores_that_are_negated_when_they_are_read_are_counted_so() -> None:
    scores, target = torch.randn(1, 4, 4, 4), torch.randint(0, 4, (1, 8, 8))
    metric = SegmentationScores(4)
    metric.update(torch.complex(torch.zeros_like(scores), -scores).conj().imag, target)
    plain = SegmentationScores(4)
    plain.update(scores, target)
    assert torch.equal(metric.matrix, plain.matrix)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]
)
@pytest.mark.parametrize("classes", [5, 200, 300])
def test_the_metric_takes_integers_of_every_type(dtype: torch.dtype, classes: int) -> None:
    target = torch.arange(120).reshape(1, 8, 15) % min(classes, 100)
    predictions = target.roll(1)
    metrics = [ade.metrics.SegmentationScores(classes, ignore_index=ignored) for ignored in (None, -100, 256, 3)]
    for metric in metrics:
        metric.update(predictions.to(dtype), target.to(dtype))
        expected = torch.zeros(classes, classes + 1, dtype=torch.int64)
        counted = target != metric.ignore_index if metric.ignore_index is not None else target >= 0
        expected.index_put_((target[counted], predictions[counted]), torch.tensor(1), accumulate=True)
        assert torch.equal(metric.matrix, expected), metric.ignore_index


def test_the_callback_evaluates_at_the_end_whatever_ends_the_training() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            trainer.should_stop = True

    for limits, callbacks in (({"max_steps": 2, "max_epochs": -1}, []), ({"max_epochs": 50}, [Stop()])):
        callback = ade.ADE20KEvaluation(dataset="demo", every_n_epochs=7, limit=2, network="net", options=SMALL)
        fit([*callbacks, callback], **limits)
        assert callback.result is not None


@pytest.mark.slow
def test_what_ends_a_training_early_costs_no_last_score(tmp_path: Path) -> None:
    """EarlyStopping decides after the callback's own turn."""
    callback = of_demo(every_n_epochs=5)
    stop = EarlyStopping("mIoU", patience=1, min_delta=1e9, check_on_train_epoch_end=True)
    _, trainer = fit([callback, stop], max_epochs=9, logger=CSVLogger(tmp_path))
    assert trainer.current_epoch == 2
    assert callback.result is not None
    rows = list(csv.DictReader((tmp_path / "lightning_logs/version_0/metrics.csv").open()))
    logged = [float(row["ade20k/mIoU"]) for row in rows if row.get("ade20k/mIoU")]
    assert logged == [callback.result.scores["mIoU"]]
    times: list[int] = []

    class Counted(type(callback)):  # type: ignore[misc]
        def _evaluate(self, trainer: pl.Trainer, *rest: Any) -> Any:
            times.append(trainer.current_epoch)
            return super()._evaluate(trainer, *rest)

    fit([Counted(dataset="demo", network="net", every_n_epochs=2, options=SMALL)], max_epochs=3)
    assert times == [1, 2]  # and none beside them


@pytest.mark.slow
def test_callbacks_of_one_prefix_and_schedulers_without_a_score_are_refused() -> None:
    with pytest.raises(HarnessError, match="2 of the trainer's callbacks log as 'ade20k/'"):
        fit([of_demo(), of_demo()])

    class Plateau(Trained):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "ade20k/mIoU"}}

    with pytest.raises(HarnessError, match="learning rate's scheduler .* Give it interval='epoch' and frequency=2"):
        fit([of_demo(every_n_epochs=2)], Plateau())
    fit([of_demo()], Plateau())
    for odd, message in (
        ({"network": 5}, "network=5: expected a name, a function or None"),
        ({"limit": 3, "options": {"dataset.limit": 2}}, "dataset.limit is given as an argument too"),
        ({"limit": 0}, "limit=0: expected a whole number from 1 up"),
        ({"protocol": "a,b"}, "protocol='a,b': expected a name"),
    ):
        with pytest.raises(HarnessError, match=message):
            ade.ADE20KEvaluation(dataset="demo", **odd)  # type: ignore[arg-type]
    ade.ADE20KEvaluation(dataset="demo", limit=np.int64(2))  # type: ignore[arg-type]
