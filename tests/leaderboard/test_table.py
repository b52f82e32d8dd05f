"""Published rows with one's own complete runs merged in."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ade_harness.data.ade20k import validation_sizes
from ade_harness.errors import HarnessError
from ade_harness.leaderboard import table
from ade_harness.leaderboard.table import (
    Entry,
    as_csv,
    as_markdown,
    measured_entries,
    published_entries,
    ranked,
    state_of_the_art,
    why_not_ranked,
)
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runs.record import is_own, is_own_result
from tests.cli.test_cli import FAST, Call
from tests.runs.test_runs import make_row


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ade_harness.cli.main import main

    path = tmp_path_factory.mktemp("runs") / "demo"
    assert main([*FAST, "dataset.images=3", f"run.dir={path}", "metrics.resamples=1000"]) == 0
    return path


def complete(run: FinishedRun, **metrics: object) -> FinishedRun:
    """Make a run look like one of all validation images."""
    manifest = {
        **run.manifest,
        "marks": [],
        "dataset": {**run.manifest["dataset"], "name": "ade20k", "expected_images": 2000},
        "result_signature": None,  # it would tell
    }
    config = {
        **run.config,
        "model": {**run.config["model"], "label": "Ours | <best>"},
        "dataset": {**run.config["dataset"], "kind": "ade20k"},
    }
    rows = tuple(
        replace(make_row(0), image_id=image_id, height=height, width=width)
        for image_id, (height, width) in validation_sizes().items()
    )
    return FinishedRun(run.path, manifest, config, {**run.metrics, **metrics}, rows, "")


def test_published_rows_are_the_sites() -> None:
    entries = published_entries()
    assert len(entries) == 21
    best = ranked(entries, "mIoU")
    assert [(e.system, e.score) for e in best[:2]] == [("InternImage-H", 62.9), ("BEiT-3 (ViT-L)", 62.8)]
    ties = [e.date for e in best if e.score == 57.3]
    assert ties == ["2025-12", "2026-03"]
    assert [e.score for e in state_of_the_art(entries, "miou")] == [37.4, 57.9, 58.4, 62.6]
    assert {e.kind for e in entries} == {"published"}


def test_complete_runs_are_merged_in_and_marked(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = complete(load_run(demo), mIoU=0.62905, intervals={"mIoU": {"low": 0.62, "high": 0.64, "level": 0.95}})
    assert why_not_ranked(run) is None
    monkeypatch.setattr(table, "is_own_result", lambda *_: True)
    entries = [*published_entries(), *measured_entries(run)]
    for metric, place in (("mIoU", 0), ("miou", 0)):
        mine = ranked(entries, metric)[place]
        assert (mine.kind, mine.score, mine.interval) == ("measured", pytest.approx(62.905), pytest.approx((62, 64)))
    rows = list(csv.DictReader(io.StringIO(as_csv(entries))))
    assert len(rows) == 23
    mine = next(row for row in rows if row["kind"] == "measured")
    assert (mine["system"], mine["place"], mine["interval"]) == ("Ours | <best>", "1", "62.00 to 64.00")
    assert "Ours \\| &lt;best>" in as_markdown(entries)
    strange = replace(
        run, config={**run.config, "model": {**run.config["model"], "label": "![x](http://a.b/c.png) `y`"}}
    )
    assert "| !\\[x\\](http://a.b/c.png) \\`y\\` |" in as_markdown(measured_entries(strange))
    assert table.NOT_OWN not in as_csv(entries)
    monkeypatch.undo()
    with pytest.raises(HarnessError, match="intervals.mIoU: is not that of the ledger"):
        measured_entries(run)  # it is not what the run has written
    run = replace(run, metrics={**run.metrics, "intervals": {}})
    assert {e.note.partition(";")[0] for e in measured_entries(run)} == {table.NOT_SIGNED}
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))  # somebody else's machine
    assert {e.note.partition(";")[0] for e in measured_entries(run)} == {table.NOT_OWN}
    given = {**run.config, "model": {**run.config["model"], "checkpoint": "/a/mine.pth"}}
    by = replace(run, config=given, metrics={**run.metrics, "protocol_changes": ["resize.side"]})
    assert {
        "inference=original_size, changed: resize.side; weights given as mine.pth" in e.note
        for e in measured_entries(by)
    } == {True}
    assert not any("weights given" in e.note or "changed" in e.note for e in measured_entries(run))
    tie = replace(measured_entries(run)[0], score=57.3, date="2026-01")
    assert [e.date for e in ranked([*published_entries(), tie], "mIoU") if e.score == 57.3] == [
        "2025-12",
        "2026-01",
        "2026-03",
    ]


def test_what_has_no_place(demo: Path) -> None:
    run = load_run(demo)
    assert str(why_not_ranked(run)).startswith("DEMO")
    whole = complete(run)
    assert "not all images" in str(why_not_ranked(replace(whole, rows=whole.rows[:1999])))
    for other in (replace(whole.rows[3], image_id="photo_4"), replace(whole.rows[3], width=641)):  # another image
        rows = (*whole.rows[:3], other, *whole.rows[4:])
        assert f"not the official images of ADE20K validation, such as {other.image_id}" == why_not_ranked(
            replace(whole, rows=rows)
        )
    random = {**whole.manifest, "model": {"weights": "random"}}
    assert why_not_ranked(replace(whole, manifest=random)) == "random weights"


def test_a_bad_directory_beside_a_complete_run_is_a_line(
    demo: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = complete(load_run(demo), mIoU=0.5, intervals={})
    forged = replace(whole, metrics={**whole.metrics, "intervals": {"mIoU": {"low": 0.4, "high": 0.6}}})
    known = {"whole": whole, "forged": forged}
    monkeypatch.setattr(table, "load_run", lambda path: known.get(path.name) or load_run(path))
    done = call("leaderboard", "whole", "nowhere", demo, "forged", "--json")
    assert done.code == 0, done.err
    assert "1 complete runs; 3 others excluded" in done.err
    excluded = json.loads(done.out)["excluded"]
    assert excluded[0].startswith("nowhere: no such folder")
    assert "is not comparable with published scores: DEMO" in excluded[1]
    assert "intervals.mIoU: is not that of the ledger" in excluded[2]


def test_the_verb(demo: Path, call: Call, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "all" / "demo")
    (tmp_path / "all" / "broken").mkdir()
    (tmp_path / "all" / "broken" / "manifest.json").write_text("{")
    outputs = [
        word for name in ("chart.png", "chart.svg", "rows.md", "rows.csv") for word in ("--output", tmp_path / name)
    ]
    done = call("leaderboard", "--root", tmp_path / "all", *outputs)
    assert done.code == 0, done.err
    assert "0 complete runs; 2 others excluded" in done.out
    assert "DEMO" in done.out
    assert Image.open(tmp_path / "chart.png").size[0] > 1000
    assert "<svg" in (tmp_path / "chart.svg").read_text()
    assert (tmp_path / "rows.md").read_text().count("| published |") == 21
    done = call("leaderboard", demo, tmp_path / "all" / "broken")  # neither is comparable: both are named
    assert done.code == 2
    assert "demo: is not comparable with published scores: DEMO" in done.err
    assert "broken/manifest.json" in done.err
    for overrides, message in (
        ([demo], "is not comparable with published scores: DEMO"),
        (["--root", tmp_path / "none"], "no such folder"),
        (["--output", "rows.doc"], "expected a file that ends in .md, .csv"),
        (["--output"], "expected one argument"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["--output", "/proc/none/a.png"], "/proc/none: the folder cannot be made"),
    ):
        done = call("leaderboard", *overrides)
        assert done.code == 2, overrides
        assert message in done.err


def test_a_measured_entry_is_never_state_of_the_art_of_the_site() -> None:
    mine = Entry("mIoU", "mine", "", "2020-01", 99.0, "measured", "")
    assert mine not in state_of_the_art([*published_entries(), mine], "mIoU")


@pytest.mark.parametrize("edited", ["nothing", "metrics", "marks", "weights", "failures"])
def test_a_result_that_was_edited_is_no_longer_signed(demo: Path, tmp_path: Path, edited: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(demo, run)
    manifest = json.loads((run / "manifest.json").read_text())
    if edited == "metrics":
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["intervals"]["mIoU"]["low"] = 0.0
        (run / "metrics.json").write_text(json.dumps(metrics))
    elif edited == "weights":
        manifest["model"]["weights"] = "pretrained"
    elif edited != "nothing":
        manifest[edited] = [] if edited == "marks" else {"ADE_val_1": "x"}
    assert is_own_result(run, manifest) == (edited == "nothing")
    assert is_own(run, manifest)
