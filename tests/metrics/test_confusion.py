"""mIoU in every convention, against slow references, other libraries, and the official scorers' own numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ade_harness.data.ade20k_labels import ADE20K_ENCODING, NUM_CLASSES
from ade_harness.data.labels import IGNORE_INDEX
from ade_harness.kernels import reference
from ade_harness.metrics import Convention, class_iou, mean_iou, scores
from ade_harness.metrics.confusion import area_scores, class_accuracy, class_dice, mean_dice

GOLDEN = Path(__file__).parents[1] / "golden"


def matrix_from(target: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return reference.count(torch.from_numpy(labels), torch.from_numpy(target), 150).numpy()


def slow_scores(target: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Plain Python over single pixels."""
    hit, truth, predicted = ([0] * NUM_CLASSES for _ in range(3))
    for t, p in zip(target.reshape(-1).tolist(), labels.reshape(-1).tolist(), strict=True):
        if t == IGNORE_INDEX:
            continue
        truth[t] += 1
        if p < NUM_CLASSES:
            predicted[p] += 1
        hit[t] += t == p
    union = [truth[c] + predicted[c] - hit[c] for c in range(NUM_CLASSES)]
    iou = [hit[c] / union[c] if union[c] else None for c in range(NUM_CLASSES)]
    seen = [i for i in iou if i is not None]
    with_truth = [iou[c] for c in range(NUM_CLASSES) if truth[c]]
    pixels = sum(truth)
    result = {
        "mIoU": sum(seen) / len(seen) if seen else 0.0,
        "mIoU_csail": sum(seen) / NUM_CLASSES,
        "mIoU_detectron2": sum(with_truth) / len(with_truth) if with_truth else 0.0,
        "pixel_accuracy": sum(hit) / pixels if pixels else 0.0,
        "mean_accuracy": sum(hit[c] / truth[c] for c in range(NUM_CLASSES) if truth[c]) / len(with_truth)
        if pixels
        else 0.0,
        "fwIoU": sum(truth[c] * iou[c] for c in range(NUM_CLASSES) if truth[c]) / pixels if pixels else 0.0,
    }
    result["final_score"] = (result["pixel_accuracy"] + result["mIoU"]) / 2
    return result if pixels else dict.fromkeys(result, float("nan"))


@st.composite
def label_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Random and adversarial: few classes, all ignored, none predicted, absent classes, one pixel."""
    shape = (draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    classes = draw(st.sets(st.integers(0, 149), min_size=1, max_size=6))
    values = st.sampled_from([*sorted(classes), IGNORE_INDEX])
    cells = shape[0] * shape[1]
    target = draw(st.lists(values, min_size=cells, max_size=cells))
    labels = draw(st.lists(st.sampled_from([*sorted(classes), 149, 0, 255, 150]), min_size=cells, max_size=cells))
    return np.array(target, np.uint8).reshape(shape), np.array(labels, np.uint8).reshape(shape)


@pytest.mark.slow
@given(label_pairs())
@settings(max_examples=200, deadline=None)
def test_equals_a_loop_over_pixels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = scores(matrix_from(*pair)).as_dict()
    expected = slow_scores(*pair)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12, nan_ok=True), (
            name
        )  # sums of at most 150 float64 in another order


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_equals_torchmetrics(seed: int) -> None:
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex  # imports all metrics

    rng = np.random.default_rng(seed)
    target = rng.integers(0, rng.integers(2, 151), (40, 50)).astype(np.uint8)
    target[rng.random(target.shape) < 0.2] = IGNORE_INDEX
    labels = rng.integers(0, rng.integers(2, 151), (40, 50)).astype(np.uint8)
    matrix = matrix_from(target, labels)
    arguments = torch.from_numpy(labels).long(), torch.from_numpy(target).long()
    theirs = MulticlassConfusionMatrix(NUM_CLASSES, ignore_index=IGNORE_INDEX)(*arguments)
    assert np.array_equal(matrix[:, :NUM_CLASSES], theirs.numpy())
    assert matrix[:, NUM_CLASSES].sum() == 0
    jaccard = MulticlassJaccardIndex(NUM_CLASSES, average="macro", ignore_index=IGNORE_INDEX)(*arguments)
    assert mean_iou(matrix) == pytest.approx(jaccard.item(), abs=1e-5)  # torchmetrics averages in float32


def official_case(seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw (annotation 0..150, prediction 1..150) pairs; golden/metrics.json holds official results for them."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(2, 5))
    classes = int(rng.choice([3, 20, 145]))
    pairs = []
    for _ in range(count):
        height, width = (int(v) for v in rng.integers(5, 60, 2))
        annotation = rng.integers(0, classes + 1, (height, width)).astype(np.uint8)
        keep = rng.random((height, width)) < rng.random()
        other = rng.integers(1, min(150, classes + 5) + 1, (height, width))
        pairs.append((annotation, np.where(keep, np.maximum(annotation, 1), other).astype(np.uint8)))
    return pairs


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "metrics.json").read_text())["cases"], ids=lambda c: str(c["seed"])
)
def test_equals_the_official_scorers(case: dict) -> None:
    matrix = sum(matrix_from(ADE20K_ENCODING.targets(a, "a"), p - 1) for a, p in official_case(case["seed"]))
    hit, union = np.diagonal(matrix), matrix.sum(1) + matrix[:, :150].sum(0) - np.diagonal(matrix)
    assert hit.tolist() == case["csail_intersection"]
    assert union.tolist() == case["csail_union"]
    result = scores(matrix)
    assert result.mIoU == pytest.approx(case["hf_mean_iou"], abs=1e-12)
    assert result.mean_accuracy == pytest.approx(case["hf_mean_accuracy"], abs=1e-12)
    assert result.pixel_accuracy == pytest.approx(case["hf_overall_accuracy"], abs=1e-12)
    assert result.mIoU_csail == pytest.approx(case["csail_mean_iou"], abs=1e-12)
    assert result.pixel_accuracy == pytest.approx(case["csail_pixel_accuracy"], abs=1e-12)


@pytest.mark.parametrize("kind", ["metric", "metric_absent"])
def test_equals_mmsegmentation(kind: str) -> None:
    stored = np.load(GOLDEN / "mmseg0_protocol.npz")
    matrix = np.zeros((150, 151), np.int64)
    for i in range(5):
        annotation = stored[f"{kind}_annotation.{i}"]
        target = ADE20K_ENCODING.targets(np.where(annotation == 255, 0, annotation).astype(np.uint8), "a")
        matrix += matrix_from(target, stored[f"{kind}_pred.{i}"])
    accuracy, miou, miou_absent, absent = stored["metric_values"]
    if kind == "metric":
        assert scores(matrix).pixel_accuracy == pytest.approx(accuracy, abs=1e-6)  # stored from float32
        assert mean_iou(matrix) == pytest.approx(miou, abs=1e-6)
        assert class_iou(matrix) == pytest.approx(stored["metric_iou"], abs=1e-6, nan_ok=True)
    else:
        assert mean_iou(matrix) == pytest.approx(miou_absent, abs=1e-6)
        assert np.isnan(class_iou(matrix)).sum() == absent


def test_conventions_differ_as_documented() -> None:
    """Class 0 half right, class 1 predicted but absent from the truth, the others in neither."""
    matrix = np.zeros((150, 151), np.int64)
    matrix[0, 0], matrix[0, 1] = 5, 5
    assert mean_iou(matrix, Convention.MMSEG) == 0.25
    assert mean_iou(matrix, Convention.DETECTRON2) == 0.5
    assert mean_iou(matrix, Convention.CSAIL) == 0.5 / 150


def test_a_pixel_without_class_is_wrong_but_in_no_class() -> None:
    matrix = np.zeros((150, 151), np.int64)
    matrix[3, 3], matrix[3, 150] = 6, 4
    assert class_iou(matrix)[3] == 0.6
    assert class_accuracy(matrix)[3] == 0.6
    assert mean_iou(matrix) == 0.6  # "none" is no class of its own


@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=4, max_size=4))
def test_dice_is_the_f_score(counts: list[list[int]]) -> None:
    """Of each class twice the true positives over both areas; the last column is of predictions without a class."""
    matrix = np.array(counts, np.int64)
    expected = []
    for c in range(4):
        right, missed = int(matrix[c, c]), int(matrix[c].sum() - matrix[c, c])
        wrong = int(matrix[:, c].sum() - matrix[c, c])
        expected.append(2 * right / (2 * right + missed + wrong) if right + missed + wrong else np.nan)
    assert np.array_equal(class_dice(matrix), expected, equal_nan=True)
    defined = [value for value in expected if not np.isnan(value)]
    found = mean_dice(matrix)
    # four additions may be made in another order
    assert np.isnan(found) if not defined else found == pytest.approx(sum(defined) / len(defined), abs=1e-15)


def test_nothing_counted_is_no_score_alone_and_among_others() -> None:
    """Neither 0 nor 1: a mean over nothing."""
    with np.errstate(all="raise"):  # 0/0 would be a warning of NumPy's in the user's terminal
        found = area_scores(np.array([[0, 0], [3, 0]]), np.array([[0, 0], [4, 0]]), np.array([[0, 0], [3, 1]]))
    for name, values in found.items():
        assert np.isnan(values[0]), name
        assert 0 <= values[1] <= 1, name


def test_counts_beyond_float32_stay_exact() -> None:
    matrix = np.zeros((150, 151), np.int64)
    matrix[0, 0], matrix[0, 1] = 2**40, 1
    assert scores(matrix).pixel_accuracy == 2**40 / (2**40 + 1) < 1.0


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[C, C \+ 1\], got int64\(150, 150\)"):
        scores(np.zeros((150, 150), np.int64))
    with pytest.raises(ValueError, match="integer"):
        scores(np.zeros((150, 151)))
