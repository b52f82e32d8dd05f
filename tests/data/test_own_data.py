"""Your own data: 19 classes with names of their own through the whole pipeline, pages included."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ade_harness.cli.main import main
from ade_harness.config.compose import compose_config
from ade_harness.data.factory import open_dataset
from ade_harness.data.folder import read_classes
from ade_harness.data.labels import NO_CLASS, classes_from, default_colors
from ade_harness.errors import HarnessError
from ade_harness.leaderboard.table import why_not_ranked
from ade_harness.models.loading import load_model
from ade_harness.runs.finished import load_run
from tests.cli.test_cli import Call, one_message

NAMES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle <two & a half>",
]  # fmt: skip
VALUES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
"""Values of the label files: as Cityscapes has them."""
IGNORED = [value for value in range(34) if value not in VALUES]
CLASSES = {"names": NAMES, "ignore": IGNORED, "mapping": dict(zip(VALUES, NAMES, strict=True))}
NET = """
import torch
class Net(torch.nn.Module):
    def __init__(self, colors, mean, std):
        super().__init__()
        self.colors = torch.tensor(colors, dtype=torch.float32)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
    def forward(self, images):  # the nearest colour
        pixels = images * self.std[:, None, None] + self.mean[:, None, None]
        return torch.einsum("kc,nchw->nkhw", 2 * self.colors, pixels) - (self.colors ** 2).sum(1)[:, None, None]
"""


def write_data(root: Path, images: int = 6) -> list[str]:
    """Write images in the colours of their classes, below folders of cities; return their ids."""
    rng = np.random.default_rng(19)
    colors = np.array(default_colors(19), np.uint8)
    ids = []
    for index in range(images):
        height, width = 40 + 3 * index, 60 - 2 * index
        classes = rng.integers(0, 19, (height // 6 + 1, width // 6 + 1)).repeat(6, 0).repeat(6, 1)[:height, :width]
        classes[0, :19] = range(19)
        stored = np.array(VALUES, np.uint8)[classes]
        stored[-3:] = rng.choice(IGNORED, (3, width))
        noise = rng.integers(-8, 9, (height, width, 3))
        image_id = f"{'aachen' if index % 2 else 'ulm'}/{index:03d}"
        for kind, pixels in (("images", np.clip(colors[classes] + noise, 0, 255)), ("labels", stored)):
            path = root / kind / f"{image_id}_{kind}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
        ids.append(image_id)
    (root / "classes.yaml").write_text(yaml.safe_dump(CLASSES))
    (root / "own_net.py").write_text(NET)
    return sorted(ids)


def overrides_for(root: Path) -> list[str]:
    return [
        "dataset=folder", "dataset.name=streets", f"dataset.image_dir={root / 'images'}",
        f"dataset.label_dir={root / 'labels'}", f"dataset.classes={root / 'classes.yaml'}",
        "dataset.image_suffix=_images.png", "dataset.label_suffix=_labels.png", "tracking=none",
        "metrics.resamples=1000", "runtime.threads=1", "runtime.workers=0",
    ]  # fmt: skip


def net_overrides(colors: list[tuple[int, int, int]]) -> list[str]:
    return [
        "model=custom", "model._target_=own_net.Net", f"model.kwargs.colors={[list(c) for c in colors]}",
        "model.kwargs.mean=[123.675,116.28,103.53]", "model.kwargs.std=[58.395,57.12,57.375]",
        "inference=original_size", "model.label=nearest colour",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("streets")
    write_data(root)
    return root


@pytest.mark.slow
def test_nineteen_classes_through_the_whole_pipeline(
    streets: Path, call: Call, cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(streets))
    colors = list(default_colors(19))
    base, run = overrides_for(streets), streets / "run"
    options = ["run.label_maps=all", "run.overlays=2", "metrics.calibration=true", f"run.dir={run}"]
    done = call(*base, *net_overrides(colors), *options)
    assert done.code == 0, done.err
    assert "nearest colour on streets, 6 of 6 images" in done.out
    assert "PARTIAL" not in done.out
    assert any(name in done.out for name in NAMES)
    finished = load_run(run)
    assert finished.matrix.shape == (19, 20)
    assert finished.classes.names == tuple(NAMES)
    assert finished.metrics["mIoU"] > 0.99  # another order of classes would give nearly nothing
    assert "averages 19" in finished.metrics["convention"]
    ignored = 3 * sum(60 - 2 * index for index in range(6))
    assert sum(row.ignored_pixels for row in finished.rows) == ignored
    assert [row.image_id for row in finished.rows] == sorted(row.image_id for row in finished.rows)
    assert (run / "label_maps" / "ulm" / "000.png").is_file()
    assert len((run / "per_class.csv").read_text().splitlines()) == 20
    assert str(why_not_ranked(finished)).startswith("evaluated on streets: the leaderboard covers ADE20K")
    one_message(
        call("submit", run, "--output", streets / "bundle"),
        "cannot be submitted",
        "evaluate the model on it (dataset=ade20k)",
    )
    assert done.out.count("published") == 0

    # its label maps give the same counts in every bit, by both encodings
    again = call(*base, "model=predictions", f"model.path={run / 'label_maps'}", f"run.dir={streets / 'again'}")
    assert again.code == 0, again.err
    assert np.array_equal(load_run(streets / "again").matrix, finished.matrix)
    named = [override for override in base if not override.startswith("dataset.name=")]
    renamed = ("model=predictions", f"model.path={run / 'label_maps'}", f"run.dir={streets / 'again'}")
    assert call(*named, "dataset.name=roads", *renamed).code == 0  # a name decides no number

    # two ranks, and a worse model: a class map that confuses two classes
    swapped = ["model.class_map=[1,0,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18]", "runtime.devices=2"]
    options = ["run.label_maps=all", f"run.dir={streets / 'worse'}"]
    worse = cli(*base, *net_overrides(colors), *swapped, *options, PYTHONPATH=str(streets))
    assert worse.code == 0, worse.err
    swapped_matrix = load_run(streets / "worse").matrix
    assert np.array_equal(swapped_matrix[:, [1, 0, *range(2, 20)]], finished.matrix)

    # pages: from the run alone for the names, with the images for the pictures
    report, compared = streets / "report.html", streets / "compared.html"
    assert call("report", run, "--output", report).code == 0
    shown = report.read_text()
    assert "19 classes of truth" in shown
    assert "bicycle &lt;two &amp; a half&gt;" in shown
    assert "bicycle <two" not in shown
    assert "traffic light" in shown
    assert "aachen/001" in shown
    assert "chandelier" not in shown  # a class of ADE20K
    comparison = call("compare", run, streets / "worse", "--output", compared, "--resamples", "500")
    assert comparison.code == 0, comparison.err
    assert "sidewalk" in comparison.out
    assert "chandelier" not in compared.read_text()
    shutil.move(streets / "images", streets / "gone")
    try:
        assert call("report", run, "--output", report).code == 0
        assert "No pictures" in report.read_text()
        assert "traffic light" in report.read_text()
    finally:
        shutil.move(streets / "gone", streets / "images")


@pytest.mark.slow
def test_a_changed_mapping_is_another_run(
    streets: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(streets))
    copy = tmp_path / "copy"
    shutil.copytree(streets, copy)
    overrides = [
        *overrides_for(copy),
        *net_overrides(list(default_colors(19))),
        "dataset.limit=2",
        f"run.dir={tmp_path / 'run'}",
    ]
    done = call(*overrides)
    assert done.code == 0, done.err
    assert "PARTIAL: 2 of 6 images" in done.out
    content = yaml.safe_load((copy / "classes.yaml").read_text())
    content["mapping"][7], content["mapping"][8] = "sidewalk", "road"
    (copy / "classes.yaml").write_text(yaml.safe_dump(content))
    one_message(call(*overrides), "dataset.labels_hash: was")


def test_systems_are_built_for_the_number_of_classes(streets: Path) -> None:
    small = [
        "model=segformer_b0", "model.weights=random", "model.architecture.backbone.depths=[1,1,1,1]",
        "model.architecture.backbone.hidden_sizes=[8,8,8,8]", "model.architecture.head.decoder_hidden_size=8",
    ]  # fmt: skip
    cfg = compose_config([*overrides_for(streets), *small])
    dataset = open_dataset(cfg.dataset)
    model = load_model(cfg.model, 1, dataset.classes)
    assert model.channels == 19
    with torch.inference_mode():
        assert model.module(torch.zeros(1, 3, 64, 64)).shape[1] == 19
    assert model.module(torch.zeros(1, 3, 64, 64)).shape[1] != load_model(cfg.model).channels == 150


@pytest.mark.parametrize(
    "model",
    [
        ("model=timm", "model.backbone=resnet18"),
        ("model=smp", "model.architecture.arch=fpn", "model.architecture.encoder_name=resnet18"),
    ],
    ids=lambda given: given[0],
)
def test_networks_of_libraries_are_built_for_the_number_of_classes(streets: Path, model: tuple[str, ...]) -> None:
    if model[0] == "model=smp":
        pytest.importorskip("segmentation_models_pytorch", reason="pip install 'ade-harness[smp]'")
    cfg = compose_config([*overrides_for(streets), *model, "model.weights=random"])
    network = load_model(cfg.model, 1, open_dataset(cfg.dataset).classes).module.eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 64)).shape[1] == 19


def test_labels_become_classes(streets: Path) -> None:
    dataset = open_dataset(compose_config(["model=segformer_b0", *overrides_for(streets)]).dataset)
    assert dataset.ids == ["aachen/001", "aachen/003", "aachen/005", "ulm/000", "ulm/002", "ulm/004"]
    sample = dataset.load(0)
    assert sample.target[0, :19].tolist() == list(range(19))
    assert (sample.target[-3:] == 255).all()
    assert dataset.read_headers()[1] == {}
    assert not dataset.is_partial
    stored = json.loads(json.dumps(dataset.classes.as_dict()))
    assert classes_from("streets", stored) == dataset.classes
    assert dataset.classes.palette[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]


def test_values_are_classes_without_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("names: [a, b, c]\nignore: [9]\ncolors: [[1, 2, 3], [4, 5, 6], [7, 8, 9]]\n")
    classes, encoding = read_classes(tmp_path / "c.yaml", "mine")
    assert encoding.targets(np.array([[0, 1, 2, 9]], np.uint8), "x.png").tolist() == [[0, 1, 2, 255]]
    assert classes.palette[:4].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]
    expected = r"x\.png: holds the label 3 \(and 1 more: 255\).*c\.yaml has this value neither in names nor in ignore"
    with pytest.raises(HarnessError, match=expected):
        encoding.targets(np.array([[0, 3, 255]], np.uint8), "x.png")


def test_255_classes_are_the_most(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"names": [f"c{i}" for i in range(255)]}))
    classes, encoding = read_classes(tmp_path / "c.yaml", "mine")
    assert len(classes) == 255
    assert encoding.targets(np.array([[0, 254, 255]], np.uint8), "x").tolist() == [[0, 254, NO_CLASS]]
    assert len(set(classes.colors)) == 255


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b", "is not valid YAML"),
        ("[a, b]", "expected a mapping with the key `names`"),
        ("nmaes: [a]", "nmaes: no such key. Did you mean 'names'"),
        ("ignore: [255]", "names: expected a list of class names"),
        ("names: []", "names: expected a list of class names"),
        ("names: [a, yes]", r"names\[1\]: True is no name: put it in quotes"),
        ("names: [a, b, a]", "'a' occurs twice"),
        (f"names: [{', '.join(f'c{i}' for i in range(256))}]", "256 classes; at most 255"),
        ("names: [a, b]\nignore: [1]", r"no label value is class \[1\] \(b\)"),
        ("names: [a]\nignore: [256]", "ignore: expected a list of label values, each 0..255"),
        ("names: [a]\nignore: x", "ignore: expected a list"),
        ("names: [a, b]\nmapping: {3: a, 4: c}", "mapping: 4: 'c': no such class"),
        ("names: [road, b]\nmapping: {3: raod, 4: b}", "Did you mean 'road'"),
        ("names: [a, b]\nmapping: {3: a, 4: 2}", "mapping: 4: 2: no such class"),
        ("names: [a, b]\nmapping: {a: 3}", "mapping: 'a': expected a label value"),
        ("names: [a, b]\nmapping: [3, 4]", "mapping: expected label values and their classes"),
        ("names: [a, b]\nmapping: {3: a}", r"no label value is class \[1\] \(b\)"),
        ("names: [a]\nmapping: {3: a}\nignore: [3]", r"ignore: 3 is in mapping too \(a\)"),
        ("names: [a]\ncolors: [[1, 2]]", r"colors\[0\]: .*expected \[red, green, blue\]"),
        ("names: [a]\ncolors: [[1, 2, 3], [1, 2, 3]]", "expected a list of 1 colours"),
        ("names: [a]\ncolors: [[1, 2, 300]]", "each 0..255"),
    ],
)
def test_mistakes_in_the_list_of_classes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(HarnessError, match=message):
        read_classes(tmp_path / "c.yaml", "mine")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.image_dir=null"], "dataset.image_dir must be set: the folder of images"),
        (["dataset.classes=null"], "dataset.classes must be set: a YAML file"),
        (["dataset.name=ade20k"], "dataset.name=ade20k: is the name of another data set"),
        (["model=demo"], "model=demo works only on the synthetic demo images"),
        (["dataset.classes={root}/none.yaml"], "none.yaml: cannot be read"),
        (["dataset.label_dir={root}/none"], "none: no such folder or zip. dataset.image_dir and dataset.label_dir say"),
        (["dataset.image_suffix=.tif"], "no files that end in .tif are there"),
        (["dataset.label_suffix=_x.png"], "no files that end in _x.png are there"),
        (["dataset.label_suffix=0_labels.png"], "images have no label file, the first is aachen/0010_labels.png"),
        (["dataset.ids=[ulm/001]"], "'ulm/001' is not in"),
        (["model.class_map=[300]"], "model.class_map[0]=300: expected 0 to 254"),
        (["model.class_map=[19,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17]"], "streets has the classes 0..18"),
    ],
)
def test_mistakes_with_own_data(
    streets: Path, call: Call, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(streets))
    model = [] if "model=demo" in overrides else net_overrides(list(default_colors(19)))
    changed = [word.format(root=streets) for word in overrides]
    one_message(call(*overrides_for(streets), *model, *changed), message)


@pytest.mark.slow
def test_a_model_of_other_classes_is_refused(streets: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(streets))
    overrides = net_overrides(list(default_colors(20)))
    one_message(
        call(*overrides_for(streets), *overrides), "The model outputs 20 channels, streets has 19 classes", "0..18"
    )
    assert main([*overrides_for(streets), *overrides, "dataset.limit=1"]) == 2


def test_images_and_labels_of_one_folder_and_of_zips(tmp_path: Path) -> None:
    write_data(tmp_path / "data", 2)
    (tmp_path / "one").mkdir()
    for index, path in enumerate(sorted((tmp_path / "data").rglob("*.png"))):
        kind = "_labels" if "labels" in path.name else ""
        stem = path.stem.partition("_")[0]
        shutil.copy(path, tmp_path / "one" / f"{stem}{kind}.png")
        assert index < 4
    overrides = overrides_for(tmp_path / "data")
    together = [
        f"dataset.image_dir={tmp_path / 'one'}",
        f"dataset.label_dir={tmp_path / 'one'}",
        "dataset.image_suffix=null",
    ]
    dataset = open_dataset(compose_config(["model=segformer_b0", *overrides, *together]).dataset)
    assert dataset.ids == ["000", "001"]
    assert (dataset.load(0).target[0, :19] == np.arange(19)).all()
    for kind in ("images", "labels"):
        shutil.make_archive(str(tmp_path / kind), "zip", tmp_path / "data" / kind)
    zips = [f"dataset.image_dir={tmp_path / 'images.zip'}", f"dataset.label_dir={tmp_path / 'labels.zip'}"]
    dataset = open_dataset(compose_config(["model=segformer_b0", *overrides, *zips]).dataset)
    assert dataset.ids == ["aachen/001", "ulm/000"]
    assert (dataset.load(1).target[0, :19] == np.arange(19)).all()


def test_names_that_are_not_utf_8_are_named(tmp_path: Path) -> None:
    """The ledger, which is Parquet, could not hold them."""
    write_data(tmp_path)
    for file in [file for kind in ("images", "labels") for file in (tmp_path / kind).rglob("001_*")]:
        file.rename(file.with_name(os.fsdecode(b"caf\xe9_" + file.name.partition("_")[2].encode())))
    cfg = compose_config(["model=segformer_b0", *overrides_for(tmp_path)]).dataset
    with pytest.raises(HarnessError, match=r"its name is not UTF-8\. Rename it"):
        open_dataset(cfg)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    for text in ("names: [a, b]\nnames: [c, d]\n", "names: [a, b]\nmapping: {7: a, 8: b, 7: b}\n"):
        (tmp_path / "classes.yaml").write_text(text)
        with pytest.raises(HarnessError, match="the key '(names|7)' stands twice"):
            read_classes(tmp_path / "classes.yaml", "mine")


def test_labels_without_an_image_are_a_note(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a copy of the images is a complete set, as far as anybody can tell."""
    ids = write_data(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "images" / f"{ids[-1]}_images.png").unlink()
    done = call(*overrides_for(tmp_path), *net_overrides(list(default_colors(19))), "run.dir=run")
    assert done.code == 0, done.err
    shown = " ".join(done.out.split())
    assert "5 of 5 images" in shown
    assert f"1 of 6 label files have no image, the first is {tmp_path}/labels/{ids[-1]}_labels.png" in shown
