"""Networks and functions of the caller: every kind that can be evaluated is, and every other is one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ade_harness as ade
from ade_harness.cli.main import main
from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.errors import ArgumentError, HarnessError
from ade_harness.inference.flops import flops_of_image
from ade_harness.metrics import SegmentationScores
from tests.api.networks import Colours

SMALL = {"dataset.images": 3, "metrics.resamples": 1000}


class ChannelsLast(Colours):
    """As a port from another framework may be."""

    def forward(self, images: Tensor) -> Tensor:
        """Return [N, h, w, C]."""
        return super().forward(images).permute(0, 2, 3, 1)


class WithGradients(Colours):
    """Turns gradients on for itself, as networks do that adapt to each image."""

    def forward(self, images: Tensor) -> Tensor:
        """Return scores that want a gradient."""
        with torch.enable_grad():
            return super().forward(images)


class Lazy(nn.Module):
    """Has seen no image yet."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyConv2d(150, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.layer(images)
        return scores


class Broken(Colours):
    """Fails for a reason that has nothing to do with types."""

    def forward(self, images: Tensor) -> Tensor:
        """Raise."""
        raise KeyError("a key")


class NoArray:
    """Says that it is an array, and is none."""

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        """Raise."""
        raise KeyError("x")


def frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(Colours().eval()))


def test_a_program_is_the_network_that_it_holds() -> None:
    program = torch.export.export(Colours().eval(), (torch.zeros(1, 3, 64, 48),))
    settings = {"dataset": "demo", "limit": 2, "protocol": "original_size", "options": {"metrics.resamples": 0}}
    settings["options"] |= {
        "inference.resize.rule": "exact",
        "inference.resize.height": 64,
        "inference.resize.width": 48,
    }
    assert ade.evaluate(program, **settings).scores == ade.evaluate(program.module(), **settings).scores


def exported() -> nn.Module:
    sides = {2: torch.export.Dim("h", min=8, max=4000), 3: torch.export.Dim("w", min=8, max=4000)}
    return torch.export.export(Colours().eval(), (torch.zeros(1, 3, 64, 48),), dynamic_shapes=(sides,)).module()


def traced() -> nn.Module:
    module: nn.Module = torch.jit.trace(Colours().eval(), torch.zeros(1, 3, 64, 48))
    return module


@pytest.mark.parametrize(
    "make", [WithGradients, frozen, exported, traced, lambda: nn.Sequential(exported(), nn.Dropout(0.5))]
)
def test_networks_of_every_kind_have_the_scores_of_the_plain_one(make: Callable[[], nn.Module]) -> None:
    plain = ade.evaluate(Colours(), dataset="demo", options=SMALL)
    result = ade.evaluate(make(), dataset="demo", options=SMALL)
    assert [row.label_hash for row in result.rows] == [row.label_hash for row in plain.rows]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (ChannelsLast(), r"returned \[1, \d+, \d+, 150\] .* channels seem to be last.*permute\(0, 3, 1, 2\)"),
        (
            Colours().bfloat16(),
            r"weights are bfloat16, images float32: inference.precision=bf16, or give a copy in float32",
        ),
        (Colours().half(), r"weights are float16, .*inference.precision=fp16"),
        (Colours().double(), r"weights are float64, images float32: give a copy in float32, copy.deepcopy"),
        (Lazy(), r"the network's layer.weight has no shape yet \(a lazy layer\)"),
        (nn.Sequential(nn.LazyBatchNorm2d(affine=False), Colours()), "the network's 0.running_mean has no shape yet"),
        (Broken().double(), r"\(KeyError: 'a key'\)\. ADE_HARNESS_TRACEBACK"),
    ],
)
def test_networks_that_cannot_be_evaluated(network: nn.Module, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        ade.evaluate(network, dataset="demo", options=SMALL)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: [[1, 2], [3]], "returned a list, not an array"),
        (
            lambda image: torch.zeros(image.shape[:2], dtype=torch.long).to_sparse(),
            r"returned torch.int64 \[128, 170\]",
        ),
        (lambda image: torch.zeros(image.shape[:2], dtype=torch.bfloat16), "returned torch.bfloat16"),
        (lambda image: NoArray(), "returned a NoArray, not an array"),
        (lambda image: None, r"returned object \[\], expected integers"),
    ],
)
def test_what_is_no_array(function: Any, message: str) -> None:
    with pytest.raises(HarnessError, match=rf"ADE_val_00000001: the function {message}"):
        ade.evaluate(function, dataset="demo", options=SMALL)


@pytest.fixture
def half_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("half_by_default")
def test_another_default_type_is_refused() -> None:
    with pytest.raises(HarnessError, match="torch's default dtype is bfloat16: scores would differ"):
        ade.evaluate(Colours().float(), dataset="demo", options=SMALL)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("model.checkpoint", "options: model.checkpoint has no effect: the model is in memory"),
        ("model._target_", "has no effect"),
        ("model.architecture.backbone.depth", "has no effect"),
        ("tracking.project", "options: tracking logs a run directory. Give run_dir=PATH"),
    ],
)
def test_options_without_effect_are_refused(option: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message):
        ade.evaluate(Colours(), dataset="demo", options={**SMALL, option: "x"})
    if option.startswith("tracking"):
        with pytest.raises(HarnessError, match="tracking.project has no effect"):
            ade.load_model("demo", options={option: "x"})


@pytest.mark.slow
def test_a_run_directory_of_a_network_in_memory_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {**SMALL, "tracking": "wandb", "tracking.project": "mine", "model.label": "my network"}
    result = ade.evaluate(Colours(), dataset="demo", run_dir=tmp_path / "run", options=options)
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert json.loads((tmp_path / "run/tracking.json").read_text())["id"]
    assert ade.load_run(tmp_path / "run").mIoU == result.mIoU
    with pytest.raises(HarnessError, match="the function failed"):
        ade.evaluate(lambda image: 1 // 0, dataset="demo", run_dir=tmp_path / "failed", options=options)
    assert list((tmp_path / "failed/wandb").glob("offline-run-*/run-*.wandb"))  # marked as failed
    environment = dict(os.environ)
    with pytest.raises(HarnessError, match="tracking.run_id=abc: a score can be added to a run only online"):
        ade.evaluate(
            Colours(), dataset="demo", run_dir=tmp_path / "none", options={**options, "tracking.run_id": "abc"}
        )
    assert dict(os.environ) == environment
    assert not (tmp_path / "none").exists()
    ade.evaluate(Colours(), dataset="demo", options={**SMALL, "tracking.kind": "none", "model.name": "mine"})
    ade.load_model("demo", options={"tracking": "none"})
    ade.evaluate(Colours(), dataset="demo", run_dir=tmp_path / "quiet", options=SMALL)
    assert not (tmp_path / "quiet/tracking.json").exists()


def test_a_class_of_main_within_another_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lazy, "__module__", "__main__")
    with pytest.raises(HarnessError, match="devices=2: ranks are other processes, which cannot import this Lazy of"):
        ade.evaluate(nn.Sequential(nn.Identity(), Lazy()), dataset="demo", devices=2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentationScores("a"), "num_classes='a': expected a whole number"),  # type: ignore[arg-type]
        (lambda: SegmentationScores(True), "num_classes=True"),
        (lambda: SegmentationScores(100_000), "num_classes=100000: its matrix would need 75 GiB"),
        (
            lambda: SegmentationScores(3).update(*torch.zeros((2, 1, 4, 4), dtype=torch.int64, device="meta")),
            "on the device meta: they have no values",
        ),
        (lambda: SegmentationScores(3, kernels_choice="fast"), "kernels_choice='fast': expected one of auto, torch"),
        (lambda: SegmentationScores(2).update(torch.zeros(1, 2, 2, 2).cfloat(), torch.zeros(1, 2, 2).long()), "complex64"),
        (lambda: SegmentationScores(3, ignore_index="x"), "ignore_index='x'"),  # type: ignore[arg-type]
        (lambda: SegmentationScores(3, fast=True), "torchmetrics.Metric: Unexpected keyword arguments: `fast`"),
        (lambda: SegmentationScores(3).update(np.zeros((1, 2, 2)), torch.zeros(1, 2, 2).long()), "preds: a ndarray"),
        (lambda: SegmentationScores(3).update(torch.zeros(1, 2, 2).long(), [[1]]), "target: a list"),
    ],
)  # fmt: skip
def test_arguments_of_the_metric(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()
    assert issubclass(ArgumentError, HarnessError)
    assert issubclass(ArgumentError, ValueError)


def test_a_network_that_exits_ends_no_program_of_the_callers() -> None:
    class Leaves(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            sys.exit(0)

    def leaves(image: np.ndarray) -> np.ndarray:
        sys.exit(3)

    for model, code in ((Leaves(), 0), (leaves, 3)):
        with pytest.raises(HarnessError, match=rf"called sys.exit\({code}\) at .*test_in_memory.py:\d+, in "):
            ade.evaluate(model, dataset="demo", limit=1, options={"metrics.resamples": 0})


@pytest.mark.slow
def test_what_a_network_of_transformers_says_of_itself_is_heeded() -> None:
    """Without its folder: names are checked, and what the folder's loader would correct is said."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    names = ade20k_classes().names
    shown: dict[str, Any] = {"dataset": "demo", "limit": 1, "options": {"metrics.resamples": 0}}

    def network(**labels: Any) -> torch.nn.Module:
        return SegformerForSemanticSegmentation(SegformerConfig(decoder_hidden_size=8, **sizes, **labels)).eval()

    with pytest.raises(HarnessError, match=r"not in the order of .*: channel 0 is 'building'"):
        ade.evaluate(network(id2label=dict(enumerate((*names[1:], names[0])))), **shown)
    for made in (network(id2label=dict(enumerate(names))), network(num_labels=150)):
        notes = " ".join(ade.evaluate(made, **shown).notes)
        assert "no preprocessor_config.json, so pixels were normalised with model.input's mean 123.675/" in notes
        assert "its layer norms use another eps than the official code" in notes
        assert "class names" not in notes
    made.register_buffer("attn_mask_probs", torch.ones(2))
    assert "attn_mask_probs are not 0" in " ".join(ade.evaluate(made, **shown).notes)
    made.attn_mask_probs.zero_()
    assert "attn_mask_probs" not in " ".join(ade.evaluate(made, **shown).notes)


@pytest.mark.slow
def test_a_network_of_transformers_travels_to_ranks(tmp_path: Path) -> None:
    """Its constructor tells transformers what it records, which a pickle does not; and hooks count FLOPs once more."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 1, 1]}
    network = SegformerForSemanticSegmentation(SegformerConfig(num_labels=150, decoder_hidden_size=8, **sizes)).eval()
    torch.save(network, tmp_path / "network.pt")
    program = (
        "import sys, torch\nfrom ade_harness.api.predictors import unpickled\n"
        "print(float(unpickled(sys.argv[1])(torch.ones(1, 3, 64, 64)).logits.sum()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "network.pt"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    inference = compose_config(["inference=original_size"]).inference
    images = torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        assert float(done.stdout) == pytest.approx(float(network(images).logits.sum()), rel=1e-5)
    for own in (True, False):  # after a forward too, at which transformers installs its hooks
        assert (flops_of_image(network, inference, (64, 64), own_hooks=own) or 0) > 1e5


class Merging(nn.Module):
    """As low-rank adapters: merged into the weight for evaluation, taken out for training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 150, 1)
        self.weight, self.low = nn.Parameter(torch.randn(150, 3)), nn.Parameter(torch.full((150, 3), 0.1))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        """Merge or take out."""
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.low.data if mode else self.low.data
            self.merged = not mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return scores."""
        weight = self.weight if self.merged else self.weight + self.low
        return self.conv(images) + torch.einsum("nchw,kc->nkhw", images, weight)


class Counting(nn.Module):
    """Keeps statistics of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 150, 1)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        """Return scores, and count."""
        self.seen += images.mean() + 1
        scores: Tensor = self.conv(images) + self.seen
        return scores


class AlwaysTraining(nn.Sequential):
    def train(self, mode: bool = True) -> AlwaysTraining:
        """Stay in training mode."""
        super().train(True)
        return self


SHORT: dict[str, Any] = {"dataset": "demo", "limit": 2, "options": {"metrics.resamples": 0}}


@pytest.mark.slow
def test_a_network_gets_back_what_its_own_train_or_forward_has_changed() -> None:
    merging = Merging().train()
    before = {name: value.clone() for name, value in merging.state_dict().items()}
    ade.evaluate(merging, **SHORT)
    assert not merging.merged
    assert merging.training
    assert all(torch.equal(value, before[name]) for name, value in merging.state_dict().items())
    counting = Counting()
    first, second = (ade.evaluate(counting, **SHORT) for _ in range(2))
    assert torch.equal(counting.seen, torch.zeros(1))
    assert [row.label_hash for row in first.rows] == [row.label_hash for row in second.rows]
    norm = nn.BatchNorm2d(3)
    always = AlwaysTraining(norm, nn.Conv2d(3, 150, 1))
    kept = norm.running_mean.clone() if norm.running_mean is not None else None
    result = ade.evaluate(always, **SHORT)
    assert kept is not None
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, kept)
    assert any("stay in training mode though it was put into evaluation mode" in note for note in result.notes)
    assert not any("training mode" in note for note in first.notes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"checkpoint": {"a": 1}},
            "checkpoint is a dict, expected the path of a file. A state_dict goes into its network",
        ),
        ({"limit": 2.5}, "limit=2.5: expected a whole number from 1 up"),
        ({"limit": True}, "limit=True: expected a whole number"),
        ({"protocol": "a,b"}, "protocol='a,b': expected a name, such as 'mmseg_slide_512'"),
        ({"dataset": ""}, "dataset='': expected a name, such as 'ade20k'"),
        ({"device": "mps"}, r"device='mps': no such device here"),
        ({"options": {"run.label_maps": "all"}}, "run.label_maps has no effect: there is no run directory"),
    ],
)
def test_odd_arguments_are_one_message_each(given: dict[str, Any], message: str) -> None:
    model: Any = "demo" if "checkpoint" in given else Colours()
    with pytest.raises(HarnessError, match=message) as error:
        ade.evaluate(model, **{**SHORT, **given})
    assert len(str(error.value)) < 200


def test_a_method_is_no_function_of_an_image_and_wrappers_have_the_name_of_what_they_wrap() -> None:
    net = Colours().eval()
    with pytest.raises(HarnessError, match="model is a method of a Colours: give the network itself"):
        ade.evaluate(net.forward, **SHORT)
    for wrapped in (nn.DataParallel(net), torch.jit.script(net)):
        assert ade.evaluate(wrapped, **SHORT).label == "Colours"

    def inside(image: np.ndarray) -> np.ndarray:
        return np.zeros(image.shape[:2], np.uint8)

    assert ade.evaluate(inside, **SHORT).label == "inside"
    with pytest.raises(HarnessError, match="cannot be pickled"):
        ade.evaluate(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 150, 1)), devices=2, **SHORT)


def test_a_class_that_is_ignored_by_default_is_asked_for() -> None:
    with pytest.raises(ArgumentError, match="num_classes=847: 255, which is ignored by default, is one of the classes"):
        SegmentationScores(847)
    every = torch.arange(847).view(1, 7, 121)
    metric = SegmentationScores(847, ignore_index=None)
    metric.update(every, every)
    assert float(metric.compute()["mIoU"]) == 1.0
    assert int(metric.matrix.sum()) == 847
    assert SegmentationScores(255).ignore_index == 255
    metric.update(every[:0], every[:0])  # of no image nothing is counted
    assert int(metric.matrix.sum()) == 847
    with pytest.raises(ArgumentError, match=r"Give target\.squeeze\(1\)"):
        SegmentationScores(5).update(torch.zeros(1, 5, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64))


def test_what_no_command_can_make_again_is_not_to_be_resumed(tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(image: np.ndarray) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("a fault")
        return np.zeros(image.shape[:2], np.uint8)

    with pytest.raises(HarnessError, match="the function failed"):
        ade.evaluate(failing, run_dir=tmp_path / "run", **SHORT)
    with pytest.raises(HarnessError, match="not finished .* Its model was in memory: evaluate it again, into another"):
        ade.load_run(tmp_path / "run")
    assert main(["resume", str(tmp_path / "run")]) == 2


def test_one_rank_of_a_training_may_evaluate_alone() -> None:
    """DistributedDataParallel's forward sends buffers to all ranks: here nobody would ever receive them."""

    class Waits(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

        def forward(self, *_: Any) -> Any:
            raise AssertionError("it would wait for the other ranks")

    net = Colours()
    found = ade.evaluate(Waits(net), dataset="demo", options=SMALL)
    assert (found.label, found.mIoU) == ("Colours", ade.evaluate(net, dataset="demo", options=SMALL).mIoU)


def test_an_average_is_called_one() -> None:
    net = torch.optim.swa_utils.AveragedModel(Colours())
    assert ade.evaluate(net, dataset="demo", options=SMALL).label == "Colours (average)"


def test_weights_that_are_spread_over_ranks_are_refused() -> None:
    class DTensor(nn.Parameter):
        pass

    net = nn.Conv2d(3, 150, 1)
    net.weight = DTensor(net.weight.detach())
    with pytest.raises(HarnessError, match=r"sharded over ranks \(DTensor\).*full_state_dict=True"):
        ade.evaluate(net, dataset="demo", options=SMALL)


@pytest.mark.parametrize("kind", ["name", "classifier", "features"])
def test_a_backbone_without_a_head_is_named(kind: str) -> None:
    import timm

    made: Any = {
        "name": lambda: "vit_large_patch14_dinov2.lvd142m",
        "classifier": lambda: timm.create_model("test_vit"),
        "features": lambda: timm.create_model("test_resnet", features_only=True),
    }[kind]()
    with pytest.raises(HarnessError, match="has no segmentation head. `python -m ade_harness probe model=timm"):
        ade.evaluate(made, dataset="demo", options=SMALL)


def test_precision_and_protocol_are_part_of_a_result() -> None:
    net = Colours()
    half = ade.evaluate(net, dataset="demo", options={**SMALL, "inference.precision": "bf16"})
    flipped = {**SMALL, "inference.tta.flip": True}
    whole = ade.evaluate(net, dataset="demo", protocol="original_size", options=flipped)
    assert (half.precision, whole.precision) == ("bf16", "fp32")
    assert "bf16" in str(half)
    assert "bf16" in repr(half)
    assert "bf16" in half._repr_html_()
    assert str(whole.protocol).endswith(", changed: tta.flip")
    table = ade.compare([half, whole])
    assert list(table["precision"]) == ["bf16", "fp32"]
    assert table["protocol"][1] == whole.protocol
    assert set(table["dataset"]) == {"demo"}


def test_a_segmenter_is_named_by_what_it_was_loaded_from() -> None:
    segmenter = ade.load_model("segformer_b0", options={"model.weights": "random"})
    with pytest.raises(HarnessError, match=r"is a Segmenter: give what it was loaded from.*evaluate\('segformer_b0'"):
        ade.evaluate(segmenter, dataset="demo", options=SMALL)


class Joins(nn.Module):
    """Joins features of two strides, as a U-Net does."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 4, 16, stride=16), nn.ConvTranspose2d(4, 150, 16, stride=16)
        self.beside = nn.Conv2d(3, 150, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.beside(images) + self.up(self.down(images))
        return scores


def test_sides_that_a_network_does_not_take_are_padded_on_request() -> None:
    with pytest.raises(HarnessError, match=r"multiples of 32 only: inference.resize.pad_multiple=32 pads images"):
        ade.evaluate(Joins(), dataset="demo", options=SMALL)
    assert ade.evaluate(Joins(), dataset="demo", options={**SMALL, "inference.resize.pad_multiple": 16}).images == 3


def test_options_are_dotted_keys() -> None:
    with pytest.raises(HarnessError, match="one dotted key for each value, such as 'model.input.mean'"):
        ade.evaluate(Colours(), dataset="demo", options={"model.input": {"mean": [0, 0, 0]}})


def test_the_metric_in_a_collection_and_in_a_compiled_module() -> None:
    from torchmetrics import JaccardIndex, MetricCollection

    scores, target = torch.randn(2, 5, 8, 8), torch.randint(0, 5, (2, 8, 8))
    both = MetricCollection({
        "theirs": JaccardIndex(task="multiclass", num_classes=5), "ours": SegmentationScores(5, score="mIoU"),
    })  # fmt: skip
    both.update(preds=scores, target=target)
    alone = SegmentationScores(5)
    torch.compile(lambda a, b: alone.update(a * 1, b), backend="eager")(scores, target)
    assert float(both.compute()["ours"]) == float(alone.compute()["mIoU"])


@pytest.mark.slow
def test_a_folder_that_smp_saved_is_smps(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="pip install '.[smp]'")
    smp.Unet("resnet18", encoder_weights=None, classes=150).save_pretrained(tmp_path / "saved")
    found = ade.evaluate(
        tmp_path / "saved", dataset="demo", options={**SMALL, "dataset.images": 1, "metrics.resamples": 0}
    )
    assert found.images == 1


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda: ade.evaluate(Joins(), dataset="demo", options=SMALL),
            "From Python: options={'inference.resize.pad_multiple': ...}.",
        ),
        (
            lambda: ade.evaluate(nn.Conv2d(3, 151, 1), dataset="demo", options=SMALL),
            "From Python: options={'model.class_map': ...}.",
        ),
        (lambda: ade.evaluate("segformer_b0"), "From Python: root="),
        (lambda: ade.load_model("segformer_b0", checkpoint="nowhere.pth"), "From Python: checkpoint=.)"),
        (lambda: ade.evaluate(Colours(), dataset="demo", options={"model.nope": 1}), None),
    ],
)
def test_messages_spell_options_as_python_does(
    call: Callable[[], Any], expected: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # where no data set is found
    with pytest.raises(HarnessError) as raised:
        call()
    assert ("From Python" in str(raised.value)) == (expected is not None)
    assert (expected or "") in str(raised.value)


def test_a_network_that_was_made_in_inference_mode_is_evaluated() -> None:
    class Counting(Colours):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                self.calls += 1
            return super().forward(images)

    with torch.inference_mode():
        network = Counting()
    ade.evaluate(network, dataset="demo", limit=2, options={"metrics.resamples": 0})
    assert float(network.calls) == 0
