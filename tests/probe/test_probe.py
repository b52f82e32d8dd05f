"""Linear probes: the published schedules, crops that depend on their number alone, and training that resumes exactly."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ade_harness.config.compose import compose_config
from ade_harness.config.files import choices
from ade_harness.config.probe import ProbeConfig
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.demo import open_demo
from ade_harness.errors import HarnessError
from ade_harness.evaluation.job import describe_marks
from ade_harness.files.atomic import write_json
from ade_harness.models.loading import load_model
from ade_harness.probe import module
from ade_harness.probe.crops import Crops, Share, distort, make_crop
from ade_harness.probe.schedule import learning_rate
from ade_harness.probe.training import cut_log
from ade_harness.runs.lock import RunLock
from tests.cli.test_cli import one_message
from tests.conftest import Done
from tests.models.systems.test_dense_systems import official_weights
from tests.probe.composing import compose_probe
from tests.warm import WarmPopen

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

SMALL = (
    "model=dinov3_7b_linear", "model.architecture.backbone.hidden_size=128", "model.architecture.backbone.num_hidden_layers=4",
    "model.architecture.backbone.num_attention_heads=2", "model.architecture.backbone.intermediate_size=256",
    "model.backbone_checkpoint=backbone.pth", "dataset=demo",
)  # fmt: skip
PROBE = (
    *SMALL, "dataset.images=40", "tracking=none", "runtime.accelerator=cpu", "runtime.workers=0",
    "probe.crop=64", "probe.side=64", "probe.iterations=24", "probe.warmup=4", "probe.batch=4", "probe.lr=0.02",
    "probe.log_every=4", "probe.save_every=4",
)  # fmt: skip


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    state = {k: v for k, v in official_weights("dinov3_vit7b_linear").items() if "segmentation_model.1" not in k}
    torch.save(state, tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


def published(name: str, *overrides: str) -> ProbeConfig:
    recipe = compose_probe(["model=dinov3_7b_linear", f"probe={name}", *overrides]).probe
    assert recipe is not None
    return recipe


# the recipe


def test_the_learning_rate_is_the_official_codes() -> None:
    """Against facebookresearch/dinov3 @ 6876159, build_scheduler with the published configuration, AdamW, 40,000 steps."""
    recipe = published("dinov3_linear")
    official = {
        0: 1.0000000000287558e-09, 1: 1.0000000000287558e-09, 2: 6.676493083500112e-07, 3: 1.3342652833999938e-06,
        750: 0.00048998380795835, 1500: 0.0009618833173083499, 1501: 0.0009965296112632268, 20000: 0.0005,
        39998: 6.1685027641367184e-12, 39999: 1.5421257049119675e-12,
    }  # fmt: skip
    for step, rate in official.items():
        assert learning_rate(recipe, step) == pytest.approx(rate, rel=1e-12)


def test_mmsegmentations_rate_is_a_line_under_a_warm_up() -> None:
    recipe = published("dinov2_linear")
    assert learning_rate(recipe, 0) == pytest.approx(1e-9)
    assert learning_rate(recipe, 1500) == pytest.approx(1e-3 * (1 - 1500 / 40000))
    assert learning_rate(recipe, 39999) == pytest.approx(1e-3 / 40000)


@pytest.mark.parametrize("name", choices("probe"))
def test_recipes_name_their_source(name: str) -> None:
    recipe = published(name)
    assert recipe.name == name
    assert "facebookresearch/dinov" in recipe.source
    assert (recipe.iterations, recipe.batch, recipe.warmup) == (40_000, 16, 1500)
    users = [m for m in ("dinov2_g_linear", "dinov2_g_ms", "dinov3_7b_linear", "siglip2_g") if uses(m, name)]
    assert users


def uses(model: str, recipe: str) -> bool:
    found: bool = compose_config([f"model={model}"]).model.probe == recipe
    return found


# crops


def test_crops_depend_on_their_number_alone(cache: Path) -> None:
    dataset = open_demo(cache, 40, split="training")
    recipe = published("dinov3_linear", "probe.crop=48", "probe.side=48")
    crops = Crops(dataset, recipe, (123.0, 116.0, 103.0), (58.0, 57.0, 57.0))
    later, first = crops[57], crops[3]
    again = Crops(dataset, recipe, (123.0, 116.0, 103.0), (58.0, 57.0, 57.0))
    assert all(torch.equal(a, b) for a, b in zip(first, again[3], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(later, again[57], strict=True))
    assert first[0].shape == (3, 48, 48)
    assert first[0].dtype == torch.float32
    assert first[1].dtype == torch.int64
    other = Crops(dataset, published("dinov3_linear", "probe.crop=48", "probe.side=48", "probe.seed=1"), *crops_of())
    assert not torch.equal(other[3][0], first[0])


def crops_of() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (123.0, 116.0, 103.0), (58.0, 57.0, 57.0)


def test_every_round_has_every_image_once(cache: Path) -> None:
    dataset = open_demo(cache, 40, split="training")
    seen: list[str] = []
    plain = type(dataset).load

    class Listed:
        pairs = dataset.pairs

        def load(self, index: int):  # type: ignore[no-untyped-def]
            seen.append(dataset.pairs[index].image_id)
            return plain(dataset, index)

    crops = Crops(Listed(), published("dinov3_linear", "probe.crop=8", "probe.side=8"), *crops_of())  # type: ignore[arg-type]
    for n in range(80):
        crops[n]
    assert sorted(seen[:40]) == sorted(seen[40:]) == dataset.ids
    assert seen[:40] != seen[40:]


@pytest.mark.parametrize("backend", ["opencv", "pillow"])
def test_image_and_target_stay_together(backend: str) -> None:
    """An image that shows its own target: after scale 1, crop and mirror it still does."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 150, (50, 70)).astype(np.uint8)
    image = np.repeat(target[..., None], 3, axis=2)
    recipe = published(
        "dinov3_linear",
        "probe.side=50", "probe.scale=[1,1]", "probe.crop=32", "probe.distortion=none", f"probe.backend={backend}",
    )  # fmt: skip
    mirrored = set()
    for n in range(12):
        cropped, labels = make_crop(image, target, recipe, np.random.default_rng(n))
        assert cropped.shape == (32, 32, 3)
        assert np.array_equal(cropped[..., 1], labels)
        mirrored.add(any(np.array_equal(labels, target[t : t + 32, l : l + 32]) for t in range(19) for l in range(39)))  # noqa: E741
    assert mirrored == {True, False}


def test_small_images_are_padded_right_and_below(cache: Path) -> None:
    dataset = open_demo(cache, 40, split="training")
    recipe = published("dinov3_linear", "probe.side=20", "probe.scale=[1,1]", "probe.crop=96", "probe.distortion=none")
    image, target = Crops(dataset, recipe, *crops_of())[0]
    assert (target[20:, 20:] == 255).any()
    height, width = int((target != 255).any(1).sum()), int((target != 255).any(0).sum())
    assert min(height, width) <= 20
    assert (image[:, max(height, 21) :, :] == 0).all() or (image[:, :, max(width, 21) :] == 0).all()


def test_a_crop_of_one_class_is_drawn_again() -> None:
    target = np.zeros((40, 400), np.uint8)
    target[:, 380:] = np.random.default_rng(0).integers(0, 150, (40, 20))
    image = np.zeros((40, 400, 3), np.uint8)
    overrides = ["probe.side=40", "probe.scale=[1,1]", "probe.crop=40", "probe.distortion=none"]
    mixed = [
        sum(np.unique(make_crop(image, target, recipe, np.random.default_rng(n))[1]).size > 1 for n in range(60))
        for recipe in (
            published("dinov3_linear", *overrides),
            published("dinov3_linear", *overrides, "probe.most_of_one_class=1"),
        )
    ]
    assert mixed[0] > mixed[1]


@pytest.mark.parametrize("kind", ["dinov3", "mmseg"])
def test_distortion_keeps_a_picture(kind: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    changed = [distort(image.copy(), kind, np.random.default_rng(n)) for n in range(40)]
    assert all(c.shape == image.shape and c.dtype == np.uint8 for c in changed)
    assert 30 < sum(not np.array_equal(c, image) for c in changed) < 40  # all five are left out now and then
    assert np.array_equal(distort(image, "none", np.random.default_rng(0)), image)


def test_ranks_share_a_batch() -> None:
    recipe = published("dinov3_linear", "probe.iterations=3", "probe.warmup=0", "probe.batch=6")
    shares = [list(Share(recipe, 1, rank, 2)) for rank in (0, 1)]
    assert shares == [[[6, 8, 10], [12, 14, 16]], [[7, 9, 11], [13, 15, 17]]]


# training


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "loss.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_evaluate_reads_the_head(call: Callable[..., Done], tmp_path: Path, backbone: Path) -> None:
    done = call("probe", *PROBE, "run.dir=run", "tracking=wandb", "tracking.mode=offline")
    assert done.code == 0, done.err
    assert "W&B: " in done.out
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
    found = losses(tmp_path / "run")
    assert len(found) == 6
    assert np.mean(found[-2:]) < 0.95 * found[0]
    assert "DEMO: synthetic images" in done.out
    head = load_file(tmp_path / "run/head.safetensors")
    assert head["head.classifier.weight"].shape == (150, 128, 1, 1)
    assert head["head.norm.num_batches_tracked"] == 24
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["finished"]
    assert "dataset.split" not in manifest["identity"]  # the configuration stands once, in config.yaml
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["dataset"]["split"] == "training"
    scored = call(
        *SMALL, "model.checkpoint=run/head.safetensors", "inference.resize.side=64", "inference.window.crop=64",
        "inference.window.stride=43", "dataset.limit=4", "tracking=none", "run.overlays=0", "runtime.workers=0",
        "run.dir=scored",
    )  # fmt: skip
    assert scored.code == 0, scored.err
    facts = json.loads((tmp_path / "scored/manifest.json").read_text())["model"]
    assert facts["origin"] == "run/head.safetensors"
    assert facts["backbone_origin"] == "backbone.pth"
    # the trained weights are the ones that are evaluated
    model = load_model(compose_config([*SMALL, f"model.checkpoint={tmp_path}/run/head.safetensors"]).model)
    assert torch.equal(model.module.head.classifier.weight, head["head.classifier.weight"])


def test_which_weights_of_the_backbones_file_is_said_and_heeded(
    call: Callable[..., Done], tmp_path: Path, backbone: Path
) -> None:
    """A trainer's file holds averages beside the weights: a head is scored above those that it was trained above."""
    state = torch.load(backbone)
    torch.save({"model": state, "model_ema": {key: value + 1 for key, value in state.items()}}, backbone)
    done = call("probe", *PROBE, "probe.iterations=1", "probe.warmup=0", "model.checkpoint_weights=ema", "run.dir=run")
    assert done.code == 0, done.err
    assert "Note: of backbone.pth: model_ema" in done.out
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["identity"]["backbone.part"] == "model_ema"
    for part, code in (("model_ema; the averaged weights; those that were trained are in model", 0), ("model", 2)):
        changed = {**manifest, "identity": {**manifest["identity"], "backbone.part": part}}  # the first: as it was said
        (tmp_path / "run/manifest.json").write_text(json.dumps(changed))
        assert call("resume", "run").code == code
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    assert "model.checkpoint_weights=ema" in done.out.partition("evaluate it: ")[2]
    head = f"model.checkpoint={tmp_path}/run/head.safetensors"
    same = load_model(compose_config([*SMALL, head, "model.checkpoint_weights=ema"]).model)
    assert "other_backbone" not in same.facts
    assert same.facts["backbone_part"].startswith("model_ema")
    other = load_model(compose_config([*SMALL, head]).model)  # the weights that were trained, unless one asks
    assert other.facts["backbone_part"].startswith("model;")
    assert "was trained above other weights of the backbone's file (model_ema" in other.facts["other_backbone"]
    assert other.facts["other_backbone"] in other.notes
    # what the head was trained for is in its file too
    assert same.class_names == list(ade20k_classes().names)
    assert same.facts["head_demo"]
    elsewhere = SimpleNamespace(
        is_demo=False, is_partial=False, is_official=False, classes=None, pairs=[], expected_images=1
    )
    marks = describe_marks(compose_config([]), elsewhere, same.facts, [])  # type: ignore[arg-type]
    assert marks[0].startswith("DEMO: the head was trained on synthetic images")


def test_an_interrupted_training_ends_with_the_same_bits(
    call: Callable[..., Done], tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("probe", *PROBE, "run.dir=whole").code == 0

    def interrupted(recipe, step):  # type: ignore[no-untyped-def]
        if step == 10:
            raise KeyboardInterrupt
        return learning_rate(recipe, step)

    with monkeypatch.context() as patch:
        patch.setattr(module, "learning_rate", interrupted)
        done = call("probe", *PROBE, "run.dir=parts")
    assert done.code == 2, done.out + done.err
    assert not (tmp_path / "parts/head.safetensors").exists()
    again = call("probe", *PROBE, "run.dir=parts", "probe.save_every=7")
    assert again.code == 0, again.err
    assert "continuing after 8 of 24 iterations" in again.out
    whole, parts = (load_file(tmp_path / run / "head.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    # finished: the same again
    before = (tmp_path / "parts/head.safetensors").read_bytes()
    assert call("probe", *PROBE, "run.dir=parts").code == 0
    assert (tmp_path / "parts/head.safetensors").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_after_its_iteration(
    call: Callable[..., Done], tmp_path: Path, backbone: Path, number: signal.Signals
) -> None:
    """What was trained since the last save is saved, and the next row of the log is that of an undisturbed training."""
    rare = ["probe.save_every=1000", "probe.log_every=2", "probe.iterations=40"]
    command = [sys.executable, "-m", "ade_harness", "probe", *PROBE, *rare, "runtime.devices=2", "run.dir=parts"]

    def start(overrides: list[str]) -> subprocess.Popen[str]:
        return WarmPopen(overrides, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(overrides: list[str]) -> tuple[str, str]:
        done = start(overrides)
        out, err = done.communicate(timeout=120)
        assert done.returncode == 0, err
        return out, err

    process = start(command)
    end = time.monotonic() + 90
    while not (tmp_path / "parts/loss.jsonl").exists() and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == {signal.SIGTERM: 75, signal.SIGINT: 2}[number], err
    saved = json.loads((tmp_path / "parts/saved.json").read_text())["step"]
    assert 2 <= saved < 40
    found = call("status", "parts", "--json")
    assert json.loads(found.out)["iterations"] == saved
    if number == signal.SIGINT:
        return  # how it goes on does not depend on the signal
    again, _ = run(command)
    assert f"continuing after {saved} of 40 iterations" in again
    run([*command[:-1], "run.dir=whole"])
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    first, second = (load_file(tmp_path / run / "head.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.slow
def test_two_ranks_stop_in_order_and_go_on(tmp_path: Path, backbone: Path) -> None:
    command = [sys.executable, "-m", "ade_harness", "probe", *PROBE, "runtime.devices=2", "probe.iterations=40"]

    def start() -> subprocess.Popen[str]:
        return WarmPopen(
            [*command, "run.dir=run"], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    first = start()
    end = time.monotonic() + 90
    while not (tmp_path / "run/state.pt").exists() and time.monotonic() < end:
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 75, err
    assert "Traceback" not in err
    assert not (tmp_path / "run/head.safetensors").exists()
    again = start()
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "continuing after" in out
    head = load_file(tmp_path / "run/head.safetensors")
    assert head["head.norm.num_batches_tracked"] == 40
    assert len(losses(tmp_path / "run")) == 10


# mistakes


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["model=segformer_b0"],
            "no recipe is published for it. Choose one: probe=NAME (dinov2_linear, dinov2_ms, dinov3_linear",
        ),
        (["model=segformer_b0", "probe=dinov3_linear"], "model=segformer_b0: has no linear head on a frozen backbone."),
        (["probe=dinov3"], "probe=dinov3: unknown value. Did you mean"),
        (["probe.iteration=3"], "probe.iteration: no such option. Did you mean 'probe.iterations'"),
        (["probe.iterations=many"], "probe.iterations=many: expected an integer."),
        (["probe.iterations=0"], "probe.iterations=0: expected 1 to 100,000,000"),
        (["probe.schedule=exp"], "probe.schedule=exp: unknown value, expected one of cosine, poly"),
        (["probe.scale=[2,1]"], "probe.scale=[2.0, 1.0]: expected 2 numbers, each more than 0, the smaller first"),
        (["probe.lr=-1"], "probe.lr=-1: expected more than 0"),
        (["probe.betas=[0.9]"], "probe.betas=[0.9]: expected 2 numbers, each 0 or more and less than 1"),
        (["probe.dropout=2"], "probe.dropout=2: expected 0 to 1"),
        (["probe.side=1000000"], "probe.side=1000000: expected"),
        (["-m"], "probe -m: cannot be swept"),
        (["probe.warmup=24"], "probe.warmup=24: expected 0 to below probe.iterations (24)"),
        (["model.checkpoint=x.pth"], "model.checkpoint: probe makes it."),
        (["model.backbone_checkpoint=none.pth"], "model.backbone_checkpoint=none.pth: no such file"),
        (["dataset=ade20k", "dataset.root=nowhere"], "nowhere: no such folder or zip"),
    ],
)
def test_mistakes_are_one_message(call: Callable[..., Done], backbone: Path, overrides: list[str], text: str) -> None:
    recipe = [word for word in PROBE if word != "dataset=demo" or "dataset=ade20k" not in overrides]
    done = call("probe", *recipe, *overrides)
    assert done.code == 2, done.out
    assert text in done.err
    assert "Traceback" not in done.err


def test_another_recipe_does_not_continue(call: Callable[..., Done], tmp_path: Path, backbone: Path) -> None:
    short = ("probe.iterations=4", "probe.warmup=1", "run.dir=run")
    assert call("probe", *PROBE, *short).code == 0
    done = call("probe", *PROBE, *short, "probe.lr=0.5")
    assert done.code == 2
    assert "holds a run with another setup, so it is not continued. Different: probe.lr: was 0.02, is 0.5" in done.err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert {"device", "environment.torch", "code.version"} <= manifest["identity"].keys()
    other = {**manifest["identity"], "environment.torch": "1.0"}
    (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, "identity": other}))
    assert 'Different: environment.torch: was "1.0", is "2.' in call("probe", *PROBE, *short).err
    packages = {**manifest["identity"], "environment.transformers": "4.0", "environment.pillow": "9.9"}
    (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, "identity": packages}))
    assert 'environment.pillow: was "9.9", is "1' in call("probe", *PROBE, *short).err
    earlier = {k: v for k, v in other.items() if not k.startswith(("device", "environment.", "code."))}
    (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, "identity": earlier}))
    assert call("probe", *PROBE, *short).code == 0  # a version that did not keep these
    prose = ("model.label=another", "model.about.paper=another")  # which decides nothing
    assert call("probe", *PROBE, *short, *prose).code == 0
    good = torch.load(tmp_path / "run/state.pt", weights_only=True)
    moments = good["optimizer"]["state"]
    for name, wrong in {
        "step": "four", "losses": 3.0, "head": [1], "optimizer": {"state": {}, "param_groups": []},
    }.items():  # fmt: skip
        torch.save({**good, name: wrong}, tmp_path / "run/state.pt")
        one_message(call("resume", "run"), "state.pt: is damaged", "Delete it to start again")
    for wrong in (-1, True, 2.0, None):
        torch.save({**good, "step": wrong}, tmp_path / "run/state.pt")
        one_message(call("resume", "run"), "is damaged (step: expected an integer, 0 or more)")
    torch.save({**good, "step": 5}, tmp_path / "run/state.pt")  # of a longer recipe: nothing is to be deleted
    one_message(call("resume", "run"), "has 5 iterations already, and probe.iterations=4. Take at least as many")
    diverged = torch.full_like(moments[0]["exp_avg"], torch.nan)
    for wrong, said in ((torch.zeros(3), "is damaged"), (diverged, "has diverged"), ("a", "is damaged")):
        spoiled = {**moments, 0: {**moments[0], "exp_avg": wrong}}
        torch.save({**good, "optimizer": {**good["optimizer"], "state": spoiled}}, tmp_path / "run/state.pt")
        one_message(call("resume", "run"), f"state.pt: {'the training ' if wrong is diverged else ''}{said}")
    torch.save([1, 2], tmp_path / "run/state.pt")
    one_message(call("resume", "run"), "state.pt: is damaged")
    (tmp_path / "run/state.pt").write_bytes(b"PK cut")
    assert "state.pt: is damaged" in call("probe", *PROBE, *short).err
    assert "state.pt: is damaged" in call("resume", "run").err
    scored = call("run.dir=run", "dataset.limit=2", "tracking=none")
    assert scored.code == 2, scored.out


def test_a_backbone_alone_is_not_evaluated(backbone: Path) -> None:
    """A head that nobody trained would be random numbers without a mark."""
    with pytest.raises(
        HarnessError, match=r"backbone\.pth: a backbone alone, without a head \(head\.classifier\.weight is missing\)"
    ):
        load_model(compose_config([*SMALL, f"model.checkpoint={backbone}"]).model)


def test_a_training_has_the_run_directory_of_an_evaluation(
    cli: Callable[..., Done], backbone: Path, tmp_path: Path
) -> None:
    """One record and one lock: `status` shows it, and `resume` continues it from its own configuration."""
    done = cli("probe", *PROBE, "run.dir=run", "probe.iterations=8", "probe.save_every=2")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert {
        "schema",
        "status",
        "started",
        "finished",
        "marks",
        "seeds",
        "environment",
        "model",
        "dataset",
    } <= manifest.keys()
    assert (manifest["kind"], manifest["status"]) == ("probe", "finished")
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["probe"]["iterations"] == 8
    shown = cli("status", "run")
    assert shown.code == 0, shown.err
    assert "state:          finished" in shown.out
    assert "trained:        8 of 8 iterations" in shown.out
    again = cli("resume", "run")
    assert again.code == 0, again.err
    old = {**manifest["identity"], "probe.iterations": 8}
    manifest = {"schema": manifest["schema"], "kind": "probe", "identity": old, "finished": False}  # as older ones were
    (tmp_path / "run/manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run/config.yaml").unlink()
    assert "state:          interrupted" in cli("status", "run").out
    for damage in ({"identity": {**old, "probe.iterations": "8"}}, {"identity": {}}):
        (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, **damage}))
        damaged = cli("status", "run")
        assert damaged.code == 2
        assert "manifest.json" in damaged.err
        assert "Traceback" not in damaged.err
    assert "give its `probe` command again" in cli("resume", "run").err


def test_a_running_training_says_its_rate(
    call: Callable[..., Done], backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ade_harness.probe.module._REPORT_EVERY_S", 0.0)
    seen: list[dict[str, Any]] = []
    unlink = Path.unlink

    def keep(path: Path, missing_ok: bool = False) -> None:
        if path.name == "progress.json":
            seen.append(json.loads(path.read_text()))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", keep)
    assert call("probe", *PROBE, "run.dir=run", "probe.iterations=8", "probe.save_every=2").code == 0
    (last,) = seen  # taken away at the end
    assert (last["done"], last["images"], last["seconds_left"]) == (8, 8, 0)
    assert last["images_per_second"] > 0
    assert not (tmp_path / "run/progress.json").exists()
    # the same half way, as another shell sees it
    write_json(tmp_path / "run/progress.json", {**last, "done": 4, "images_per_second": 2.5, "seconds_left": 90.0})
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    (tmp_path / "run/manifest.json").write_text(json.dumps({**manifest, "status": "running"}))
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    try:
        shown = call("status", "run")
    finally:
        lock.release()
    assert "4 iterations, 2.50 iterations/s, 1:30 left" in shown.out, shown.out


def test_the_log_of_an_interrupted_training_ends_with_its_last_saved_state(tmp_path: Path) -> None:
    """A process that is killed may leave half a row."""
    rows = [{"step": step, "loss": 1 / step, "lr": 1e-3} for step in (10, 20, 30)]
    whole = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "loss.jsonl").write_text(whole + '{"step": 40, "lo')
    cut_log(tmp_path, 20)
    assert (tmp_path / "loss.jsonl").read_text() == "".join(f"{json.dumps(row)}\n" for row in rows[:2])
    (tmp_path / "loss.jsonl").write_text(whole.replace('"step": 20', '"step": "b"'))
    with pytest.raises(HarnessError, match=r"loss\.jsonl: damaged: step"):
        cut_log(tmp_path, 20)
    (tmp_path / "loss.jsonl").unlink()
    cut_log(tmp_path, 20)
    assert not list(tmp_path.iterdir())
