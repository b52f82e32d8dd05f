"""What fails after the score is on disk is a remark: it costs neither the result nor the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ade_harness.config.validate import OWN_DATA
from tests.cli.test_cli import Call

OVERRIDES = ("dataset.images=3", "runtime.workers=0", "run.dir=run", "metrics.resamples=0")


def broken(*_: Any, **__: Any) -> None:
    raise ZeroDivisionError("a fault\nof two lines")


@pytest.mark.parametrize(
    ("place", "overrides", "remark"),
    [
        ("ade_harness.report.pages.write_report", ("run.report=true", "tracking=none"), "no page: ZeroDivisionError: a fault of two lines"),
        ("ade_harness.tracking.run.log_result", ("tracking=wandb", "tracking.mode=offline"), "W&B: not logged: ZeroDivisionError"),
        ("ade_harness.evaluation.recorder.save_overlay", ("tracking=none", "run.overlays=2"), "overlays are missing: a fault of two lines"),
    ],
    ids=["page", "tracking", "overlay"],
)  # fmt: skip
def test_what_fails_after_the_score_is_a_remark(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, overrides: tuple[str, ...], remark: str
) -> None:
    monkeypatch.setattr(place, broken)
    done = call(*OVERRIDES, *overrides)
    assert done.code == 0, done.err
    assert remark in " ".join(done.out.split())
    assert "Traceback" not in done.out + done.err
    assert json.loads((tmp_path / "run/manifest.json").read_text())["status"] == "finished"
    assert (tmp_path / "run/metrics.json").exists()


@pytest.mark.slow
def test_a_limit_of_one_image_and_no_resamples_end_well(call: Call, tmp_path: Path) -> None:
    for overrides in (("dataset.limit=1",), ("dataset.limit=1", "metrics.resamples=0"), ("metrics.resamples=0",)):
        done = call("dataset.images=3", "runtime.workers=0", "tracking=none", "run.report=true", *overrides)
        assert done.code == 0, done.err
        assert "page:" in done.out


def test_a_folder_is_not_ignored_where_the_data_are_synthetic(call: Call) -> None:
    done = call("dataset.root=/no/such", "dataset.images=2")
    assert done.code == 2
    assert "dataset.root=/no/such: would not be read, as the data set is demo. Add dataset=ade20k" in done.err
    for key in OWN_DATA:
        done = call(f"dataset.{key}=/no/such", "dataset.images=2")
        assert done.code == 2
        assert f"dataset.{key}=/no/such: would not be read, as the data set is demo. Add dataset=folder" in done.err
