"""A run of all 2,000 validation images, written by the real code from synthetic counts."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ade_harness.config.compose import compose_config
from ade_harness.config.overrides import overrides_of
from ade_harness.config.plain import as_dict
from ade_harness.data.ade20k import validation_sizes
from ade_harness.data.ade20k_labels import ADE20K_ENCODING, ade20k_classes
from ade_harness.data.dataset import Pair, SegmentationDataset
from ade_harness.metrics.counts import Row, matrix_of, sparse_counts
from ade_harness.runs.ledger import LedgerWriter
from ade_harness.runs.record import start_record
from ade_harness.runs.result import summarise, write_result
from ade_harness.runtime.balance import Balance, RankShare

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = {"version": "0.1.0", "commit": COMMIT, "origin": "https://example.org/group/ade-harness.git", "dirty": False,
        "diff": "", "diff_sha256": None}  # fmt: skip
MODEL = {
    "weights": "pretrained",
    "origin": "nvidia/segformer-b0-finetuned-ade-512-512@489d5cd81a0b59fab9b7ea758d3548ebe99677da/model.safetensors",
    "sha256": "6ae39addd01de6b1b8bde2cf677d43a5cd733424b8d186de3f95d1c51fee23f9",
}
CPU = {"accelerator": "cpu"}


def whole_rows() -> list[Row]:
    """Make counts of the official images: each has three classes, mostly right."""
    rows = []
    for number, (image_id, (height, width)) in enumerate(validation_sizes().items()):
        rng = np.random.default_rng(number)
        matrix, left = np.zeros((150, 151), np.int64), height * width - 100
        for label in (number % 150, *rng.choice(150, 2, replace=False)):
            right, wrong = left // 3, left // 9
            matrix[label, label] += right
            matrix[label, rng.integers(150)] += wrong
        truth, prediction, pixels = sparse_counts(matrix)
        valid = int(pixels.sum())
        rows.append(
            Row(image_id, height, width, valid, height * width - valid, truth, prediction, pixels,
                hashlib.blake2b(matrix.tobytes(), digest_size=16).hexdigest(), f"{number:032x}", 0.01, number % 2, f"secret-host{number % 2}")
        )  # fmt: skip
    return rows


def write_whole_run(
    path: Path, *arguments: str, facts: dict[str, Any] | None = None, code: dict[str, Any] | None = None, marks: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Write a finished run below a folder; `facts` are of its model, `code` replaces parts of its code state."""
    arguments = arguments or ("model=segformer_b0",)
    cfg = compose_config([*arguments, "dataset=ade20k", "dataset.root=/home/somebody/ADEChallengeData2016", "tracking=none",
                          f"run.dir={path}", "metrics.resamples=1000"])  # fmt: skip
    rows = whole_rows()
    config = as_dict(cfg)
    pairs = tuple(Pair(row.image_id, "", "") for row in rows)
    dataset = SegmentationDataset("ade20k", None, pairs, len(rows), ade20k_classes(), ADE20K_ENCODING)  # type: ignore[arg-type]
    about = {
        "device": "cpu", "kernels": "numba_cpu", "model": {"name": cfg.model.name, **(facts or MODEL)},
        "dataset": {"name": "ade20k", "root": cfg.dataset.root, "images": len(rows), "expected_images": len(rows),
                    "ids_hash": dataset.ids_hash()},
        "repeat": overrides_of(cfg),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ade_harness.runs.record.code_state", lambda: {**CODE, **(code or {})})
        record = start_record(config, about, marks, {"runtime.seed": 0, "model.seed": 0})
    writer = LedgerWriter(path / "ledger", marks, flush_every=500)
    for row in rows:
        writer.append(row)
    writer.flush()
    result = summarise(
        cfg, path, dataset, rows, matrix_of(rows, 150), marks, (), about["model"], CODE["commit"], notes=(), seconds=1.0, images_per_second=2000.0,
        balance=Balance((RankShare(0, "secret-host0", len(rows), 1.0, 1.0),)), stages={},
    )  # fmt: skip
    write_result(result)
    record.finish(rows, result.timings(), marks, {})
    record.lock.release()
    return path
