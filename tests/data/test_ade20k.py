"""The data set: labels, decoding as the official loaders do, and every kind of bad file."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ade_harness.config.compose import compose_config
from ade_harness.data.ade20k import open_ade20k, recognise, resized_images, validation_sizes
from ade_harness.data.ade20k_labels import ADE20K_ENCODING, ade20k_classes, ade20k_info
from ade_harness.data.decode import decode_image, decode_labels, read_header
from ade_harness.data.demo import make_sample, write_dataset
from ade_harness.data.factory import open_dataset
from ade_harness.data.verify import verify
from ade_harness.errors import HarnessError
from tests.conftest import write_pair


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_all_annotation_values() -> None:
    """Values over 150 are refused before: see test_label_over_150."""
    target = ADE20K_ENCODING.targets(np.arange(151, dtype=np.uint8), "a")
    assert target.dtype == np.uint8
    assert target[0] == 255
    assert target[1:].tolist() == list(range(150))


def test_classes_and_official_sizes() -> None:
    assert len(ade20k_info()) == len(ade20k_classes()) == 150
    assert ade20k_classes().names[:3] == ("wall", "building", "sky")
    assert ade20k_classes().names[149] == "flag"
    assert ade20k_classes().palette[:3].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230]]
    assert ade20k_classes().palette[255].tolist() == [0, 0, 0]
    sizes = validation_sizes()
    assert len(sizes) == 2000
    assert sum(h * w for h, w in sizes.values()) == 487_666_546
    assert max(h * w for h, w in sizes.values()) == 1600 * 1600


def test_the_split_that_is_not_there_is_named(tiny_ade: Path) -> None:
    with pytest.raises(HarnessError, match=r"the training split of .* is not here, only 7 images of validation"):
        open_ade20k(tiny_ade, "training")
    for kind in ("images", "annotations"):
        (tiny_ade / kind / "validation").rename(tiny_ade / kind / "training")
    with pytest.raises(HarnessError, match=r"the validation split of .* is not here, only 7 images of training"):
        open_ade20k(tiny_ade)


def test_a_pair_is_decoded_and_mapped(tiny_ade: Path) -> None:
    dataset = open_ade20k(tiny_ade)
    sample = dataset.load(3)
    annotation = np.array(Image.open(tiny_ade / "annotations/validation" / f"{sample.image_id}.png"))
    assert np.array_equal(sample.target, ADE20K_ENCODING.targets(annotation, "a"))
    assert sample.image.shape == (*annotation.shape, 3)
    sizes, wrong = dataset.read_headers()
    assert list(sizes.values()) == [dataset.load(i).target.shape for i in range(7)]
    assert list(sizes) == dataset.ids
    assert wrong == {}
    assert dataset.read_headers(annotations=False) == (sizes, {})
    assert dataset.is_partial


def test_images_of_another_size_than_the_official_ones_are_found(tiny_ade: Path) -> None:
    size = validation_sizes()["ADE_val_00000001"]
    write_pair(tiny_ade, "ADE_val_00000001", np.zeros((*size, 3), np.uint8), np.ones(size, np.uint8))
    dataset = open_ade20k(tiny_ade)
    assert resized_images(dataset, list(dataset.read_headers()[0].values())) == dataset.ids[1:]


@pytest.mark.parametrize(
    ("split", "name"),
    [("validation", "ADE_val_00002001"), ("validation", "frankfurt_000000_000294"), ("validation", "ADE_train_00000001"),
     ("training", "ADE_train_00020211"), ("training", "ADE_val_00000001")],
)  # fmt: skip
def test_images_that_ade20k_does_not_have_are_refused(tmp_path: Path, split: str, name: str) -> None:
    known = {"validation": "ADE_val_00000002", "training": "ADE_train_00000002"}[split]
    for image_id in (known, name):
        write_pair(tmp_path, image_id, np.zeros((9, 9, 3), np.uint8), np.ones((9, 9), np.uint8))
    for kind in ("images", "annotations"):
        if split != "validation":
            (tmp_path / kind / "validation").rename(tmp_path / kind / split)
    with pytest.raises(
        HarnessError, match=rf"1 images in {split} are not of .* the first is {name}\..*dataset.kind=folder"
    ):
        open_ade20k(tmp_path, split)


@pytest.mark.parametrize("place", ["folder", "parent", "zip"])
def test_folder_parent_and_zip_give_the_same(tiny_ade: Path, tmp_path: Path, place: str) -> None:
    root = tiny_ade if place == "folder" else tiny_ade.parent
    if place == "zip":
        root = tmp_path / "ADEChallengeData2016.zip"
        with zipfile.ZipFile(root, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(tiny_ade.rglob("*.*")):
                archive.write(file, file.relative_to(tiny_ade.parent))
    expected, found = open_ade20k(tiny_ade), open_ade20k(root)
    assert found.ids == expected.ids
    assert [found.load(i).content_hash for i in range(7)] == [expected.load(i).content_hash for i in range(7)]
    assert found.ids_hash() == expected.ids_hash()


def test_links_are_followed_and_loops_end(tiny_ade: Path, tmp_path: Path) -> None:
    root = tmp_path / "linked"
    root.mkdir()
    for kind in ("images", "annotations"):
        (root / kind).symlink_to(tiny_ade / kind)
    (root / "loop").symlink_to(root)
    assert open_ade20k(root).ids == open_ade20k(tiny_ade).ids


def test_limit_and_ids_make_a_partial_set(tiny_ade: Path) -> None:
    assert open_ade20k(tiny_ade, limit=2).ids == ["ADE_val_00001000", "ADE_val_00001001"]
    assert open_ade20k(tiny_ade, ids=["ADE_val_00001005"]).ids == ["ADE_val_00001005"]
    with pytest.raises(HarnessError, match="Did you mean 'ADE_val_00001005'"):
        open_ade20k(tiny_ade, ids=["ADE_val_0001005"])


# decoding, as the official loaders do


def test_grey_palette_and_cmyk_images_become_rgb() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (16, 24, 3)).astype(np.uint8)
    image = Image.fromarray(rgb)
    grey = decode_image(encoded(image.convert("L")), "grey.jpg")
    assert grey.shape == (16, 24, 3)
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == grey[..., 2]).all()
    flat = image.quantize(16)
    assert np.array_equal(decode_image(encoded(flat, "PNG"), "p.png"), np.array(flat.convert("RGB")))
    cmyk = encoded(image.convert("CMYK"), quality=100)
    assert np.array_equal(decode_image(cmyk, "c.jpg"), np.array(Image.open(io.BytesIO(cmyk)).convert("RGB")))


def test_exif_orientation_is_applied() -> None:
    rgb = np.zeros((8, 16, 3), np.uint8)
    rgb[:, :8] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    turned = decode_image(encoded(Image.fromarray(rgb), exif=exif, quality=100), "turned.jpg")
    assert turned.shape == (16, 8, 3)
    assert turned[2, 4, 0] > 200
    assert turned[13, 4, 0] < 50


def test_a_link_that_leads_nowhere_is_no_image(tiny_ade: Path) -> None:
    """Ranks compare names and sizes of all files: one that cannot be looked at is no error of theirs."""
    (tiny_ade / "images/validation/thumbs").symlink_to(tiny_ade / "nowhere")
    dataset = open_dataset(compose_config(["model=segformer_b0", f"dataset.root={tiny_ade}"]).dataset)
    assert len(dataset.files_hash()) == 64


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_exif_that_no_reader_understands_turns_nothing(exif: bytes) -> None:
    """Pillow raises `struct.error` for a header that is cut off; a JFIF density makes it look at once."""
    rgb = np.full((8, 16, 3), 7, np.uint8)
    whole = encoded(Image.fromarray(rgb), quality=100, dpi=(72, 72))
    data = whole[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + whole[2:]
    assert np.array_equal(decode_image(data, "a.jpg"), decode_image(whole, "a.jpg"))
    assert read_header(data, "a.jpg") == (8, 16)


def test_palette_annotations_give_their_indices() -> None:
    indices = np.array([[0, 1], [150, 7]], np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.reshape(-1).tolist())
    assert np.array_equal(decode_labels(encoded(image, "PNG"), "a.png"), indices)


# bad files


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "RGBA", "LA"])
def test_annotations_of_another_kind_are_refused(mode: str) -> None:
    if mode == "I;16":
        data = encoded(Image.fromarray(np.zeros((4, 4), np.uint16)), "PNG")
    else:
        data = encoded(Image.new(mode, (4, 4)), "PNG")
    with pytest.raises(HarnessError, match=r"a\.png: the label file is .* expected one 8-bit channel"):
        decode_labels(data, "a.png")


def test_labels_over_150_are_refused() -> None:
    with pytest.raises(
        HarnessError,
        match=r"a\.png: holds the label 151 \(and 1 more: 200\)\. Annotations of this benchmark hold 0 \(other\) and 1\.\.150",
    ):
        ADE20K_ENCODING.targets(np.array([[0, 151, 200]], np.uint8), "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)), kind)
    decode = decode_image if kind == "JPEG" else decode_labels
    for length in (0, 20, len(data) // 2, len(data) - 40):
        with pytest.raises(HarnessError, match="broken: this .* cannot be read"):
            decode(data[:length], "broken")


def test_missing_partners_empty_folders_and_other_sizes(tiny_ade: Path, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no such folder or zip"):
        open_ade20k(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(HarnessError, match="is empty"):
        open_ade20k(tmp_path / "empty")
    annotation = tiny_ade / "annotations/validation/ADE_val_00001002.png"
    content = annotation.read_bytes()
    annotation.unlink()
    with pytest.raises(
        HarnessError,
        match=r"1 of 7 images .*ADE_val_00001002 .missing: annotation annotations/validation/ADE_val_00001002\.jpg|1 of 7 images",
    ):
        open_ade20k(tiny_ade)
    annotation.write_bytes(content)
    image = tiny_ade / "images/validation/ADE_val_00001002.jpg"
    image.rename(tmp_path / "away.jpg")
    with pytest.raises(
        HarnessError, match=r"1 of 7 annotations .*missing: image images/validation/ADE_val_00001002\.jpg"
    ):
        open_ade20k(tiny_ade)
    Image.new("RGB", (9, 9)).save(image)
    sizes, wrong = open_ade20k(tiny_ade).read_headers()
    assert len(sizes) == 6
    assert list(wrong) == ["ADE_val_00001002"]
    assert re.search(r"ADE_val_00001002\.jpg is 9x9 .* but .*ADE_val_00001002\.png is 34x34", wrong["ADE_val_00001002"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ADE20K_2021_17_01/images/ADE/validation/a/ADE_val_1_seg.png", "full ADE20K"),
        ("leftImg8bit/val/frankfurt/x.png", "Cityscapes"),
        ("val2017/000000000139.jpg", "COCO"),
        ("VOCdevkit/VOC2012/JPEGImages/1.jpg", "PASCAL"),
    ],
)
def test_other_data_sets_are_named(tmp_path: Path, name: str, expected: str) -> None:
    path = tmp_path / "set" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert expected in (recognise([name]) or "")
    with pytest.raises(HarnessError, match=expected):
        open_ade20k(tmp_path / "set")


def test_zip_with_path_traversal_and_broken_zip(tmp_path: Path) -> None:
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("../../outside.txt", "x")
    with pytest.raises(HarnessError, match="path traversal"):
        open_ade20k(evil)
    evil.write_bytes(evil.read_bytes()[:-30])
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(HarnessError, match="notes.txt: is neither a folder nor a zip file"):
        open_ade20k(tmp_path / "notes.txt")
    with pytest.raises(HarnessError, match="not a whole zip"):
        open_ade20k(evil)


def test_damaged_members_and_leftovers_of_file_managers(tiny_ade: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(tiny_ade.rglob("*.*")):
            archive.write(file, file.relative_to(tiny_ade.parent))
        archive.writestr("__MACOSX/ADEChallengeData2016/images/validation/._ADE_val_00001000.jpg", "x")
    dataset = open_ade20k(path)
    assert len(dataset.ids) == 7
    name = dataset.pairs[0].annotation
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name).header_offset + 30 + len(name)
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = b"\xff" * 20
    path.write_bytes(bytes(content))
    with pytest.raises(HarnessError, match=f"{Path(name).name} is damaged"):
        open_ade20k(path).load(0)


def test_one_folder_linked_twice(tiny_ade: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in tiny_ade.rglob("*.*g"):
        (flat / file.name).write_bytes(file.read_bytes())
    for kind in ("images", "annotations"):
        (tmp_path / "root" / kind).mkdir(parents=True)
        (tmp_path / "root" / kind / "validation").symlink_to(flat)
    assert len(open_ade20k(tmp_path / "root").ids) == 7


# verify, and the synthetic set


def test_verify_lists_everything_that_is_wrong(tiny_ade: Path) -> None:
    images, annotations = tiny_ade / "images/validation", tiny_ade / "annotations/validation"
    for i in range(7):  # official names: their sizes are known
        (images / f"ADE_val_{1000 + i:08d}.jpg").rename(images / f"ADE_val_{i + 1:08d}.jpg")
        (annotations / f"ADE_val_{1000 + i:08d}.png").rename(annotations / f"ADE_val_{i + 1:08d}.png")
    height, width = validation_sizes()["ADE_val_00000001"]
    write_pair(
        tiny_ade,
        "ADE_val_00000001",
        np.zeros((height, width, 3), np.uint8),
        np.ones((height, width), np.uint8),
    )
    broken = images / "ADE_val_00000002.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    (annotations / "ADE_val_00000003.png").unlink()
    seen: list[int] = []
    report = verify(tiny_ade, on_pair=lambda done, total: seen.append(total))
    text = "\n".join(report.problems)
    assert not report.is_whole
    assert (report.pairs, report.expected, len(report.missing)) == (6, 2000, 1993)
    assert "ADE_val_00000003.jpg: no annotation" in text
    assert "ADE_val_00000002.jpg: this image cannot be read" in text
    assert "it was resized or renamed" in text
    assert "ADE_val_00000001" not in text
    assert len(report.problems) == 6
    assert report.class_pixels[0] >= height * width
    assert seen == [6] * 6


@pytest.mark.slow
def test_the_made_up_set_has_the_official_format(tmp_path: Path) -> None:
    root = write_dataset(tmp_path, images=160)
    dataset = open_ade20k(root)
    assert dataset.ids[0] == "ADE_val_00000001"
    assert len(dataset.ids) == 160
    samples = [dataset.load(i) for i in range(160)]
    seen = np.unique(np.concatenate([np.unique(s.target) for s in samples]))
    assert seen.tolist() == [*range(150), 255]  # every class, and unlabelled areas
    modes = {Image.open(root / p.image).mode for p in dataset.pairs}
    assert modes == {"RGB", "L"}
    assert {Image.open(root / p.annotation).mode for p in dataset.pairs} == {"L"}
    image, annotation, _ = make_sample(2016, 5)
    assert np.array_equal(ADE20K_ENCODING.targets(annotation, "a"), samples[5].target)
    assert np.abs(image.astype(int) - samples[5].image).mean() < 12  # JPEG


def test_the_made_up_set_depends_on_the_seed_alone() -> None:
    first, again, other = make_sample(3, 4), make_sample(3, 4), make_sample(4, 4)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[0].shape != other[0].shape or not np.array_equal(first[0], other[0])
