"""The command line: help, configuration, every mistake as one message with exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from ade_harness.cli.commands import COMMANDS, EVERYWHERE, Command
from ade_harness.cli.doctor import _ranks
from ade_harness.cli.main import run_command
from ade_harness.config.arguments import known_keys
from ade_harness.config.compose import compose_config
from ade_harness.config.files import choices, conf_dir, read_choice
from ade_harness.config.kinds import kind_of
from ade_harness.errors import HarnessError
from ade_harness.leaderboard.published import published_rows
from tests.conftest import REPOSITORY, Done, write_pair
from tests.tracking.offline_file import read_wandb

Call = Callable[..., Done]
FAST = ("tracking=none", "run.overlays=0", "runtime.workers=0")


def one_message(done: Done, *overrides: str) -> None:
    """Check that a command failed with exit code 2 and one clear message."""
    assert done.code == 2, done.out + done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err + done.out
    for word in overrides:
        assert word in done.err, done.err


def test_help_lists_commands_and_options(call: Call) -> None:
    for overrides in (["--help"], ["-h"], ["help"]):
        done = call(*overrides)
        assert done.code == 0
        for command in COMMANDS:
            assert re.search(rf"^  {command.name} +{re.escape(command.summary)}$", done.out, re.M), command.name
    assert call("--version").out.startswith("ade-harness ")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_each_command_shows_its_own_options(call: Call, command: Command) -> None:
    done = call(*command.name.split(), "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: python -m ade_harness {command.name} ")
    for argument in (*command.arguments, *EVERYWHERE):
        assert argument.settings["help"], argument.names  # an option without help is on no list
        assert argument.names[-1] in done.out or argument.settings.get("metavar", "") in done.out
    others = {a.names[-1] for c in COMMANDS for a in c.arguments} - {a.names[-1] for a in command.arguments}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", done.out.partition("common overrides")[0]))
    assert not shown & {name for name in others if name.startswith("--")} - {"--with"}
    assert ("model.checkpoint=" in done.out) is (command.name == "evaluate")


def test_models_lists_the_catalogue(call: Call) -> None:
    done = call("models")
    assert done.code == 0
    assert len(published_rows()) == 21
    assert sum(r.metric == "mIoU" for r in published_rows()) == 6
    for row in published_rows():
        assert row.system.split(" ")[0] in done.out
    assert "never" in done.out
    assert {row.config for row in published_rows()} <= set(choices("model"))  # every row can be run
    assert "published scores" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert len(done.out.splitlines()) < 80
    reported = call("models", "mask2former_swin_l", "segformer_b0")
    assert "bit-identical" in reported.out
    assert "inference=ss: mmseg_whole_512_align32" in reported.out
    assert "no such model. Nearest: segformer_b" in call("models", "segformer_b").err
    assert "no such model. Nearest: " in call("models", "zzz").err
    assert published_rows()[0].score == 62.9
    for metric in ("mIoU", "miou"):  # ranked by score, ties by date, as the site does
        rows = [r for r in published_rows() if r.metric == metric]
        assert rows == sorted(rows, key=lambda r: (-r.score, r.date))


def test_doctor_reports_what_there_is(call: Call) -> None:
    done = call("doctor")
    assert done.code == 0
    for word in (
        "python:",
        "torch:",
        "CUDA:",
        "GPUs:",
        "memory:",
        "ranks:",
        "disk:",
        "W&B:",
        "network:",
        "dataset:",
        "SLURM:",
    ):
        assert word in done.out


@pytest.mark.parametrize(
    ("ranks", "cores", "gib", "expected", "advice"),
    [
        (8, 64, 512, "8 by default, with 8 cores and 64.0 GiB each", ()),
        (1, 1, 24, "1 by default, with 1 core and 24.0 GiB each", ("--cpus-per-task",)),
        (8, 12, 32, "8 by default, with 1.5 cores and 4.0 GiB each", ("--cpus-per-task", "--mem")),
    ],
)
def test_doctor_judges_what_each_rank_has(
    ranks: int, cores: int, gib: int, expected: str, advice: tuple[str, ...]
) -> None:
    found = _ranks(ranks, cores, gib * 2**30)
    assert found.startswith(expected)
    assert [word in found for word in ("--cpus-per-task", "--mem")] == [
        w in advice for w in ("--cpus-per-task", "--mem")
    ]
    assert (found == expected) is (advice == ())


def test_cfg_job_shows_the_composed_configuration(call: Call) -> None:
    done = call("model=segformer_b0", "model.weights=random", "dataset=ade20k", "dataset.root=/x", "--cfg", "job")
    shown = yaml.safe_load(done.out)
    assert shown["inference"]["name"] == "mmseg_whole_512_align32"
    assert shown["model"]["hub"]["sha256"].startswith("6ae39add")
    assert call("--cfg=job").out == call("--cfg", "job").out


@pytest.mark.parametrize("name", choices("model"))
def test_every_model_configuration_composes(name: str) -> None:
    kind = kind_of(read_choice("model", name)["kind"])
    values = {"_target_": "a.b", "id": "x", "url": "http://x", "path": "x"}
    needed = [f"model.{kind.needs}={values[kind.needs]}"] if kind.needs else []
    data = [] if name == "demo" else ["dataset=ade20k", "dataset.root=x"]
    cfg = compose_config([f"model={name}", *needed, *data])
    assert cfg.model.name == name
    assert cfg.model.label
    assert cfg.inference.source


@pytest.mark.parametrize("name", sorted({*choices("inference")} - {"ss", "ms"}))
def test_every_protocol_names_its_source(name: str) -> None:
    assert len(compose_config([f"inference={name}"]).inference.source) > 5


def test_a_models_protocol_can_be_overridden() -> None:
    base = ["dataset=ade20k", "dataset.root=x", "model=segformer_b0"]
    assert compose_config([*base, "inference=fit_512"]).inference.name == "fit_512"


def test_your_own_yaml_from_your_own_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        "defaults: [{override /inference@_global_.inference: fit_512}, _self_]\n"
        "name: mine\nkind: custom\nlabel: mine\n_target_: a.b\n"
    )
    cfg = compose_config(["model=mine", "dataset=ade20k", "dataset.root=x"], tmp_path)
    assert (cfg.model.name, cfg.inference.name) == ("mine", "fit_512")
    with pytest.raises(HarnessError, match=r"model=mina: unknown value. Nearest: mine"):
        compose_config(["model=mina"], tmp_path)
    with pytest.raises(HarnessError, match="is not a folder"):
        compose_config([], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model=segformer_bo"], ["model=segformer_bo: unknown value. Nearest: segformer_b0, "]),
        (["model=segformer_b0", "model.weights=random", "model.checkpoint=/no/such.pth", "dataset=demo"], ["model.checkpoint: would not be read, since model.weights asks for random ones"]),
        (["model=segfomer_b0"], ["model=segfomer_b0: unknown value", "Nearest: segformer_b0"]),
        (["dataset.limt=3"], ["dataset.limt: no such option", "'dataset.limit'"]),
        (["devices=2"], ["'runtime.devices'"]),
        (["modle=demo"], ["Did you mean 'model'"]),
        (["evalute"], ["'evalute' is neither a command nor a key=value override", "'evaluate'"]),
        (["--confg", "job"], ["unrecognized arguments: --confg", "--cfg"]),
        (["dataset.limit=many"], ["dataset.limit=many: expected an integer."]),
        (["dataset.limit=0"], ["dataset.limit=0: expected 1 or more"]),
        (["runtime.devices=none"], ["runtime.devices=none: expected 1 to 4,096 ranks, or auto"]),
        (["runtime.accelerator=gpu"], ["expected one of auto, cpu, cuda"]),
        (["inference.resize.rule=short"], ["'short_side'"]),
        (["inference.resize.rule=exact"], ["inference.resize.height=None"]),
        (["inference=fit_512", "inference.output.upsample=one_step"], ["does not go with padding"]),
        (["model.input.std=[1,0,1]"], ["model.input.std[1]=0: expected more than 0"]),
        (["model.class_map=[0,150]"], ["model.class_map[1]=150: expected 0..149"]),
        (["model=onnx"], ["model.path must be set"]),
        (["model=custom"], ["model._target_ must be set"]),
        (["model=hf"], ["model.id must be set"]),
        (["model=segformer_b0"], ["dataset.root must be set", "data download --root data", "dataset=demo tries", "data/ADEChallengeData2016"]),
        (["dataset=ade20k", "dataset.root=x"], ["model=demo works only on the synthetic demo images"]),
        (["inference.resize.pad_to=[1]"], ["inference.resize.pad_to=[1]: expected 2 numbers (height, width), each 1 to 16,384"]),
        (["inference=fit_input", "inference.output.upsample=one_step"], ["does not go with padding"]),
        (["+foo=1"], ["foo: no such option"]),
        (["dataset.images=1000000000000"], ["1 to 20,000 synthetic images"]),
        (["--cfg", "jobs"], ["invalid choice: 'jobs'"]),
        (["--config-dir"], ["expected one argument"]),
        (["model=segformer_b0", "model.weights=random", "model.architecture.backbone.depths=[1]", "dataset=demo", "dataset.limit=1"], ["makes no network"]),
        (["a=[b"], ["not in Hydra\'s grammar"]),
        (["dataset=ade20k", "dataset.root=nowhere", "model=segformer_b0"], ["nowhere: no such folder or zip"]),
        (["model=hf", "model.id=x", "model.checkpoint=w.pth"], ["model.checkpoint: model.kind=hf reads no weight file: it is what model.id names. Leave it out."]),
        (["model.checkpoint_weights=ema"], ["model.checkpoint_weights: model.kind=demo reads no weight file: its weights are part of the package"]),
        (["model=smp", "model.id=x", "model.checkpoint=w.pth"], ["model.checkpoint: model.kind=smp reads no weight file: it is what model.id names"]),
        (["models", "--x"], ["models: unrecognized arguments: --x"]),
        (["data"], ["data download"]),
        (["data", "verify", "nowhere"], ["nowhere: no such folder or zip"]),
        (["data", "download", "--colour"], ["unrecognized arguments: --colour"]),
        (["runtime.accelerator=cuda", "runtime.devices=99"], ["GPU"]),
        (["tracking=null"], ["tracking=null: unknown value. Known: none, wandb."]),
        (["tracking=false"], ["tracking=false: unknown value."]),
        (["model=1"], ["model=1: unknown value."]),
        (["dataset="], ["dataset=: unknown value."]),
        (["+inference=null"], ["inference=null: unknown value."]),
        (["-m", "model=null", "dataset.limit=1,2"], ["model=null: unknown value."]),
        (["-m", "hydra/launcher=null", "dataset.limit=1,2"], ["hydra/launcher=null: hydra/launcher takes the name of a choice."]),
        (["~dataset=[1,2]"], ["deletion value must be a string", "Given: ~dataset=[1,2]"]),
        (["runtime.seed=-1"], ["runtime.seed=-1: expected 0 to 4,294,967,295"]),
        (["model.seed=9223372036854775808"], ["model.seed=9223372036854775808: expected 0 to 4,294,967,295"]),
        (["metrics.seed=-1"], ["metrics.seed=-1: expected 0 to"]),
        (["runtime.threads=100000"], ["runtime.threads=100000: expected 1 to 1,024"]),
        (["runtime.threads=0"], ["runtime.threads=0: expected 1 to 1,024"]),
        (["runtime.workers=100000"], ["runtime.workers=100000: expected 0 to 256"]),
        (["runtime.devices=5000"], ["runtime.devices=5000: expected 1 to 4,096 ranks, or auto"]),
        (["runtime.accelerator=cpu", "runtime.devices=4096"], ["has memory for", "ranks at most"]),
        (["runtime.num_nodes=99999"], ["runtime.num_nodes=99999: expected 1 to 10,000 nodes, or auto"]),
        (["metrics.resamples=1000000000000"], ["expected 1,000 to 1,000,000, or 0 for no intervals"]),
        (["run.dir=caf\udce9/run"], ["run.dir=caf\\udce9/run: its name is not UTF-8. Rename it"]),
        (["-m", "run.dir=caf\udce9/run", "dataset.limit=1,2"], ["run.dir=caf\\udce9/run: its name is not UTF-8"]),
        (["model=onnx", "model.path=caf\udce9.onnx", "dataset=demo"], ["model.path=caf\\udce9.onnx: its name is not UTF-8"]),
        (["probe", "model=timm", "model.backbone=resnet18", "run.dir=caf\udce9"], ["run.dir=caf\\udce9: its name is not UTF-8"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(call: Call, tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    one_message(call(*overrides), *expected)
    assert not list(tmp_path.iterdir())  # nothing written


def test_known_keys_cover_the_schema() -> None:
    keys = set(known_keys())
    assert {
        "model.hub.sha256",
        "runtime.devices",
        "inference.resize.pad_to",
        "run.dir",
        "model.kwargs",
    } <= keys


# the demo, and what a run directory holds


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the embedded default once, without arguments but where to write."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "ade_harness"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run, done.stdout


@pytest.mark.slow
def test_demo_says_that_it_is_one_on_every_output(demo: tuple[Path, str]) -> None:
    run, shown = demo
    assert shown.count("DEMO: synthetic images") == 2
    for name in ("metrics.json", "manifest.json", "config.yaml", "per_class.csv"):
        assert "DEMO: synthetic images" in (run / name).read_text(), name
    import pyarrow.parquet as pq

    segment = next((run / "ledger").glob("*.parquet"))
    assert b"DEMO" in pq.read_schema(segment).metadata[b"ade_harness.marks"]


def test_demo_is_far_better_than_chance(demo: tuple[Path, str]) -> None:
    metrics = json.loads((demo[0] / "metrics.json").read_text())
    assert metrics["complete"] is True
    assert metrics["images"] == 200
    assert metrics["mIoU"] > 0.5  # chance is below 0.01
    assert metrics["mIoU"] == metrics["mIoU_csail"] == metrics["mIoU_detectron2"]  # all classes occur
    assert {"pixel_accuracy", "mean_accuracy", "fwIoU", "final_score", "pixels"} <= metrics.keys()


def test_run_directory_holds_the_whole_record(demo: tuple[Path, str]) -> None:
    run, _ = demo
    matrix = np.load(run / "confusion_matrix.npy")
    assert (matrix.shape, matrix.dtype) == ((150, 151), np.int64)
    metrics = json.loads((run / "metrics.json").read_text())
    assert matrix.sum() == metrics["pixels"]
    frame = pd.read_parquet(run / "ledger")
    assert len(frame) == 200
    assert frame.valid_pixels.sum() == metrics["pixels"]
    table = pd.read_csv(run / "per_class.csv")
    assert len(table) == 150
    assert table.IoU.mean() == pytest.approx(metrics["mIoU"])
    assert table.ground_truth_pixels.sum() == metrics["pixels"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["dataset"]["images"] == 200
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "finished"
    assert manifest["command"] == ["python", "-m", "ade_harness"]
    assert len(manifest["dataset"]["content_hash"]) == 64
    assert manifest["timings"]["world_size"] == 1
    assert manifest["environment"]["packages"]["torch"]
    assert len(list((run / "overlays").glob("*.png"))) == 4


def test_terminal_shows_the_table(demo: tuple[Path, str]) -> None:
    _, shown = demo
    for overrides in (
        "mIoU",
        "pixel accuracy",
        "frequency-weighted IoU",
        "final score",
        "best classes",
        "worst classes",
    ):
        assert overrides in shown
    assert "run directory:" in shown
    assert "images/s" in shown
    assert "\x1b[" not in shown  # no control codes in a log
    assert "published" not in shown  # there is no published score of the demo


# W&B


@pytest.mark.slow
def test_the_result_says_where_the_time_went(demo: tuple[Path, str]) -> None:
    run, shown = demo
    assert re.search(r"time breakdown: .*forward \d+%.*; in parallel: loaders \d+%, recorder \d+%", shown)
    stages = json.loads((run / "manifest.json").read_text())["timings"]["stages"]
    assert set(stages) == {"wait", "copy", "forward", "labels", "counts", "backlog", "ledger", "decode"}
    assert all(seconds >= 0 for seconds in stages.values())


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["nan", "inf"])
def test_invalid_scores_stop_the_run_and_name_the_image(call: Callable[..., Done], tiny_ade: Path, spoil: str) -> None:
    done = call(
        "model=custom", "model._target_=tests.inference.test_predictor.Fixed", f"model.kwargs.spoil={spoil}",
        "dataset=ade20k", f"dataset.root={tiny_ade}", "tracking=none", "runtime.workers=0", "inference=original_size",
    )  # fmt: skip
    assert done.code == 2
    assert re.search(r"ADE_val_00001\d+: .*% of the model's scores are NaN or \+inf. Check the checkpoint", done.err)
    assert "No score: 0 of" in done.err


@pytest.mark.slow
def test_both_kernels_give_the_same_run(call: Callable[..., Done], tmp_path: Path) -> None:
    overrides = ("dataset.limit=6", "tracking=none", "runtime.workers=0", "run.overlays=0")
    for kernels in ("torch", "numba"):
        assert call(*overrides, f"runtime.kernels={kernels}", f"run.dir={tmp_path / kernels}").code == 0
    matrices = [np.load(tmp_path / kernels / "confusion_matrix.npy") for kernels in ("torch", "numba")]
    assert np.array_equal(*matrices)
    done = call(*overrides, "runtime.kernels=triton")
    assert done.code == 2
    assert "runtime.kernels=triton: works on cuda only" in done.err


def test_wandb_offline_run_holds_the_result(demo: tuple[Path, str]) -> None:
    run, shown = demo
    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert str(file.parent.name) in shown
    records = read_wandb(file)
    (started,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert (started.project, started.run_group, started.job_type) == ("ade20k", "demo", "evaluate")
    assert "demo" in started.tags
    config = {u.key: json.loads(u.value_json) for u in started.config.update}
    assert config["dataset"]["images"] == 200
    assert config["provenance"]["marks"]
    summary: dict[str, object] = {}
    for record in records:
        updates = record.summary.update if record.WhichOneof("record_type") == "summary" else ()
        summary |= {(u.key or ".".join(u.nested_key)): json.loads(u.value_json) for u in updates}
        history = record.history.item if record.WhichOneof("record_type") == "history" else ()
        summary |= {(u.key or ".".join(u.nested_key)): json.loads(u.value_json) for u in history}
    metrics = json.loads((run / "metrics.json").read_text())
    assert summary["mIoU"] == metrics["mIoU"]
    assert summary["pixels"] == metrics["pixels"]
    assert summary["per_class.nrows"] == 150
    assert summary["confusion_matrix._type"] == "image-file"
    pictures = [key for key in summary if key.startswith("overlays/") and key.endswith(".path")]
    assert len(pictures) == 4 * 3  # with the masks of prediction and truth
    for key in (*pictures, "confusion_matrix.path", "per_class.path"):
        assert (file.parent / "files" / str(summary[key])).is_file()


@pytest.mark.slow
def test_without_tracking_wandb_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from ade_harness.cli.main import main; code = main(sys.argv[1:]);"
        "assert 'wandb' not in sys.modules, 'imported'; sys.exit(code)"
    )
    overrides = ["dataset.limit=2", "metrics.resamples=0", *FAST]
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# real runs on small data


@pytest.mark.slow
def test_predictions_of_the_truth_score_one(call: Call, tiny_ade: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for path in (tiny_ade / "annotations/validation").iterdir():
        Image.fromarray(np.maximum(np.array(Image.open(path)), 1)).save(folder / path.name)
    overrides = ["model=predictions", f"model.path={folder}", "dataset=ade20k", f"dataset.root={tiny_ade}", *FAST]
    done = call(*overrides, "run.dir=run")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["mIoU"] == metrics["pixel_accuracy"] == 1.0
    assert metrics["complete"] is False
    assert "PARTIAL: 7 of 2,000 images" in done.out
    for path in folder.iterdir():
        Image.fromarray(np.array(Image.open(path)) - 1).save(path)  # zero-based, but read as official:
    done = call(*overrides, "run.dir=run2")
    assert done.code == 0, done.err
    assert "one too low" not in done.out  # seven images are no evidence
    done = call(*overrides, "model.encoding=zero_based", "run.dir=run3")
    assert json.loads((tmp_path / "run3/metrics.json").read_text())["mIoU"] == 1.0
    (folder / "ADE_val_00001003.png").unlink()
    one_message(call(*overrides), "1 of 7 label files are missing, the first is ADE_val_00001003.png")


@pytest.mark.slow
def test_predictions_from_the_zip_count_the_same(call: Call, tiny_ade: Path, tmp_path: Path) -> None:
    archive = tmp_path / "ADEChallengeData2016.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in sorted(tiny_ade.rglob("*.*")):
            opened.write(file, file.relative_to(tiny_ade.parent))
    folder = tiny_ade / "annotations/validation"
    for name, root in (("a", tiny_ade), ("b", archive)):
        done = call(
            "model=predictions", f"model.path={folder}", "dataset=ade20k", f"dataset.root={root}", f"run.dir={name}",
            "tracking=none", "runtime.workers=2",
        )  # fmt: skip
        assert done.code == 0, done.err
    a, b = (np.load(tmp_path / n / "confusion_matrix.npy") for n in "ab")
    assert np.array_equal(a, b)


@pytest.mark.slow
def test_random_weights_are_marked_on_every_output(call: Call, tiny_ade: Path, tmp_path: Path) -> None:
    done = call(
        "model=segformer_b0", "model.weights=random", "dataset=ade20k", f"dataset.root={tiny_ade}",
        "dataset.limit=1", "run.dir=run", "tracking=none",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.count("RANDOM WEIGHTS") == 3  # at the start, above the result, beside the published score
    assert "not comparable with the published 37.4: RANDOM WEIGHTS" in done.out
    for name in ("metrics.json", "manifest.json", "config.yaml", "per_class.csv"):
        assert "RANDOM WEIGHTS" in (tmp_path / "run" / name).read_text()
    assert "published by others" in done.out
    assert "37.40" in done.out


def test_a_resized_copy_of_the_data_set_is_marked(call: Call, tiny_ade: Path) -> None:
    folder = tiny_ade / "annotations/validation"
    done = call("model=predictions", f"model.path={folder}", "dataset=ade20k", f"dataset.root={tiny_ade}", *FAST)
    assert done.code == 0, done.err
    assert "NOT THE OFFICIAL IMAGES: 7 of 7 have another size, such as ADE_val_00001000" in done.out


def test_labels_that_are_off_by_one_are_recognised(call: Call, tmp_path: Path) -> None:
    root, rng = tmp_path / "ADEChallengeData2016", np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for number in range(1, 13):
        labels = rng.integers(1, 150, (4, 5)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        write_pair(root, f"ADE_val_{number:08d}", np.zeros((*labels.shape, 3), np.uint8), labels)
        Image.fromarray(labels - 1).save(
            tmp_path / "mine" / f"ADE_val_{number:08d}.png"
        )  # zero-based, read as official
    done = call("model=predictions", "model.path=mine", "dataset=ade20k", f"dataset.root={root}", *FAST)
    assert done.code == 0, done.err
    printed = " ".join(done.out.split())
    assert "every predicted class may be one too low: with 1 added, 99% of the pixels agree instead of 0%" in printed
    assert "12 of 12 images (sign test, p = 0.0002)" in printed


def test_doctor_finds_what_ends_every_run(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib

    from ade_harness.cli import doctor

    def broken(name: str) -> object:
        if name in ("torchvision", "lightning.pytorch"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return importlib.__import__(name)

    monkeypatch.setattr(doctor, "importlib", SimpleNamespace(import_module=broken, util=importlib.util))
    done = call("doctor")
    assert done.code == 2
    assert "BLOCKS ALL RUNS: lightning.pytorch (RuntimeError: operator torchvision::nms does not exist)" in done.out
    assert "torchvision has to be of the same release as torch" in done.out
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    assert "cannot be written (Not a directory)" in doctor._run_place(tmp_path / "file")


def test_a_set_without_a_labelled_pixel_has_no_score(call: Call, tiny_ade: Path, tmp_path: Path) -> None:
    folder = tiny_ade / "annotations/validation"
    for path in folder.iterdir():
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    overrides = ("model=predictions", f"model.path={folder}", "dataset=ade20k", f"dataset.root={tiny_ade}", *FAST)
    one_message(call(*overrides, "run.dir=run"), "No score: none of the 7 images has a labelled pixel")
    assert not (tmp_path / "run/metrics.json").exists()


def test_images_without_a_labelled_pixel_are_no_zeros(call: Call, tiny_ade: Path, tmp_path: Path) -> None:
    """Their groups show no score, and resamples of them alone do not pull the interval down to 0."""
    folder = tiny_ade / "annotations/validation"
    shutil.copytree(folder, tmp_path / "predicted")
    for path in sorted(folder.iterdir())[:5]:
        Image.fromarray(np.zeros_like(np.array(Image.open(path)))).save(path)
    done = call(
        "model=predictions", f"model.path={tmp_path / 'predicted'}", "dataset=ade20k", f"dataset.root={tiny_ade}", *FAST,
        "metrics.resamples=1000", "run.dir=run",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run/metrics.json").read_text())
    assert found["mIoU"] == 1.0
    assert found["intervals"]["mIoU"] is None or found["intervals"]["mIoU"]["low"] == 1.0
    assert call("report", "run").code == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "nan" not in re.findall(r'<td class="n" data-v="[^"]*">([^<]*)</td>', page)
    assert '<td class="n" data-v="">–</td>' in page


def damaged_run(call: Call, tiny_ade: Path) -> Done:
    folder = tiny_ade / "annotations/validation"
    overrides = [
        "model=predictions",
        f"model.path={folder}",
        "dataset=ade20k",
        f"dataset.root={tiny_ade}",
        "run.dir=run",
    ]
    return call(*overrides, "tracking=none", "runtime.workers=1")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_damaged_file_gives_no_score_and_the_run_goes_on_after_mending(
    call: Call, tiny_ade: Path, tmp_path: Path, kind: str
) -> None:
    part = "images" if kind == "image" else "annotations"
    victim = next((tiny_ade / part / "validation").glob("*00001001.*"))
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2 + 100] if kind == "image" else content[:60])
    done = damaged_run(call, tiny_ade)
    one_message(done, "ADE_val_00001001", "cannot be read", "No score: 6 of 7", "resume run")
    assert not (tmp_path / "run/metrics.json").exists()
    victim.write_bytes(content)
    done = damaged_run(call, tiny_ade)
    assert done.code == 0, done.err
    assert "images are done" in done.out
    other = next((tiny_ade / part / "validation").glob("*00001005.*"))
    other.write_bytes(other.read_bytes() + b"x")
    one_message(damaged_run(call, tiny_ade), "ADE_val_00001005: its files changed since it was counted")


def test_label_over_150_in_the_data_gives_no_score(call: Call, tiny_ade: Path) -> None:
    victim = tiny_ade / "annotations/validation/ADE_val_00001001.png"
    labels = np.array(Image.open(victim))
    folder = tiny_ade.parent / "labels"
    folder.mkdir()
    for path in (tiny_ade / "annotations/validation").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    labels[0, 0] = 151
    Image.fromarray(labels).save(victim)
    overrides = ["model=predictions", f"model.path={folder}", "dataset=ade20k", f"dataset.root={tiny_ade}", *FAST]
    one_message(call(*overrides), "ADE_val_00001001.png: holds the label 151. Annotations", "No score: ")


@pytest.mark.slow
def test_a_finished_run_continues_to_the_same_result(call: Call, tmp_path: Path) -> None:
    overrides = ["dataset.limit=5", "run.dir=run", *FAST]
    assert call(*overrides).code == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.suffix in (".npy", ".csv")}
    segments = sorted(p.name for p in (tmp_path / "run/ledger").iterdir())
    done = call(*overrides)
    assert done.code == 0
    assert "continuing: 5 images are done" in done.out
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.suffix in (".npy", ".csv")} == first
    assert sorted(p.name for p in (tmp_path / "run/ledger").iterdir()) == segments  # nothing was done again
    one_message(call("dataset.limit=4", "run.dir=run", *FAST), "dataset.limit: was 5, is 4")


@pytest.mark.slow
def test_lost_and_damaged_segments_are_done_again(call: Call, tmp_path: Path) -> None:
    overrides = ["dataset.limit=40", "run.dir=run", *FAST]
    assert call(*overrides).code == 0
    first = np.load(tmp_path / "run/confusion_matrix.npy")
    segments = sorted((tmp_path / "run/ledger").iterdir())
    assert len(segments) == 2
    segments[0].write_bytes(segments[0].read_bytes()[:500])
    done = call(*overrides)
    assert done.code == 0
    assert "continuing: 8 images are done, 1 ledger files are damaged" in done.out
    assert np.array_equal(np.load(tmp_path / "run/confusion_matrix.npy"), first)


@pytest.mark.slow
def test_multirun_runs_every_combination(call: Call, tmp_path: Path) -> None:
    done = call("-m", "dataset.limit=1,2", "run.root=out", *FAST)
    assert done.code == 0, done.err
    found = sorted(json.loads(p.read_text())["images"] for p in (tmp_path / "out").glob("sweep-*/*/metrics.json"))
    assert found == [1, 2]
    one_message(call("-m", "model=demo,segfomer_b0"), "model=segfomer_b0: unknown value. Nearest: segformer_b0")


def test_config_dir_is_in_the_wheel_or_the_repository() -> None:
    assert (conf_dir() / "config.yaml").is_file()
    assert (REPOSITORY / "conf" / "config.yaml").is_file()


_HEAVY = {"torch", "lightning", "scipy", "transformers", "pandas", "wandb", "numba", "onnxruntime"}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `run` and `other`."""
    folder = tmp_path_factory.mktemp("two_runs")
    overrides = [*FAST, "dataset.images=2", f"run.dir={folder}/run", "run.label_maps=none"]
    assert run_command(overrides) == 0
    shutil.copytree(folder / "run", folder / "other")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "at_most", "expected"),
    [
        (["--help"], 260, 0), (["evaluate", "--help"], 300, 0), (["models"], 300, 0), (["status", "run"], 600, 0),
        (["runs", "run"], 600, 0), (["report", "run"], 1200, 0), (["compare", "run", "other", "--resamples", "100"], 1200, 0),
        (["leaderboard"], 1200, 0), (["predict", "model=demo", "nowhere.jpg"], 1000, 2), (["serve", "model=nothing"], 1000, 2),
        (["predict", "model=demo", "inference.tta.flip=perhaps", "run/confusion_matrix.png"], 1000, 2),
    ],
)  # fmt: skip
def test_commands_that_read_or_refuse_import_little(
    overrides: list[str], at_most: int, expected: int, two_runs: Path
) -> None:
    """No torch, no Lightning, no SciPy; `status` and `models` answer in a fraction of a second."""
    program = (
        "import sys\nfrom ade_harness.cli.main import run_command\ncode = run_command(sys.argv[1:])\n"
        "print(code, len(sys.modules), *sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *overrides],
        cwd=two_runs,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    code, modules, *names = done.stderr.splitlines()[-1].split()
    assert code == str(expected), done.stderr
    assert not _HEAVY & set(names)
    assert int(modules) < at_most


@pytest.mark.slow
def test_a_system_by_its_name_means_ade20k(call: Call, tiny_ade: Path, tmp_path: Path) -> None:
    overrides = ("model=segformer_b0", "model.weights=random", "inference.resize.side=64", *FAST)
    (tmp_path / "data").mkdir()
    tiny_ade.rename(tmp_path / "data/ADEChallengeData2016")
    done = call(*overrides, "run.dir=run")
    assert done.code == 0, done.err
    assert "PARTIAL: 7 of 2,000 images" in done.out
    assert "DEMO" not in done.out
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["dataset"]["root"] == "data/ADEChallengeData2016"
    assert yaml.safe_load(call(*overrides, "dataset=demo", "--cfg", "job").out)["dataset"]["kind"] == "demo"
    done = call("data", "verify")  # of what is found here
    assert "pairs/s" in done.out
    assert "pairs/s" not in call("data", "verify", "-q").out
    assert "data/ADEChallengeData2016: 7 of 2000 validation pairs" in done.out


@pytest.mark.slow
def test_a_command_without_standard_output_runs(tmp_path: Path) -> None:
    """As cron and daemons start it: the next file that is opened would get the number of the missing stream."""
    overrides = " ".join(["dataset.images=2", *FAST, "metrics.resamples=0", "run.dir=run"])
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m ade_harness {overrides} >&- <&-"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.slow
def test_a_changed_protocol_is_named_wherever_a_run_is_shown(call: Call, tmp_path: Path) -> None:
    for name, changed in (("plain", ()), ("with_flip", ("inference.tta.flip=true",))):
        done = call(*FAST, "dataset.images=2", "metrics.resamples=0", f"run.dir={name}", *changed)
        assert done.code == 0, done.err
        assert ("protocol:       original_size, changed: tta.flip\n" in done.out) == bool(changed)
        assert json.loads((tmp_path / name / "metrics.json").read_text())["protocol_changes"] == ["tta.flip"] * len(
            changed
        )
    shown = call("runs", "plain", "with_flip", "--json").out
    assert [row["protocol"] for row in json.loads(shown)["runs"]] == [
        "original_size",
        "original_size, changed: tta.flip",
    ]
    assert call("report", "with_flip", "--output", "one.html").code == 0
    assert "protocol original_size, changed: tta.flip." in (tmp_path / "one.html").read_text()
    both = call("compare", "plain", "with_flip", "--output", "two.html")
    assert "different protocols: original_size, changed: tta.flip and original_size" in " ".join(both.out.split())
    assert "original_size, changed: tta.flip" in (tmp_path / "two.html").read_text()
