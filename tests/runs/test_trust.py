"""One's own run is continued as it is; an untrusted one needs --trust before it imports, uses an address, or reads a secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ade_harness.cli.main import main
from ade_harness.runs.directory import read_manifest
from ade_harness.runs.record import is_own
from ade_harness.runs.trust import is_signed, key_path, signature, why_not_trusted
from tests.cli.test_cli import FAST, Call, one_message
from tests.conftest import REPOSITORY

CUSTOM = ("model=custom", "model._target_=tests.models.test_identity.Two")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main(["dataset.images=2", *FAST, f"run.dir={run}", "metrics.resamples=0"]) == 0
    return run


@pytest.fixture
def stranger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function after which this process is another user, with another key."""
    return lambda: monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other-state"))


def test_a_signature_is_of_these_values_and_this_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert not is_signed("0" * 64, "a")  # no key yet, and none is made by looking
    assert not key_path().exists()
    made = signature("a", ["b"])
    assert made == signature("a", ["b"])
    assert key_path().stat().st_mode & 0o777 == 0o600
    assert is_signed(made, "a", ["b"])
    for other in (("a", ["c"]), ("a", "b"), ("a",), (["a"], ["b"])):
        assert not is_signed(made, *other)
    for other in (None, 7, "", "é"):
        assert not is_signed(other, "a", ["b"]) or other == made
    key_path().write_bytes(b"short")
    assert not is_signed(made, "a", ["b"])
    assert signature("a") is None


def test_a_key_is_made_beside_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    key_path().parent.mkdir()
    made = signature("a")
    assert is_signed(made, "a")
    assert [path.name for path in key_path().parent.iterdir()] == ["key"]  # nothing temporary is left


def test_no_key_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert signature("a") is None


@pytest.mark.slow
def test_ones_own_run_goes_on_and_a_strangers_asks(call: Call, tmp_path: Path, stranger: Any) -> None:
    assert call(*CUSTOM, "dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=0").code == 0
    assert call("resume", "run").code == 0
    stranger()
    for overrides in (("resume", "run"), ("reproduce", "run")):
        one_message(
            call(*overrides),
            "run: was not made by you on this machine, and would import model._target_=tests.models",
            "--trust",
        )
    assert call("resume", "run", "--trust").code == 0


@pytest.mark.slow
def test_texts_of_several_lines_are_used_as_they_stand(call: Call, tmp_path: Path) -> None:
    """They are shown in one line; what is signed, compared and repeated keeps its own."""
    (tmp_path / "mine/inference").mkdir(parents=True)
    (tmp_path / "mine/inference/mine.yaml").write_text(
        "defaults: [original_size, _self_]\nname: mine\nsource: |\n  two\n  lines,\ta tab\n"
    )
    overrides = ("--config-dir", tmp_path / "mine", "inference=mine", "dataset.images=2", *FAST, "metrics.resamples=0")
    assert call(*overrides, "run.dir=run").code == 0
    manifest = read_manifest(tmp_path / "run")
    assert is_own(tmp_path / "run", manifest)
    assert any("two\nlines,\ta tab\n" in word for word in manifest["repeat"])
    done = call("resume", "run")
    assert done.code == 0
    assert "not made by you" not in done.err
    assert call("reproduce", "run", "--output", "again").code == 0


def test_a_changed_run_is_not_ones_own(call: Call, tmp_path: Path) -> None:
    assert call("dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=0").code == 0
    path = tmp_path / "run"
    manifest = json.loads((path / "manifest.json").read_text())
    assert is_own(path, manifest)
    assert not is_own(path, {**manifest, "repeat": ["model=custom", "model._target_=os.system"]})
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(
        config.replace("_target_: null", "_target_: os.system").replace("kind: demo", "kind: custom", 1)
    )
    assert not is_own(path, manifest)
    one_message(call("resume", "run"), "would import model._target_=os.system")
    one_message(call("resume", "run", "--trust"), "os.system: is a builtin")


def test_a_strangers_harmless_run_goes_on(call: Call, stranger: Any) -> None:
    assert call("dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=0").code == 0
    stranger()
    assert call("resume", "run").code == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model": {"name": "x", "kind": "custom", "_target_": "os.system"}}, "would import model._target_=os.system"),
        ({"model": {"name": "x", "kwargs": {"a": [{"_target_": "os.abort"}]}}}, "would import model.kwargs.a[0]._target_"),
        ({"model": {"name": "x", "kind": "torchscript", "path": "a.pt"}}, "would run a TorchScript file"),
        ({"model": {"kind": "http", "url": "http://h", "http": {"token_env": "AWS"}}}, "would send your environment variable AWS"),
        ({"model": {"kind": "http", "url": "http://h"}}, "would use the address model.url=http://h"),
        ({"model": {"name": "segformer_b0", "official": {"url": "http://evil/w.pth"}}}, "model.official.url=http://evil/w.pth"),
        ({"model": {"kind": "hf", "id": "a/b"}}, "would load model.id=a/b"),
        ({"model": {"name": "segformer_b0", "hub": {"hub_id": "evil/w"}}}, "would fetch model.hub.hub_id=evil/w"),
        ({"dataset": {"root": "s3://bucket"}}, "would use the address dataset.root=s3://bucket"),
        ({"model": {"kind": "timm", "architecture": {"backbone": {"name": "hf-hub:evil/x"}}}}, "backbone.name=hf-hub:evil/x"),
        ({"model": {"kind": "smp", "architecture": {"encoder": {"name": "tu-hf_hub:evil/x"}}}}, "encoder.name=tu-hf_hub:evil/x"),
        ({"model": {"kind": "http", "url": "HTTP:/h"}}, "would use the address model.url=HTTP:/h"),
        ({"model": {"kind": "hf", "id": ["a"]}}, "would load model.id=['a']"),
        ({"tracking": {"kind": "wandb", "entity": "evil"}}, "would log to W&B with tracking.entity=evil"),
        ({"tracking": {"kind": "wandb", "run_id": "abc"}}, "tracking.run_id=abc"),
        ({"tracking": {"kind": "none", "entity": "evil"}}, None),
        ({"tracking": {"kind": "wandb", "entity": None}}, None),
        ({"model": "no mapping"}, None),
        ({"model": {"name": "demo", "kind": "demo", "about": {"paper": "https://arxiv.org/abs/1"}}}, None),
    ],
)  # fmt: skip
def test_what_a_configuration_would_do(config: dict[str, Any], reason: str | None) -> None:
    found = why_not_trusted(config)
    assert (found is None) if reason is None else (reason in str(found))


@pytest.mark.slow
def test_every_packaged_model_needs_no_consent() -> None:
    from omegaconf import OmegaConf

    from ade_harness.config.compose import compose_tree
    from ade_harness.config.files import choices

    asking = {"custom", "torchscript", "exported", "hf", "http"}
    for name in choices("model"):
        tree: Any = OmegaConf.to_container(
            compose_tree([f"model={name}", "dataset=demo"]), resolve=False, enum_to_str=True
        )
        if tree["model"].get("kind") not in asking and "mlperf" not in name:
            assert why_not_trusted(tree) is None, name


@pytest.mark.slow
def test_a_secret_in_the_environment_stays_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: Any
) -> None:
    monkeypatch.setenv("MY_SECRET", "hunter2")
    assert call("dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=1000").code == 0
    config = (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "run/config.yaml").write_text(
        config.replace("root: null", "root: ${oc.env:MY_SECRET}").replace(
            "label: demo network", "label: ${oc.env:MY_SECRET}"
        )
    )
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    stranger()
    printed = ""
    for overrides in (
        ("report", "run"),
        ("compare", "run", "other"),
        ("status", "run"),
        ("leaderboard", "run"),
        ("resume", "run"),
    ):
        done = call(*overrides)
        printed += done.out + done.err
    pages = "".join(p.read_text() for p in tmp_path.rglob("*.html"))
    assert "hunter2" not in printed + pages
    assert "${oc.env:MY_SECRET}" in pages


@pytest.mark.slow
def test_a_strangers_run_chooses_no_server(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stranger: Any
) -> None:
    """W&B reads ./wandb/settings, where an address may be to which it would send the key."""
    import wandb

    overrides = [word for word in FAST if not word.startswith("tracking")]
    started = tmp_path / "theirs"
    started.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert call("dataset.images=2", *overrides, "run.dir=theirs/run", "metrics.resamples=0").code == 0
    manifest = json.loads((started / "run/manifest.json").read_text())
    (started / "run/manifest.json").write_text(json.dumps({**manifest, "directory": str(started)}))
    for folder in (started, started / "run"):
        (folder / "wandb").mkdir(exist_ok=True)
        (folder / "wandb/settings").write_text("[default]\nbase_url = http://127.0.0.1:1\n")
    asked: list[tuple[str, str]] = []

    class Process:
        returncode, pid, stdout = 1, 2**22 + 1, None  # no such process

        def __init__(self, command: list[str], cwd: str, env: dict[str, str], **_: Any) -> None:
            assert list(Path(cwd).iterdir()) == []
            asked.append((cwd, env["WANDB_BASE_URL"]))

        def communicate(self, **_: Any) -> tuple[str, None]:
            return "", None

        def wait(self) -> int:
            return 1

    fake = SimpleNamespace(**{**vars(subprocess), "Popen": Process})
    monkeypatch.setattr("ade_harness.tracking.upload.subprocess", fake)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    stranger()
    done = call("resume", "theirs/run", "tracking.live=false")
    assert "was not made by you on this machine: its relative paths are taken from" in done.err
    assert "was not made by you on this machine: it is not logged to W&B" in done.err
    assert asked == []  # its tracking.json might name a run of this user's
    done = call("dataset.images=2", *overrides, "run.dir=mine", "metrics.resamples=0", "tracking.live=false")
    assert [url for _, url in asked] == [wandb.Settings().base_url]
    assert not Path(asked[0][0]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "logs/rank00000.log",
        "ledger",
        "overlays",
        "label_maps",
        "label_maps/sub/deep",
        "overlays/sub",
        "wandb/.session",
        "metrics.json",
    ],
)
def test_a_link_in_a_run_directory_is_not_written_through(
    call: Call, finished: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    victim = tmp_path / "mine"
    victim.mkdir()
    (victim / "file").write_text("mine")
    place = tmp_path / "run" / name
    shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True, parents=True)
    place.symlink_to(victim if "." not in name else victim / "file")
    done = call("resume", "run", "dataset.check_headers=true")
    assert done.code == 2
    assert f"{place.name}: is a link, or neither a file nor a folder" in done.err
    assert [(p.name, p.read_text()) for p in victim.iterdir()] == [("file", "mine")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [["-m", "ade_harness"], ["-um", "ade_harness"], ["-Bm", "ade_harness"], ["-made_harness"]]
)
def test_the_working_directory_is_searched_for_nothing_however_python_is_started(
    tmp_path: Path, flags: list[str]
) -> None:
    """Nor where a folder has the package's name: the installed package is found before it."""
    (tmp_path / "yaml.py").write_text("open('owned', 'w')\nraise SystemExit(7)\n")
    (tmp_path / "ade_harness").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(REPOSITORY / "src")}
    done = subprocess.run(
        [sys.executable, *flags, "status", "."], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )  # fmt: skip
    assert (done.returncode, "holds no run" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "owned").exists()


@pytest.mark.slow
def test_nothing_is_imported_from_a_strangers_folder(tmp_path: Path, call: Call) -> None:
    assert call("dataset.images=2", *FAST, "run.dir=run", "metrics.resamples=0").code == 0
    # of the standard library too: all but what Python's own `-m` imports before it knows the module
    for name in ("yaml", "numpy", "pyarrow", "torch", "rich", "random", "math", "logging", "hashlib", "json", "pathlib",
                 "argparse", "typing", "threading"):  # fmt: skip
        (tmp_path / f"{name}.py").write_text("open('owned', 'w')\nraise SystemExit(7)\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(REPOSITORY / "src")}
    for overrides in (["status", "run"], ["submit", "--check", "."], ["dataset.images=2", *FAST, "run.dir=run2"]):
        done = subprocess.run(
            [sys.executable, "-m", "ade_harness", *overrides], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
        )  # fmt: skip
        assert done.returncode in (0, 2), (overrides, done.stderr)
        assert not (tmp_path / "owned").exists(), overrides
    shutil.rmtree(tmp_path / "run2")
