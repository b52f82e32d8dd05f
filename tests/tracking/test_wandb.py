"""A run in W&B: what stands in its files, what reaches a server, what a server that fails can do (nothing)."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ade_harness.cli.failures import last_error, report_failure
from ade_harness.cli.main import main
from ade_harness.config.compose import compose_config
from ade_harness.runs.finished import load_run
from ade_harness.tracking import content as wandb_content
from ade_harness.tracking import upload as wandb_upload
from ade_harness.tracking.run import read_tracking, run_id
from ade_harness.tracking.upload import upload, wandb_mode
from tests.conftest import REPOSITORY, Done, write_pair
from tests.tracking.offline_file import read_wandb
from tests.tracking.stub_server import StubServer, hang

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

IMAGES = 4


@dataclass
class Tracked:
    """A run that failed, was fixed and resumed, each time with a server there."""

    folder: Path
    failed: dict[str, Any]
    """The server's view after the failure."""
    failed_code: int

    @property
    def id(self) -> str:
        """W&B's."""
        return run_id(self.folder)


@pytest.fixture(scope="module")
def tracked(stub: StubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    work = tmp_path_factory.mktemp("tracked")
    root, rng = work / "ADEChallengeData2016", np.random.default_rng(3)
    for index in range(IMAGES):
        annotation = rng.integers(0, 151, (8, 9)).astype(np.uint8).repeat(5, 0).repeat(5, 1)
        image = rng.integers(0, 256, (40, 45, 3)).astype(np.uint8)
        write_pair(root, f"ADE_val_{1000 + index:08d}", image, annotation)
    shutil.copytree(root / "annotations/validation", work / "mine")
    path = work / "mine/ADE_val_00001001.png"
    right = np.array(Image.open(path))
    Image.fromarray(np.full_like(right, 7)).save(path)
    bad = root / "images/validation/ADE_val_00001003.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])  # its header is still there
    overrides = [
        "model=predictions", f"model.path={work / 'mine'}", "dataset=ade20k", f"dataset.root={root}",
        "runtime.workers=0", "run.overlays=2", "tracking.tags=[mine]", "tracking.project=scenes", "tracking.live=false",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("WANDB_BASE_URL", stub.base)
        patch.setenv("WANDB_API_KEY", stub.key)
        code = main([*overrides, "run.dir=run"])
        failed = {
            "alerts": list(stub.alerts), "exits": dict(stub.exits), "runs": json.loads(json.dumps(stub.runs)),
            "offline": list((work / "run/wandb").glob("offline-run-*")), "tracking": read_tracking(work / "run"),
        }  # fmt: skip
        bad.write_bytes(whole)
        assert main(["resume", "run"]) == 0
        yield Tracked(work / "run", failed, code)


@pytest.fixture(scope="module")
def summary(tracked: Tracked, stub: StubServer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(stub.run_file(tracked.id, "wandb-summary.json"))
    return content


@pytest.fixture(scope="module")
def config(tracked: Tracked, stub: StubServer) -> dict[str, Any]:
    return {k: v["value"] for k, v in json.loads(stub.runs[tracked.id]["config"]).items()}


def offline_folder(tracked: Tracked) -> Path:
    (folder,) = (tracked.folder / "wandb").glob("offline-run-*")
    return folder


def unsynced(tracked: Tracked, to: Path) -> Path:
    """Copy the offline run, as if nothing had been uploaded."""
    return Path(
        shutil.copytree(
            offline_folder(tracked),
            to / offline_folder(tracked).name,
            ignore=lambda _, names: {n for n in names if ".wandb.sync" in n},
        )
    )


# names and content


def documented() -> list[str]:
    text = (REPOSITORY / "docs/tracking.md").read_text()
    return re.findall(r"^\| `([^`]+)` \|", text.split("## Names")[1].split("\n## ")[0], re.MULTILINE)


def test_the_summary_has_the_documented_names(tracked: Tracked, summary: dict[str, Any]) -> None:
    names = {name for name in summary if not name.startswith(("_", "overlays/"))}
    metrics = json.loads((tracked.folder / "metrics.json").read_text())
    empty = {name for name in ("parameters", "flops", "flops_image", "gpu_peak_bytes") if metrics[name] is None}
    assert empty == {"parameters", "flops", "flops_image", "gpu_peak_bytes"}  # label files: there is no network
    assert names == {name for name in documented() if "<" not in name} - empty - {"calibration_error"}
    assert "calibration_error" not in metrics  # it was not asked for
    for name in wandb_content.SCORES:
        assert summary[name] == metrics[name]  # a number of that name, not {"max": number}
    assert 0 < summary["mIoU"] < 1
    assert summary["marks"].startswith("PARTIAL: 4 of 2,000")
    assert summary["status"] == "finished"
    assert summary["ledger_sha256"] == load_run(tracked.folder).ledger_hash


def test_history_has_one_step_however_often_it_was_logged(tracked: Tracked, stub: StubServer) -> None:
    lines = stub.stream[tracked.id, "wandb-history.jsonl"]
    assert list(lines) == [0]
    assert json.loads(lines[0])["mIoU"] == json.loads((tracked.folder / "metrics.json").read_text())["mIoU"]


def test_scores_are_defined_metrics(tracked: Tracked) -> None:
    (file,) = offline_folder(tracked).glob("*.wandb")
    defined = {r.metric.name for r in read_wandb(file) if r.WhichOneof("record_type") == "metric"}
    assert defined == set(wandb_content.SCORES)


def test_runs_can_be_grouped_and_filtered(tracked: Tracked, stub: StubServer, config: dict[str, Any]) -> None:
    run = stub.runs[tracked.id]
    assert (run["project"], run["groupName"], run["jobType"], run["displayName"]) == (
        "scenes", "predictions", "evaluate", "run",
    )  # fmt: skip
    assert run["tags"] == ["mine", "ade20k", config["inference"]["name"], "partial", "not the official images"]
    assert config["dataset"]["split"] == "validation"
    assert config["provenance"]["ledger"]["images"] == IMAGES
    assert "distributions" not in config["provenance"]["environment"]  # 90 packages are no columns
    assert not [key for key in config if "." in key]  # W&B makes dotted names of nested ones by itself


def test_tables_hold_every_class_and_image(tracked: Tracked, stub: StubServer, summary: dict[str, Any]) -> None:
    tables = {n: json.loads(stub.run_file(tracked.id, summary[n]["path"])) for n in ("per_class", "per_image")}
    assert len(tables["per_class"]["data"]) == 150
    rows = [dict(zip(tables["per_image"]["columns"], row, strict=True)) for row in tables["per_image"]["data"]]
    ledger = load_run(tracked.folder).rows
    assert [row["image_id"] for row in rows] == [row.image_id for row in ledger]
    assert [row["label_hash"] for row in rows] == [row.label_hash for row in ledger]
    assert [(row["height"], row["width"], row["valid_pixels"]) for row in rows] == [
        (40, 45, row.valid_pixels) for row in ledger
    ]
    assert [row["pixel_accuracy"] for row in rows[2:]] == [row["mIoU"] for row in rows[2:]] == [1.0, 1.0]
    assert rows[1]["pixel_accuracy"] < 0.2


def test_an_image_without_valid_pixels_has_no_score() -> None:
    nothing = np.zeros(0, np.uint8)
    row = SimpleNamespace(
        image_id="a", height=2, width=2, valid_pixels=0, ground_truth=nothing, prediction=nothing,
        pixels=nothing.astype(np.int64), seconds=0.1, rank=0, label_hash="",
    )  # fmt: skip
    (made,) = wandb_content.per_image_rows([row], 150)  # type: ignore[list-item]
    assert made["pixel_accuracy"] is made["mIoU"] is None


def test_pictures_and_the_page_are_there(tracked: Tracked, stub: StubServer, summary: dict[str, Any]) -> None:
    pictures = [value for name, value in summary.items() if name.startswith("overlays/")]
    assert len(pictures) == 2
    for value in (*pictures, summary["confusion_matrix"]):
        assert stub.run_file(tracked.id, value["path"])[:4] == b"\x89PNG"
    assert stub.run_file(tracked.id, summary["report"]["path"]) == (tracked.folder / "report.html").read_bytes()
    report = stub.artifact(f"report-{tracked.id}")
    assert (report["type"], list(report["manifest"]["contents"])) == ("report", ["report.html"])


def test_the_ledger_is_an_artifact(tracked: Tracked, stub: StubServer, summary: dict[str, Any]) -> None:
    artifact = stub.artifact(f"ledger-{tracked.id}")
    assert artifact["type"] == "ledger"
    assert artifact["run"] == tracked.id
    assert artifact["metadata"]["ledger_sha256"] == summary["ledger_sha256"]
    names = set(artifact["manifest"]["contents"])
    assert {"manifest.json", "config.yaml", "metrics.json", "per_class.csv"} < names
    for name in names:
        assert stub.uploads[f"/upload/artifact/{artifact['id']}/{name}"] == (tracked.folder / name).read_bytes()


def test_the_data_set_is_an_input_with_its_hashes(tracked: Tracked, stub: StubServer) -> None:
    artifact = stub.artifact("dataset-ade20k-validation")
    assert (artifact["type"], artifact["run"], artifact["used_by"]) == ("dataset", None, [tracked.id])
    facts = json.loads(stub.uploads[f"/upload/artifact/{artifact['id']}/dataset.json"])
    manifest = json.loads((tracked.folder / "manifest.json").read_text())["dataset"]
    assert {key: facts[key] for key in ("ids_hash", "content_hash")} == {
        key: manifest[key] for key in ("ids_hash", "content_hash")
    }
    assert "root" not in facts  # of this machine: it would make another version
    reference = artifact["manifest"]["contents"]["ADEChallengeData2016.zip"]
    assert reference["ref"].startswith("http://data.csail.mit.edu/")


def test_a_checkpoint_is_a_reference_with_its_hash(tmp_path: Path) -> None:
    import wandb

    facts = {"name": "segformer b0", "origin": "nvidia/x@abc1/model.safetensors", "sha256": "12" * 32, "weights": None}
    artifact = wandb_content._checkpoint(wandb, {"model": facts})
    assert (artifact.type, artifact.name) == ("model", "checkpoint-segformer-b0")
    entries = artifact.manifest.entries
    assert entries["model.safetensors"].ref == "https://huggingface.co/nvidia/x/resolve/abc1/model.safetensors"
    assert json.loads(Path(entries["checkpoint.json"].local_path).read_text())["sha256"] == "12" * 32
    assert wandb_content._checkpoint(wandb, {"model": {"name": "demo", "origin": "packaged"}}) is None
    other = wandb_content._checkpoint(wandb, {"model": facts | {"sha256": "34" * 32}})
    assert other.digest != artifact.digest  # the same address with another file behind it is another version


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://a.org/b.pt", "https://a.org/b.pt"),
        ("a/b@c0/d/e.bin", "https://huggingface.co/a/b/resolve/c0/d/e.bin"),
        ("packaged demo network", None),
        ("", None),
    ],
)
def test_origins_become_addresses(origin: str, expected: str | None) -> None:
    assert wandb_content.reference_of(origin) == expected


def test_a_file_is_referred_to_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "w.pt").touch()
    assert wandb_content.reference_of(str(tmp_path / "w.pt")) == (tmp_path / "w.pt").resolve().as_uri()


# failing and going on


def test_a_failed_run_is_marked_and_raises_an_alert(tracked: Tracked) -> None:
    assert tracked.failed_code == 2
    (alert,) = tracked.failed["alerts"]
    assert (alert["title"], alert["severity"], alert["runName"]) == ("run failed", "ERROR", tracked.id)
    assert "ADE_val_00001003" in alert["text"]
    assert "No score: 3 of 4 images are counted" in alert["text"]
    assert tracked.failed["exits"] == {tracked.id: 1}
    assert "failed" in tracked.failed["runs"][tracked.id]["tags"]


def test_a_resumed_run_is_the_same_run(tracked: Tracked, stub: StubServer) -> None:
    assert list(stub.runs) == [tracked.id]
    assert stub.exits == {tracked.id: 0}
    assert stub.unknown == []
    assert len(stub.alerts) == 1
    assert "failed" not in stub.runs[tracked.id]["tags"]
    assert read_tracking(tracked.folder) == tracked.failed["tracking"]
    assert read_tracking(tracked.folder)["url"].endswith(f"/scenes/runs/{tracked.id}")
    assert len(tracked.failed["offline"]) == 1
    assert offline_folder(tracked) not in tracked.failed["offline"]  # one folder to sync, which holds all there is
    assert len(list((tracked.folder / "wandb").glob("data-*"))) == 1


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"id": "../x"}', '{"id": 3}'])
def test_a_damaged_note_of_the_run_makes_a_new_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "tracking.json").write_text(content)
    made = run_id(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{12}", made)
    assert run_id(tmp_path) == made


def test_the_last_error_of_the_logs_is_found(tmp_path: Path) -> None:
    assert last_error(tmp_path) == ""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank00000.log").write_text("loading\n")
    (tmp_path / "logs/rank00001.log").write_text("error: first\nx\n\nerror: a.png: bad\nNo score.\n\nbye\n")
    assert last_error(tmp_path) == "a.png: bad\nNo score."


def test_without_tracking_a_failure_leaves_nothing(tmp_path: Path) -> None:
    printed: list[str] = []
    for overrides, folder in ((["tracking=none"], tmp_path), ([], None)):
        report_failure(compose_config(overrides), folder, "why", printed.append)
    report_failure(compose_config([]), tmp_path, "why", printed.append)  # no manifest: no run
    assert printed == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_killed_rank_is_a_failed_run(cli: Callable[..., Done], tmp_path: Path) -> None:
    done = cli(
        "dataset.limit=2", "model=custom", "model._target_=tests.tracking.killer.Killer", "runtime.workers=0",
        "runtime.accelerator=cpu", "run.dir=run", "tracking.mode=offline", PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    )  # fmt: skip
    assert done.code == 128 + signal.SIGKILL, done.err
    assert "W&B: marked as failed: " in done.err
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    records = read_wandb(file)
    (alert,) = [r.alert for r in records if r.WhichOneof("record_type") == "alert"]
    assert "was killed by SIGKILL" in alert.text
    (end,) = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


# servers that fail


def test_a_tracking_failure_loses_nothing(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(wandb, "init", broken)
    done = call("dataset.limit=2", "runtime.workers=0", "run.dir=run", "tracking.live=false")
    assert done.code == 0
    assert "W&B logging failed (RuntimeError: the disk is on fire)" in done.out.replace("\n", " ")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == 2
    assert not list((tmp_path / "run/wandb").glob("*-*"))


def test_a_server_that_is_down_leaves_an_offline_run(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("ade_harness.tracking.live._OPEN_S", 1.0)
    done = call("dataset.limit=2", "runtime.workers=0", "run.dir=run")
    assert done.code == 0, done.err
    printed = re.sub(r"\s+", "", done.out)  # a long path is broken over lines
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert "W&Bupload:Errorinitializingrun" in printed
    assert f"`wandbsync{folder}`doesitlater" in printed
    assert list(folder.glob("*.wandb"))


def test_a_server_that_never_answers_is_given_up_early(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with hang() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        start = time.monotonic()
        done = upload(unsynced(tracked, tmp_path), 60)
    assert time.monotonic() - start < 15
    assert done.url is None
    assert "Timed out" in done.problem or "deadline" in done.problem


def test_a_slow_upload_is_ended_and_nothing_stays_behind(
    tracked: Tracked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[subprocess.Popen[str]] = []
    original = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb_upload.subprocess, "Popen", start)
    with hang() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        begin = time.monotonic()
        done = upload(unsynced(tracked, tmp_path), 2)
    assert 2 <= time.monotonic() - begin < 5
    assert done == wandb_upload.Uploaded(None, "not done within tracking.timeout_s=2 seconds")
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


@pytest.mark.parametrize("page", [False, True])
def test_a_key_that_is_refused_is_named(page: bool, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    """By W&B, or by a proxy that wants a login of its own."""
    body = b"<!DOCTYPE html><html>\n<title>Log in\n first</title></html>" if page else b"user is not logged in"

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    done = call("dataset.images=2", "metrics.resamples=0", "runtime.workers=0", "tracking.live=false", "run.dir=run")
    server.shutdown()
    assert done.code == 0
    printed = " ".join(done.out.split())
    if page:
        assert "a page (Log in first) came instead of W&B's answer: WANDB_BASE_URL is another server" in printed, (
            printed
        )
    else:
        assert f"(it was asked with the key for {address} from WANDB_API_KEY: `wandb login --relogin`" in printed, (
            printed
        )
    assert "0" * 40 not in printed


def test_a_server_that_refuses_an_artifact_is_reported(
    tracked: Tracked, stub: StubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", stub.base)
    monkeypatch.setenv("WANDB_API_KEY", "wrong" * 8)
    done = upload(unsynced(tracked, tmp_path), 120)
    assert done.url is None
    assert done.problem


def no_settings(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder / "config"))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("word", ["offline", "disabled", "online"])
@pytest.mark.parametrize("place", ["user", "directory"])
def test_settings_files_are_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word: str, place: str) -> None:
    """`wandb offline` and `wandb disabled` write them."""
    no_settings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    folder = tmp_path / ("config" if place == "user" else "wandb")
    folder.mkdir()
    (folder / "settings").write_text(f"[default]\nmode = {word}\n")
    assert wandb_mode(None) == word
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode(None) == "offline"


def test_a_mode_that_cannot_be_understood_keeps_results_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_settings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.warns(UserWarning, match="W&B: offline, since its mode is invalid: 'of'"):
        assert wandb_mode(None) == "offline"


@pytest.mark.parametrize(
    ("configured", "variables", "expected"),
    [
        (None, {}, "offline"),
        (None, {"WANDB_API_KEY": "k"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        (None, {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {"WANDB_MODE": "disabled"}, "online"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "OffLine "}, "offline"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "DISABLED"}, "disabled"),
        (None, {"WANDB_API_KEY": "k", "WANDB_MODE": "run"}, "online"),
        (None, {"WANDB_MODE": "online"}, "offline"),  # there is no key
        (None, {"WANDB_API_KEY": "k", "WANDB_DISABLED": "True"}, "disabled"),
        (None, {"WANDB_API_KEY": "k", "WANDB_DISABLED": "false"}, "online"),
    ],
)
def test_modes(
    configured: str | None, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_settings(monkeypatch, tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(configured) == expected


def test_a_settings_file_that_wandb_refuses_keeps_results_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """W&B leaves out all of such a file, also a mode that stands in it."""
    no_settings(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    folder = tmp_path / "config"
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder))
    assert wandb_upload.wandb_mode(None) == "online"
    (folder / "settings").write_text("[default]\nignore_globs = a,b\n")
    assert wandb_upload.wandb_mode(None) == "online"
    (folder / "settings").write_text("[default]\ndisabled = true\nmode = offline\n")
    with pytest.warns(UserWarning, match="offline, since its mode is invalid: disabled: "):
        assert wandb_upload.wandb_mode(None) == "offline"
    (folder / "settings").write_text("[default]\nx_extra_http_headers = Bearer-secret\n")

    def refused() -> None:
        import wandb

        wandb.Settings(x_extra_http_headers="Bearer-secret")

    for asked in (lambda: wandb_upload.wandb_mode(None), wandb_upload.user_settings):
        if asked is wandb_upload.user_settings:
            monkeypatch.setattr(wandb_upload, "_settings_of_files", refused)
        with pytest.warns(UserWarning, match="x_extra_http_headers: ") as warned:
            asked()
        assert "secret" not in " ".join(str(one.message) for one in warned)


def test_settings_that_cannot_be_understood_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert wandb_upload.user_settings().project == "mine"
    monkeypatch.setenv("WANDB_PROJECT", "a/b?c")  # no name that W&B takes
    monkeypatch.setenv("WANDB_NOTES", "why")
    with pytest.warns(UserWarning, match="W&B: WANDB_PROJECT is invalid and ignored"):
        assert wandb_upload.user_settings() == wandb_upload.UserSettings(notes="why")
    monkeypatch.setenv("WANDB_TAGS", "x" * 65 + ", ok,,ok")  # 64 characters are W&B's bound
    monkeypatch.setenv("WANDB_BASE_URL", "nowhere")
    monkeypatch.setenv("WANDB_CONSOLE", "")
    with pytest.warns(UserWarning, match="WANDB_PROJECT is invalid"):
        assert wandb_upload.user_settings().tags == ("x" * 64, "ok")
    bad, before = {"WANDB_PROJECT", "WANDB_CONSOLE", "WANDB_BASE_URL"}, dict(os.environ)
    with pytest.warns(UserWarning, match="W&B: WANDB_PROJECT is invalid and ignored"), wandb_upload.limits():
        assert not bad & os.environ.keys()  # wandb.init would read them too, and fail
        assert os.environ["WANDB_TAGS"] == f"{'x' * 64},ok"
    assert dict(os.environ) == before
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "soon-secret")
    monkeypatch.setenv("WANDB_SILENT", "")
    with pytest.warns(UserWarning, match="WANDB_HTTP_TIMEOUT is invalid") as warned, wandb_upload.limits():
        assert (os.environ["WANDB_HTTP_TIMEOUT"], os.environ["WANDB_SILENT"]) == ("8", "true")  # ours, as if unset
    assert not any("secret" in str(one.message) for one in warned)  # a value may be a header with a key
    monkeypatch.delenv("WANDB_HTTP_TIMEOUT")
    with pytest.warns(UserWarning, match="W&B: WANDB_PROJECT is invalid and ignored"):
        given = wandb_upload.environment()  # of the process that speaks with the server
    assert bad & given.keys() == {"WANDB_BASE_URL"}  # or results would go to another one
    assert given["WANDB_TAGS"] == f"{'x' * 64},ok"


def test_the_reason_of_a_failed_upload_is_no_name_of_a_log() -> None:
    output = (
        "wandb: ERROR Find detailed error logs at: /tmp/debug-cli.root.log.\n"
        "Error: WANDB_API_KEY invalid: API key must have 40+ characters, has 5.\n"
    )
    assert wandb_upload._complaint(output).startswith("Error: WANDB_API_KEY invalid")


def run_record(folder: Path) -> Any:
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    (started,) = [record.run for record in read_wandb(file) if record.HasField("run")]
    return started


@pytest.mark.slow
def test_wandbs_own_variables_and_files_are_honoured(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (
        "dataset.images=2",
        "metrics.resamples=0",
        "runtime.workers=0",
        "run.overlays=0",
        "run.report=false",
        "tracking.mode=offline",
    )
    config = tmp_path / "config"
    config.mkdir()
    (config / "settings").write_text("[default]\nproject = of-the-file\n")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(config))
    assert call(*overrides, "run.dir=file").code == 0
    found = run_record(tmp_path / "file")
    assert (found.project, found.display_name, found.run_group) == ("of-the-file", "file", "demo")
    for name, value in {
        "PROJECT": "mine", "NAME": "a name", "RUN_GROUP": "night", "TAGS": "first,second", "NOTES": "some words",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert call(*overrides, "run.dir=one", "tracking.tags=[own]").code == 0
    found = run_record(tmp_path / "one")
    assert (found.project, found.display_name, found.run_group) == ("mine", "a name", "night")
    assert found.notes == "some words"
    assert {"own", "first", "second", "demo"} <= set(found.tags)
    assert call(*overrides, "run.dir=two", "tracking.project=ours", "tracking.group=day").code == 0
    found = run_record(tmp_path / "two")
    assert (found.project, found.run_group) == ("ours", "day")  # what is configured goes first
