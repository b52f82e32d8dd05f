"""Ledgers that come back from W&B, and the saved view."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ade_harness.cli.main import main
from ade_harness.errors import HarnessError
from ade_harness.runs.finished import load_run
from ade_harness.tracking import pull as wandb_pull
from ade_harness.tracking import workspace as wandb_workspace
from ade_harness.tracking.content import LEDGER_FILES
from ade_harness.tracking.pull import parse_spec, pull_run, refuse_other_files
from tests.conftest import REPOSITORY
from tests.tracking.stub_server import ENTITY, StubServer, hang

pytestmark = pytest.mark.slow  # the file takes more than a few seconds


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("pull")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        overrides = ["dataset.limit=3", "tracking=none", "runtime.workers=0", "run.overlays=0"]
        assert main([*overrides, "run.dir=mine"]) == 0
    return work / "mine"


@pytest.fixture(autouse=True)
def online(stub: StubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_BASE_URL", stub.base)
    monkeypatch.setenv("WANDB_API_KEY", stub.key)
    monkeypatch.setenv("ADE_HARNESS_CACHE", str(tmp_path / "cache"))
    yield
    for kept in (stub.artifacts, stub.uploads, stub.runs, stub.views):
        kept.clear()


def files_of(run: Path) -> dict[str, bytes]:
    names = [*LEDGER_FILES, *(f"ledger/{path.name}" for path in (run / "ledger").iterdir())]
    return {name: (run / name).read_bytes() for name in names}


@pytest.fixture
def logged(stub: StubServer, local: Path) -> str:
    """A run on the server, with the artifact of a local one."""
    put(stub, "r1", files_of(local))
    return f"wandb:{ENTITY}/ade20k/r1"


def put(stub: StubServer, run: str, files: dict[str, bytes], **entry: Any) -> None:
    identifier = f"A{len(stub.artifacts)}"
    contents = {}
    for name, content in files.items():
        stub.uploads[f"/upload/artifact/{identifier}/{name}"] = content
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        contents[name] = {"digest": digest, "size": len(content), "birthArtifactID": identifier, **entry}
    manifest = {
        "version": 1, "storagePolicy": "wandb-storage-policy-v1", "storagePolicyConfig": {"storageLayout": "V2"},
        "contents": contents,
    }  # fmt: skip
    stub.uploads[f"/upload/manifest/{identifier}"] = json.dumps(manifest).encode()
    stub.runs[run] = {"project": "ade20k"}
    stub.artifacts[identifier] = {
        "id": identifier, "name": f"ledger-{run}", "type": "ledger", "version": 0, "metadata": {"run": "my run/../x"},
        "run": run, "aliases": ["latest"], "digest": hashlib.md5(repr(files).encode()).hexdigest(), "state": "COMMITTED",
        "project": "ade20k", "used_by": [], "manifest": manifest,
    }  # fmt: skip


def refusal(spec: str) -> str:
    with pytest.raises(HarnessError) as raised:
        pull_run(spec)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_pulled_run_is_the_run(logged: str, local: Path, stub: StubServer, tmp_path: Path) -> None:
    folder = pull_run(logged)
    assert folder.is_relative_to(tmp_path / "cache/wandb" / ENTITY / "ade20k/r1")
    assert folder.name == "my-run-..-x"  # what tables call it: the run's name, made harmless
    pulled, here = load_run(folder), load_run(local)
    assert (pulled.ledger_hash, pulled.metrics, pulled.config) == (here.ledger_hash, here.metrics, here.config)
    before = len(stub.calls)
    assert pull_run(logged) == folder
    assert "GetArtifactMembershipFileUrls" not in [name for name, _ in stub.calls[before:]]  # it is there already
    assert stub.unknown == []


@pytest.mark.parametrize(
    "spec",
    ["wandb:", "wandb:a/b", "wandb:a/b/c/d", "wandb:a/../c", "wandb:a//c", "wandb:a/b/c d", "a/b/c", "wandb:a/b/.."],
)
def test_bad_addresses(spec: str) -> None:
    assert "expected wandb:entity/project/run_id" in refusal(spec)


def test_a_good_address() -> None:
    assert parse_spec("wandb:my-team/ade.20k/4e55f6fd944c") == ("my-team", "ade.20k", "4e55f6fd944c")


def test_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", "/nowhere")
    assert "no key of W&B. Set WANDB_API_KEY or run `wandb login`" in refusal("wandb:a/b/c")


def test_a_wrong_key(logged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert "W&B does not accept the key" in refusal(logged)


def test_no_such_run(logged: str) -> None:
    assert "W&B has no such run" in refusal(f"wandb:{ENTITY}/ade20k/other")
    assert "W&B has no such run" in refusal("wandb:nobody/ade20k/r1")


def test_a_run_without_ledger(stub: StubServer) -> None:
    stub.runs["r2"] = {"project": "ade20k"}
    assert "this run has no artifact ledger-r2: it failed" in refusal(f"wandb:{ENTITY}/ade20k/r2")


def test_a_server_that_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "W&B does not answer" in refusal("wandb:a/b/c")


def test_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_pull, "_TIMEOUT_S", 1)
    with hang() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        assert "W&B does not answer" in refusal("wandb:a/b/c")


@pytest.mark.parametrize(
    "name", ["../evil", "ledger/../../evil.parquet", "/etc/x.parquet", "ledger/.x.parquet", "code.py"]
)
def test_other_files_are_refused(stub: StubServer, name: str, tmp_path: Path) -> None:
    put(stub, "r3", {name: b"evil", "manifest.json": b"{}"})
    message = refusal(f"wandb:{ENTITY}/ade20k/r3")
    assert "which is not a ledger file. Nothing was downloaded" in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_references_are_refused(stub: StubServer) -> None:
    put(stub, "r4", {"manifest.json": b"{}"}, ref="file:///etc/passwd")
    assert "which is not a ledger file" in refusal(f"wandb:{ENTITY}/ade20k/r4")


@given(st.text(st.sampled_from("./\\ledgrmanifst.jopquc-_~ \n\0"), max_size=40))
def test_accepted_names_stay_inside(name: str) -> None:
    try:
        refuse_other_files("x", [(name, None)])
    except HarnessError:
        return
    path = PurePosixPath(name)
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert "\\" not in name
    assert "\n" not in name


def test_a_damaged_ledger_is_refused(stub: StubServer, local: Path) -> None:
    files = files_of(local)
    (name,) = [n for n in files if n.endswith(".parquet")]
    put(stub, "r5", files | {name: files[name][:-200] + bytes(200)})
    assert "damaged" in refusal(f"wandb:{ENTITY}/ade20k/r5")


def test_a_ledger_of_another_run_is_refused(stub: StubServer, local: Path) -> None:
    manifest = json.loads((local / "manifest.json").read_text())
    manifest["ledger"]["sha256"] = "0" * 64
    put(stub, "r6", files_of(local) | {"manifest.json": json.dumps(manifest).encode()})
    assert "not what the run has written" in refusal(f"wandb:{ENTITY}/ade20k/r6")


# the saved view


def test_a_view_has_the_documented_columns(stub: StubServer, local: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workspace", ENTITY, "ade20k", "--name", "Mine", "--json"]) == 0
    assert re.match(rf"{stub.base}/{ENTITY}/ade20k\?nw=\w+$", json.loads(capsys.readouterr().out)["url"])
    (view,) = stub.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "ade20k", "Mine")
    spec = json.loads(view["spec"])
    (runs,) = spec["section"]["runSets"]
    columns = runs["runFeed"]["columnOrder"]
    assert columns[1:] == list(wandb_workspace.COLUMNS)
    assert runs["sort"]["keys"] == [{"key": {"section": "summary", "name": "mIoU"}, "ascending": False}]
    names = re.findall(r"^\| `([^`]+)` \|", (REPOSITORY / "docs/tracking.md").read_text(), re.MULTILINE)
    run = load_run(local)
    config = {**run.config, "provenance": {**run.manifest, "model": {**run.manifest["model"], "sha256": "0"}}}
    for column in columns[1:]:
        section, _, key = column.partition(":")
        if section == "summary":
            assert key in names, column
            continue
        first, value, *rest = key.split(".")
        assert value == "value"
        found = config[first]
        for part in rest:
            found = found[part]  # a column that no run has would be empty for ever


def test_a_view_without_its_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["workspace", ENTITY, "ade20k"]) == 2
    assert "pip install 'ade-harness[wandb]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WANDB_API_KEY", "x" * 40, "did not save the view"),
        ("WANDB_API_KEY", "", "No key of W&B"),
    ],
)
def test_a_view_that_cannot_be_saved(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setenv(variable, value)
    assert main(["workspace", ENTITY, "ade20k"]) == 2
    assert message in capsys.readouterr().err
