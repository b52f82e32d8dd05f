"""The commands `predict` and `runs`."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ade_harness as ade
from ade_harness.data.ade20k_labels import ade20k_classes
from ade_harness.data.image_files import find_images
from ade_harness.report.overlays import draw_prediction
from tests.cli.test_cli import Call, one_message
from tests.conftest import Done

SMALL = {"dataset.images": 4, "metrics.resamples": 0}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    draw = np.random.default_rng(1)
    for name in ("street.jpg", "more/kitchen.png", "more/garden.JPEG"):
        picture = draw.integers(0, 256, (50, 70, 3)).astype(np.uint8)
        Image.fromarray(picture).save(folder / name, "PNG" if name.endswith("png") else "JPEG")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_pictures_without_annotations(call: Call, photos: Path, tmp_path: Path) -> None:
    done = call("predict", "model=demo", photos, "--output", "out")
    assert done.code == 0, done.err
    assert "3 of 3 images" in done.out
    assert "DEMO: this network was trained on synthetic images only" in done.out
    segmenter, classes = ade.load_model("demo"), ade20k_classes()
    for source, name in (
        ("street.jpg", "street"),
        ("more/kitchen.png", "more/kitchen"),
        ("more/garden.JPEG", "more/garden"),
    ):
        labels = segmenter(photos / source)
        with Image.open(tmp_path / "out/labels" / f"{name}.png") as written:
            assert written.mode == "P"
            assert np.array_equal(np.asarray(written), labels + 1)  # ADE20K's own values
            colour = np.asarray(written.convert("RGB"))
        assert np.array_equal(colour, np.array(classes.colors, np.uint8)[labels])
        assert Image.open(tmp_path / "out/pictures" / f"{name}.png").size[0] > 140
    done = call("predict", "model=demo", photos / "street.jpg", "--json")
    assert json.loads(done.out)["images"] == [str(photos / "street.jpg")]
    assert (tmp_path / "predictions/labels/street.png").exists()
    # what `predict` has written is what `model=predictions` reads
    labels = Image.open(tmp_path / "predictions/labels/street.png")
    assert labels.getpixel((0, 0)) == segmenter(photos / "street.jpg")[0, 0] + 1


def test_pictures_that_are_not_read_are_counted(call: Call, photos: Path) -> None:
    for name in ("a.webp", "more/b.TIF"):
        (photos / name).write_bytes(b"whatever it holds")
    done = call("predict", "model=demo", photos)
    assert done.code == 0, done.err
    assert "3 of 3 images" in done.out
    assert f"2 other pictures were left out, such as {photos / 'a.webp'}" in " ".join(done.out.split())
    done = call("predict", "model=demo", photos, "--json")
    assert json.loads(done.out)["left_out"] == [str(photos / "a.webp"), str(photos / "more/b.TIF")]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=demo",), "name an image or a folder of images"),
        (("model=demo", "nowhere"), "nowhere: no such image or folder"),
        (("model=demo", "empty"), "empty: contains no image"),
        (("model=demo", "http://x/y.jpg"), "no such image or folder. Images are read from files, not from addresses"),
        (("model=predictions", "model.path=empty", "photos"), "model=predictions: gives label maps"),
        (("model=nothing", "photos"), "model=nothing: unknown value"),
        (("model=demo", "photos", "--output", "photos/street.jpg"), "--output photos/street.jpg: cannot be written"),
    ],
)  # fmt: skip
def test_mistakes(call: Call, photos: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty").mkdir()
    done = call("predict", *overrides)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_an_image_that_fails_costs_itself(call: Call, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.jpg").write_bytes((photos / "street.jpg").read_bytes()[:300])
    done = call("predict", "model=demo", photos, "--output", "out")
    assert done.code == 2
    assert "1 of 4 images failed" in done.err
    assert "broken.jpg" in done.err
    assert len(list((tmp_path / "out/labels").rglob("*.png"))) == 3
    (photos / "street.jpg").rename(photos / "a=b, c.jpg")
    assert call("predict", "model=demo", photos / "a=b, c.jpg", "--output", "odd").code == 0
    assert (tmp_path / "odd/labels/a=b, c.png").exists()
    (photos / "a=b, c.jpg").rename(photos / "street.jpg")
    done = call("predict", "model=segformer_b0", "model.weights=random", photos / "street.jpg")
    assert done.code == 0, done.err
    assert "RANDOM WEIGHTS" in done.out
    assert "segformer_b0" in done.out


def test_images_that_fail_leave_an_answer(call: Call, photos: Path) -> None:
    (photos / "broken.jpg").write_bytes((photos / "street.jpg").read_bytes()[:300])
    done = call("predict", "model=demo", photos, "--output", "out", "--json")
    assert done.code == 2
    content = json.loads(done.out)
    assert [Path(path).name for path in content["failed"]] == ["broken.jpg"]
    assert len(content["images"]) == 3
    assert "data verify" not in done.err  # knows ADE20K alone


def test_no_model_is_taken_for_granted(call: Call, photos: Path, tmp_path: Path) -> None:
    for overrides in ((photos,), (photos, "inference=whole"), (photos, "model.weights=random")):
        done = call("predict", *overrides)
        assert done.code == 2
        assert "name a model: predict model=NAME" in done.err
    assert not (tmp_path / "predictions").exists()


@pytest.mark.slow
def test_a_folder_holds_one_model(call: Call, photos: Path, tmp_path: Path) -> None:
    assert call("predict", "model=demo", photos / "street.jpg").code == 0
    record = json.loads((tmp_path / "predictions/predictions.json").read_text())
    assert record["model"] == "demo"
    assert record["code"]["version"] == ade.__version__
    assert call("predict", "model=demo", photos).code == 0  # more images of the same model
    written = (tmp_path / "predictions/labels/street.png").read_bytes()
    for overrides in (
        ("model=demo", "inference=mmseg_slide_512"),
        ("model=demo", "inference.resize.multiple_of=64"),  # a protocol of the same name
        ("model=demo", "model.input.mean=[1, 2, 3]"),
        ("model=segformer_b0", "model.weights=random"),
    ):
        done = call("predict", *overrides, photos / "street.jpg")
        assert done.code == 2, overrides
        assert "predictions: holds the predictions of another model or setup (" in done.err
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy(photos / "street.jpg", others / "street.jpg")
    done = call("predict", "model=demo", others)
    assert done.code == 2
    assert (
        f"{others}/street.jpg: predictions holds the prediction of {photos}/street.jpg under the same name" in done.err
    )
    done = call("predict", "model=demo", others, photos / "street.jpg", "--output", "both")
    assert "in two commands, with an --output of its own for each" in done.err
    assert (tmp_path / "predictions/labels/street.png").read_bytes() == written
    (tmp_path / "mine/labels").mkdir(parents=True)
    done = call("predict", "model=demo", photos / "street.jpg", "--output", "mine")
    assert done.code == 2
    assert "mine/labels: exists already" in done.err
    assert list((tmp_path / "mine").rglob("*.*")) == []
    # a picture that can be read no more leaves no labels of what it was
    (photos / "street.jpg").write_bytes(b"no picture")
    assert call("predict", "model=demo", photos / "street.jpg").code == 2
    assert not list((tmp_path / "predictions").rglob("street.png"))


@pytest.mark.slow
def test_label_maps_are_no_pictures(call: Call, photos: Path, tmp_path: Path) -> None:
    assert call("predict", "model=demo", photos / "street.jpg").code == 0
    for file in (tmp_path / "predictions/labels/street.png", photos / "voc.png"):
        if file.name == "voc.png":
            picture = Image.fromarray(np.full((20, 30), 2, np.uint8), mode="P")
            picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
            picture.save(file)
        done = call("predict", "model=demo", file, "--output", "out")
        assert done.code == 2
        assert f"{file}: is a label map" in done.err
    grey = np.zeros((40, 60), np.uint8)
    grey[10:, 20:] = 17
    Image.fromarray(grey).save(photos / "annotation.png")
    done = call("predict", "model=demo", photos / "annotation.png", photos / "street.jpg", "--output", "out")
    assert done.code == 0
    assert "1 of 2 files are greyscale PNGs with few constant regions" in " ".join(done.out.split())
    # a picture whose colours a program has put in a palette
    Image.open(photos / "street.jpg").quantize(64).save(photos / "quantised.png")
    Image.open(photos / "street.jpg").convert("L").convert("P").save(photos / "grey.png")
    done = call("predict", "model=demo", photos / "quantised.png", photos / "grey.png", "--output", "out")
    assert done.code == 0, done.err
    assert "even areas" not in done.out


@pytest.mark.slow
def test_each_image_of_a_folder_is_predicted_once(call: Call, photos: Path, tmp_path: Path) -> None:
    """Not what a Mac or a notebook hides there, not what an earlier `predict` wrote, and no two into one file."""
    for name in ("._street.jpg", ".ipynb_checkpoints/street-checkpoint.jpg", "__MACOSX/._a.jpg"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_bytes(b"no image")
    shutil.copy(photos / "more/kitchen.png", photos / "street.png")
    expected = ["more/garden", "more/kitchen", "street.jpg", "street.png"]
    for number, output in enumerate((photos, photos / "predictions", tmp_path / "out")):
        given = ("predict", "model=demo", photos / "street.jpg", photos, "--output", output, "--json")
        done = call(*given)
        assert done.code == 0, done.err
        assert len(json.loads(done.out)["images"]) == 4, number
        written = (path.relative_to(output / "labels").as_posix() for path in (output / "labels").rglob("*.png"))
        assert sorted(name.removesuffix(".png") for name in written) == expected


def test_links_to_one_file_are_images_of_their_own_names(photos: Path, tmp_path: Path) -> None:
    """As in trees of links to one store of files; and other tools' files of predict's names hide nothing."""
    tree = tmp_path / "tree"
    (tree / "labels").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "labels/c.jpg"):
        (tree / name).symlink_to(photos / "street.jpg")
    (tree / "predictions.json").write_text("[]")
    found = find_images([tree, tree / "a.jpg"], tmp_path / "out")
    assert [name for _, name in found] == ["a", "b", "labels/c"]


def test_a_strip_is_drawn_small_and_a_narrow_picture_has_a_legend() -> None:
    classes = ade20k_classes()
    for size, largest in (((20, 6000), 12_010), ((900, 3), 2_000), ((1, 1), 600)):
        drawn = draw_prediction(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), classes)
        assert max(drawn.size) <= largest
        assert drawn.size[0] >= 190


@pytest.mark.slow
def test_runs_in_one_table(call: Call, tmp_path: Path) -> None:
    for name, limit in (("first", None), ("sweep/second", 3)):
        ade.evaluate("demo", dataset="demo", options=SMALL, limit=limit, run_dir=tmp_path / "runs" / name)
    (tmp_path / "runs/odd").mkdir()
    (tmp_path / "runs/odd/manifest.json").write_text('{"schema": 99, "x": "\x1b[31m"}')
    done = call("runs", "--sort", "miou", "--output", "all.csv", "--output", "all.json", "--output", "all.md")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out
    with (tmp_path / "all.csv").open() as file:
        found = list(csv.DictReader(file))
    scores = [float(row["mIoU"]) for row in found if row["mIoU"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 2
    assert found[-1]["status"].startswith("damaged: ")
    assert (
        json.loads((tmp_path / "all.json").read_text())
        == json.loads(call("runs", "--sort", "mIoU", "--json").out)["runs"]
    )
    assert len(json.loads(call("runs", "--json", "--where", "images=*").out)["runs"]) == 2  # whose number is known
    assert (tmp_path / "all.md").read_text().count("\n") == 5
    one = json.loads(call("runs", "--json", "--where", "model.name=demo", "--where", "marks!=*PARTIAL*").out)["runs"]
    assert [Path(row["run"]).name for row in one] == ["first"]
    assert one[0]["images"] == 4
    assert "no run matches --where" in call("runs", "--where", "model=beit3").out
    of_images = [
        len(json.loads(call("runs", "--json", "--where", f"images{is_}").out)["runs"]) for is_ in ("=2.0", "!=2.0")
    ]
    assert sum(of_images) == len(json.loads(call("runs", "--json").out)["runs"])
    for condition, names in (
        ("model==demo", 2), ("model=DEMO", 2), ("status=partial", 1), ("marks=*partial*", 1), ("marks!=PARTIAL", 2),
        ("marks=DEMO", 2), (f"images=={of_images[0]}", 0), ("mIoU=", 1),
        (f"mIoU>={scores[0]}", 1), (f"mIoU<{scores[0]}", 1), ("mIoU > 1", 0), ("images<=4", 2), ("started>2020", 2), ("seconds<0", 0),
    ):  # fmt: skip
        assert len(json.loads(call("runs", "--json", "--where", condition).out)["runs"]) == names, condition
    for overrides, message in (
        (("--where", "model"), "expected COLUMN=VALUE"),
        (("--where", "mIoU>20"), "scores are fractions: mIoU>0.2"),  # as the table's percent suggests
        (("--where", "mIoU>high"), "--where mIoU>high: mIoU is a number, and 'high' is none"),
        (("--where", "points>1"), "points: no such column"),
        (("--where", "mIoU=>0.4"), "--where mIoU=>0.4: expected COLUMN=VALUE, such as"),
        (("--where", "images=all"), "--where images=all: images is a number, and 'all' is none"),
        (("--where", "mIoU>nan"), "--where mIoU>nan: mIoU is a number, and 'nan' is none"),
        (("--sort", "mIoUs"), "mIoUs: no such column. Did you mean 'mIoU'"),
        (("--output", "all.xlsx"), "expected a name that ends in .csv, .json, .md"),
        (("nowhere",), "nowhere: no such folder"),
    ):
        done = call("runs", *overrides)
        assert done.code == 2
        assert message in done.err


def test_a_model_that_exits_predicts_nothing(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exits.py").write_text(
        "import sys, torch\n\nclass AtInit(torch.nn.Module):\n    def __init__(self):\n        sys.exit(0)\n\n"
        "class AtForward(torch.nn.Module):\n    def forward(self, x):\n        sys.exit(0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    picture = np.zeros((32, 48, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg")
    for name in ("AtInit", "AtForward"):
        done = call("predict", "model=custom", f"model._target_=exits.{name}", "inference=original_size", "a.jpg")
        one_message(done, "called sys.exit(0) at ", "exits.py:")


def test_options_of_evaluations_are_refused_by_predict(call: Call, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(tmp_path / "a.jpg")
    for word in ("run.dir=x", "dataset.limit=3", "tracking=none"):
        one_message(call("predict", "model=demo", word, "a.jpg"), f"{word}: has no effect on predict")


@pytest.mark.parametrize(
    "overrides", [("predict", "PHOTOS", "--output=out"), ("runtime.supervise=false", "run.dir=run")]
)
def test_a_model_that_leaves_silently_is_a_fault(
    cli: Callable[..., Done], photos: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """Without a supervisor nobody else would notice: exit code 0, and nothing done."""
    (tmp_path / "leaving.py").write_text(
        "import os\nimport torch\n\nclass Net(torch.nn.Module):\n    def forward(self, images):\n        os._exit(0)\n"
    )
    given = [str(photos) if word == "PHOTOS" else word for word in overrides]
    options = [] if overrides[0] == "predict" else ["dataset.images=2", "tracking=none", "run.overlays=0"]
    done = cli(*given, "model=custom", "model._target_=leaving.Net", "model.weights=random", *options)
    assert done.code == 2, done.out + done.err
    assert re.search(r"called os\._exit\(0\) at \S+leaving\.py:6, in forward: the work was not finished", done.err)
    assert "Traceback" not in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("ctypes.CDLL(None)._exit(0)", 1, "was ended with code 0 by the model"),
        ("os.execv('/bin/true', ['true'])", 1, "was ended with code 0 by the model"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL (often the kernel"),
        ("os.kill(os.getppid(), signal.SIGTERM), time.sleep(60)", 143, ""),
    ],
)
def test_an_end_below_python_is_noticed(
    cli: Callable[..., Done], photos: Path, tmp_path: Path, ending: str, code: int, message: str
) -> None:
    (tmp_path / "leaving.py").write_text(
        "import ctypes, os, signal, time, torch\n\nclass Net(torch.nn.Module):\n"
        f"    def forward(self, images):\n        {ending}\n"
    )
    done = cli("predict", photos, "model=custom", "model._target_=leaving.Net", "model.weights=random")
    assert done.code == code, done.out + done.err
    assert message in done.err
    assert ("the work was not finished" in done.err) == bool(message)
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_a_model_that_changes_the_working_directory_moves_no_result(
    cli: Callable[..., Done], photos: Path, tmp_path: Path
) -> None:
    """Research code does it to find its own files; relative paths stay those of the command."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "wandering.py").write_text(
        f"import os, torch\nos.chdir({str(elsewhere)!r})\n\nclass Net(torch.nn.Module):\n"
        "    def forward(self, images):\n"
        f"        os.chdir({str(elsewhere)!r})\n"
        "        return torch.nn.functional.one_hot((images[:, 0] > 0).long(), 150).movedim(-1, 1).float()\n"
    )
    model = ("model=custom", "model._target_=wandering.Net", "model.weights=random")
    done = cli("predict", "photos", "--output=out", *model)
    assert done.code == 0, done.err
    for override in ("runtime.supervise=true", "runtime.supervise=false"):
        done = cli(*model, "dataset.images=3", "tracking=none", "run.overlays=1", override)
        assert done.code == 0, done.err
    assert [*elsewhere.iterdir()] == []
    assert len([*(tmp_path / "out/labels").rglob("*.png")]) == 3
    runs = [*(tmp_path / "runs").iterdir()]
    assert len(runs) == 2
    for run in runs:
        assert {"metrics.json", "overlays", "manifest.json"} <= {path.name for path in run.iterdir()}
        assert json.loads((run / "manifest.json").read_text())["directory"] == str(tmp_path)
