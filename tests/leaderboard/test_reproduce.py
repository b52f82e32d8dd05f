"""Runs are repeated with their own commit, and compared image by image."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ade_harness
from ade_harness.config.compose import compose_config
from ade_harness.config.fields import place_keys
from ade_harness.config.overrides import PATHS, as_override_value, overrides_of
from ade_harness.config.schema import Config
from ade_harness.errors import HarnessError
from ade_harness.leaderboard.reproduce import checkout, rerun
from ade_harness.leaderboard.reproduce.checkout import checked_out_code
from ade_harness.leaderboard.reproduce.comparison import compare_runs, list_differences
from ade_harness.leaderboard.reproduce.rerun import _check_trust
from ade_harness.leaderboard.submission.submit import build, prepare
from ade_harness.metrics.counts import Row
from ade_harness.runs.finished import FinishedRun, load_run
from tests.cli.test_cli import FAST, Call, one_message
from tests.conftest import Done
from tests.leaderboard.whole_run import write_whole_run

pytestmark = pytest.mark.slow  # the file takes more than a few seconds


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ade_harness.cli.main import main

    path = tmp_path_factory.mktemp("runs") / "demo"
    assert main([*FAST, "dataset.images=6", f"run.dir={path}", "metrics.resamples=1000"]) == 0
    return path


# overrides


@pytest.mark.parametrize(
    "arguments",
    [
        ["model=demo", "dataset.images=7"],
        ["model=segformer_b0", "dataset=ade20k", "dataset.root='/a b/it\\'s'", "inference.tta.scales=[0.5,1.0]", "inference.batch=3"],
        ["model=custom", "model._target_=a.b.C", "model.kwargs.n=3", "model.kwargs.text='a, b: {c} \\'d\\''", "model.kwargs.deep={a:{b:[1,2.5,null]}}"],
        ["model=onnx", "model.path=/x.onnx", "model.class_map=[null,0,1]", "model.class_names=['a b','null','c,d']", "model.input.mean=[0.1,1e-3,2]"],
        ["model=http", "model.url=http://h.example:8000/a?x=1", "metrics.level=0.9"],
        ["model=hf", "model.id=x/y", "dataset=folder", "dataset.name=streets", "dataset.image_dir=/a b/i", "dataset.label_dir=/l", "dataset.classes=/c.yaml", "dataset.label_suffix=_x.png"],
        ["model=mask2former_swin_l", "inference=ms", "dataset=ade20k", "dataset.root=/d", "model.architecture.extra.deep=1"],
    ],
)  # fmt: skip
def test_the_overrides_of_a_configuration_compose_it_again(arguments: list[str]) -> None:
    cfg = compose_config(arguments)
    found = overrides_of(cfg)
    assert found is not None
    again = compose_config(found)
    for group in ("model", "dataset", "inference", "metrics"):
        assert getattr(again, group) == getattr(cfg, group)


def test_every_field_that_holds_a_path_is_known_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is repeated from another folder, so that its relative paths must not be kept as they were typed."""
    # of the hub, the network, a file; of the run
    others = {"model.id", "model.url", "model.output", "run.dir", "run.root", "tracking.run_id"}
    places = {
        k
        for k in place_keys(Config)
        if not k.startswith(("runtime.", "model.about.")) and not k.endswith((".hub_id", ".filename", ".url"))
    }
    assert places - others == set(PATHS)
    monkeypatch.chdir(tmp_path)
    arguments = [
        "model=predictions", "model.path=maps", "dataset=folder", "dataset.image_dir=i", "dataset.label_dir=l/m",
        "dataset.classes=../c.yaml",
    ]  # fmt: skip
    found = overrides_of(compose_config(arguments)) or []
    expected = {
        "model.path": "maps",
        "dataset.image_dir": "i",
        "dataset.label_dir": "l/m",
        "dataset.classes": "../c.yaml",
    }
    for key, path in expected.items():
        assert f"{key}={(tmp_path / path).resolve()}" in found


def test_words_need_no_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "inference").mkdir()
    (tmp_path / "model/mine.yaml").write_text(
        "defaults: [schema, _self_]\nname: mine\nkind: onnx\npath: net.onnx\nlabel: Mine & co\n"
    )
    (tmp_path / "inference/own.yaml").write_text(
        "defaults: [schema, _self_]\nname: own\nresize: {rule: short_side, side: 300}\n"
    )
    cfg = compose_config(["model=mine", "inference=own"], tmp_path)
    arguments = overrides_of(cfg)
    assert arguments is not None
    again = compose_config(arguments)
    assert (again.model.name, again.model.label, again.inference.name) == ("mine", "Mine & co", "own")
    assert again.inference == cfg.inference
    assert Path(again.model.path).is_absolute()
    assert as_override_value({"a": [1, None, True], "b c": "x"}) == "{a:[1,null,true],'b c':x}"


# comparing


def changed(run: FinishedRun, index: int, change: Callable[[Row], dict[str, Any]]) -> FinishedRun:
    rows = list(run.rows)
    rows[index] = replace(rows[index], **change(rows[index]))
    return replace(run, rows=tuple(rows))


def test_equal_runs_are_bit_identical(demo: Path) -> None:
    run = load_run(demo)
    comparison = compare_runs(run, run)
    assert comparison.bit_identical
    assert comparison.verdict.startswith("bit-identical: the label maps and counts of all 6 images are equal")


def test_every_difference_is_reported_with_its_size(demo: Path) -> None:
    run = load_run(demo)

    def move(row: Row) -> dict[str, Any]:  # five pixels of the first entry go to the second entry's prediction
        pixels, prediction = row.pixels.copy(), row.prediction.copy()
        same = np.flatnonzero(row.ground_truth == row.ground_truth[0])
        pixels[same[0]] -= 5
        truth = np.append(row.ground_truth, row.ground_truth[0])
        return {
            "pixels": np.append(pixels, 5),
            "ground_truth": truth,
            "prediction": np.append(prediction, 150),
            "label_hash": "x",
        }

    comparison = compare_runs(run, changed(run, 2, move))
    assert not comparison.bit_identical
    assert [(d.image_id, d.pixels) for d in comparison.different] == [(run.rows[2].image_id, 5)]
    assert f"1 of 6 label maps differ, in at least 5 of their {run.rows[2].valid_pixels:,} pixels" in comparison.verdict
    hidden = compare_runs(run, changed(run, 0, lambda _: {"label_hash": "x"}))  # other labels, equal counts
    assert (hidden.bit_identical, hidden.same_labels, hidden.same_counts) == (False, 5, 6)
    files = compare_runs(run, changed(run, 1, lambda row: {"content_hash": "0" * len(row.content_hash)}))
    assert files.other_files == (run.rows[1].image_id,)
    fewer = compare_runs(run, replace(run, rows=run.rows[:4]))
    assert (fewer.bit_identical, len(fewer.only_first)) == (False, 2)
    assert "2 images are in the first run alone" in fewer.verdict
    with pytest.raises(HarnessError, match="share no images"):
        compare_runs(replace(run, rows=run.rows[:1]), replace(run, rows=run.rows[1:]))


def test_what_differs_is_named(demo: Path) -> None:
    run = load_run(demo)
    assert list_differences(run, run) == []
    config, second = json.loads(json.dumps([run.config, run.manifest]))
    config["inference"]["batch"] = 7
    config["dataset"]["root"] = "/elsewhere"
    second["environment"]["gpus"] = ["H100"]
    packages = second["environment"]["distributions"]
    packages["numpy"]["version"] = "0.0"
    packages["pillow"]["sha256"] = "0"
    del packages["rich"]
    reported = "\n".join(list_differences(run, replace(run, config=config, manifest=second)))
    for text in ("inference.batch: was null, is 7", 'gpus: was [], is ["H100"]', "package numpy: was", "is 0.0",
                 "other files of the same version", "package rich: was"):  # fmt: skip
        assert text in reported
    assert "dataset.root" not in reported
    assert len(reported.splitlines()) == 5


# the code of a run


def git(folder: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True, env={**os.environ, **who}
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone-like repository of the package with two commits; the second changes the version."""
    root = tmp_path / "repository"
    source = Path(ade_harness.__file__).parents[2]
    for name in ("src", "conf"):
        shutil.copytree(source / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    (root / "src/ade_harness/__init__.py").write_text('"""Two."""\n\n__version__ = "2.0.0"\n')
    git(root, "commit", "-qam", "two")
    monkeypatch.setattr(checkout.ade_harness, "__file__", str(root / "src/ade_harness/__init__.py"))
    return root


def version(environment: dict[str, str]) -> str:
    command = [sys.executable, "-c", "import ade_harness; print(ade_harness.__version__)"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    ).stdout.strip()


def test_another_commit_is_checked_out_and_removed_again(repository: Path) -> None:
    one, two = git(repository, "rev-parse", "HEAD~1"), git(repository, "rev-parse", "HEAD")
    current = {"commit": two, "dirty": False, "diff_sha256": None}
    with checked_out_code({"commit": one, "dirty": False, "diff_sha256": None}, current, True) as code:
        tree = Path(code.environment["PYTHONPATH"].split(os.pathsep)[0])
        assert version(dict(code.environment)) == ade_harness.__version__ != "2.0.0"
        assert git(tree, "rev-parse", "HEAD") == one
        assert code.remarks == ()
    assert not tree.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    with checked_out_code({"commit": two, "dirty": False, "diff_sha256": None}, current, True) as code:
        assert (code.environment, code.remarks) == ({}, ())
    with checked_out_code(
        {"commit": two, "dirty": True, "diff_sha256": "1"},
        {**current, "dirty": True, "diff_sha256": "1"},
        True,
    ) as code:
        assert (code.environment, code.remarks) == ({}, ())  # the very same uncommitted changes
    with checked_out_code({"commit": one, "dirty": False}, current, trusted=False) as code:  # before a hole was closed
        assert code.environment == {}
        assert "was not made by you on this machine: this code repeats it" in code.remarks[0]
    with checked_out_code({"commit": one, "dirty": True, "diff_sha256": "1"}, current, True) as code:
        assert "PYTHONPATH" in code.environment
        assert "uncommitted changes" in code.remarks[0]
    git(repository, "checkout", "-q", "--detach")
    git(repository, "commit", "-q", "--allow-empty", "-m", "of a pull request")
    foreign = git(repository, "rev-parse", "HEAD")
    git(repository, "checkout", "-q", two)
    with checked_out_code({"commit": foreign, "dirty": False}, current, True) as code:
        assert code.environment == {}  # code that somebody else's manifest names would be run
        assert "is neither in the history of HEAD nor in a branch" in code.remarks[0]
    with checked_out_code({"commit": "--output=x", "dirty": False}, current, True) as code:
        assert "no such commit" in code.remarks[0]
    with checked_out_code({"commit": "f" * 40, "dirty": False}, current, True) as code:
        assert code.environment == {}
        assert "no such commit" in code.remarks[0]
    with checked_out_code({"commit": None, "version": "0.1.0", "dirty": None}, current, True) as code:
        assert "installed version 0.1.0, without a commit" in code.remarks[0]


# the command


@pytest.mark.slow
def test_a_run_is_repeated_with_the_same_bits(demo: Path, cli: Callable[..., Done], tmp_path: Path) -> None:
    two_ranks = ["runtime.devices=2", "runtime.accelerator=cpu"]
    done = cli("reproduce", demo, "--output", tmp_path / "again", *two_ranks, "--json")
    assert done.code == 0, done.err + done.out
    assert "bit-identical: the label maps and counts of all 6 images are equal" in " ".join(done.err.split())
    written = json.loads((tmp_path / "again/reproduction.json").read_text())
    assert json.loads(done.out) == written
    assert written["bit_identical"] is True
    assert written["changes"] == []
    assert load_run(tmp_path / "again").ledger_hash == load_run(demo).ledger_hash


@pytest.mark.slow
def test_a_run_that_is_not_the_same_says_where(demo: Path, cli: Callable[..., Done], tmp_path: Path) -> None:
    """The first run claims another crop than it used: its overrides give other labels."""
    edited = Path(shutil.copytree(demo, tmp_path / "edited"))
    manifest = json.loads((edited / "manifest.json").read_text())
    manifest["repeat"].append("inference.resize={rule: short_side, side: 64}")
    (edited / "manifest.json").write_text(json.dumps(manifest))
    done = cli("reproduce", edited, "--output", tmp_path / "again")
    assert done.code == 3, done.err + done.out
    out = " ".join(done.out.split())
    assert "not identical: 6 of 6 label maps differ" in out
    assert "inference.resize.side: was null, is 64" in out
    assert "images that differ most" in out
    assert "95% interval" in out
    assert json.loads((tmp_path / "again/reproduction.json").read_text())["same_labels"] == 0


def test_mistakes_are_one_message(demo: Path, call: Call, tmp_path: Path) -> None:
    one_message(call("reproduce"), "the following arguments are required: RUN|SUBMISSION")
    one_message(
        call("reproduce", demo, "inference.batch=4"), "would change the evaluation", "dataset.root", "runtime.*"
    )
    one_message(call("reproduce", demo, "tracking=none"), "reruns are not tracked", "--output")
    one_message(call("reproduce", demo, "--fast"), "unrecognized arguments: --fast")
    one_message(call("reproduce", demo, "--output"), "argument --output: expected one argument")
    one_message(call("reproduce", tmp_path / "none"), "no such folder")
    edited = Path(shutil.copytree(demo, tmp_path / "edited"))
    manifest = json.loads((edited / "manifest.json").read_text())
    (edited / "manifest.json").write_text(json.dumps({**manifest, "repeat": None}))
    one_message(call("reproduce", edited), "cannot be written as overrides")


def test_a_repetition_that_fails_passes_its_code_on(demo: Path, cli: Callable[..., Done], tmp_path: Path) -> None:
    edited = Path(shutil.copytree(demo, tmp_path / "edited"))
    manifest = json.loads((edited / "manifest.json").read_text())
    manifest["repeat"] = ["model=nothing"]
    (edited / "manifest.json").write_text(json.dumps(manifest))
    one_message(cli("reproduce", edited), "model=nothing: unknown value")  # not as signed: looked at before it is run
    done = cli("reproduce", edited, "--trust", "--output", tmp_path / "again")
    assert done.code == 2
    assert "unknown value" in done.err
    assert f"--output {tmp_path / 'again'} to continue it" in done.out


@pytest.mark.parametrize(
    "word",
    [
        "+hydra.callbacks.x._target_=pandas.read_pickle", "hydra.verbose=true", "tracking.kind=wandb", "run.dir=elsewhere",
        "model@hydra.callbacks=demo", "~model.label", "runtime.devices=1", "-m", "--config-dir=there", "model=a,b",
        "inference.tta",
    ],
)  # fmt: skip
def test_a_run_repeats_only_what_decides_its_counts(demo: Path, call: Call, tmp_path: Path, word: str) -> None:
    """Not Hydra's callbacks, which run code, also where nobody asks for trust."""
    edited = Path(shutil.copytree(demo, tmp_path / "edited"))
    manifest = json.loads((edited / "manifest.json").read_text())
    (edited / "manifest.json").write_text(json.dumps({**manifest, "repeat": [*manifest["repeat"], word]}))
    for more in ((), ("--trust",)):
        one_message(call("reproduce", edited, *more), "damaged: manifest.json, repeat: ", "decides the counts")


def test_a_strangers_address_is_not_contacted_without_consent(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"weights": "pretrained", "origin": "x.onnx", "sha256": "b" * 64}
    run = load_run(write_whole_run(tmp_path / "mine", "model=onnx", "model.path=x.onnx", facts=facts))
    about = {"--contact": "me@example.org", "--checkpoint": "https://evil.example.org/collect/x.onnx"}
    build(run, tmp_path / "theirs", *prepare(run, about, lambda reference: reference))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
    asked: list[str] = []
    monkeypatch.setattr(rerun, "url_checkpoint", lambda url, *_, **__: asked.append(url))
    one_message(
        call("reproduce", tmp_path / "theirs"), "would download https://evil.example.org/collect/x.onnx",
        "model.path=FILE, or add --trust",
    )  # fmt: skip
    assert asked == []


def test_a_strangers_code_and_a_token_of_mine_need_consent(call: Call, tmp_path: Path) -> None:
    facts = {"weights": "pretrained", "origin": "https://example.org/w.pth", "sha256": "b" * 64}
    arguments = ("model=custom", "model._target_=os.system", "inference=fit_input")
    run = load_run(write_whole_run(tmp_path / "custom", *arguments, facts=facts))
    about = {"--contact": "me@example.org", "--model-code": "https://example.org/mine"}
    build(run, tmp_path / "theirs", *prepare(run, about, lambda reference: reference))
    one_message(call("reproduce", tmp_path / "theirs"), "would import model._target_=os.system", "add --trust")
    for arguments, message in (
        (["model=custom", "model._target_=os.system"], "would import model._target_=os.system"),
        (
            ["model=segformer_b0", "model.kind=custom", "++model._target_=os.system"],
            "would import model._target_=os.system",
        ),
        (["model=torchscript", "model.path=x.pt"], "is a program"),
        (
            ["model=http", "model.url='https://h.example'", "model.http.token_env=AWS_SECRET"],
            "would send your environment variable AWS_SECRET to https://h.example",
        ),
        (["model=nothing"], "model=nothing: unknown value"),
    ):
        with pytest.raises(HarnessError, match=message):
            _check_trust(arguments, tmp_path)  # whatever the submission's config.yaml says: these are what runs
    _check_trust(["model=segformer_b0", "dataset=ade20k"], tmp_path)


@pytest.mark.parametrize("value", ["a${x}", "a\\${x}", "a\\\\${b}'c\\", "${run.dir}", "x'${y}'", "${oc.env:HOME}"])
def test_what_looks_like_an_interpolation_in_a_value_is_text(value: str) -> None:
    assert compose_config([f"run.dir={as_override_value(value)}"]).run.dir == value
    cfg = compose_config(["model=segformer_b0", "dataset=ade20k"])
    cfg.dataset.root = f"/data/{value}"
    arguments = overrides_of(cfg)
    assert arguments is not None
    assert compose_config(arguments).dataset.root == f"/data/{value}"
