"""A W&B run that is open while its evaluation works, and a score that is added to another run."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from wandb.errors import CommError

from ade_harness.config.compose import compose_config
from ade_harness.errors import HarnessError
from ade_harness.runs.directory import PROGRESS
from ade_harness.runs.progress import read_losses
from ade_harness.tracking import live as module
from ade_harness.tracking import session
from ade_harness.tracking.attaching import NoSuchRunError, require_attachable
from ade_harness.tracking.content import CurveContent, FailedContent
from ade_harness.tracking.live import LiveRun
from ade_harness.tracking.run import _write, log_curve, read_tracking, run_id
from ade_harness.tracking.session import Follower, Start, progress_row
from ade_harness.tracking.upload import upload
from ade_harness.tracking.wandb_run import Entry
from tests.conftest import Done
from tests.tracking.stub_server import StubServer, hang
from tests.warm import WarmPopen

pytestmark = pytest.mark.slow  # each has a process of its own

OVERRIDES = ("dataset.images=4", "metrics.resamples=0", "runtime.workers=0", "run.report=false")


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start sessions in processes that have imported wandb."""
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": WarmPopen}))


@pytest.fixture
def online(stub: StubServer, monkeypatch: pytest.MonkeyPatch) -> StubServer:
    monkeypatch.setenv("WANDB_BASE_URL", stub.base)
    monkeypatch.setenv("WANDB_API_KEY", stub.key)
    monkeypatch.setattr(module, "_OPEN_S", 60.0)  # a busy machine starts wandb slowly
    return stub


def history(stub: StubServer, run: str) -> list[dict[str, Any]]:
    lines = stub.stream[run, "wandb-history.jsonl"]
    assert list(lines) == list(range(len(lines)))  # none is written twice, none is missing
    return [json.loads(line) for line in lines.values()]


def wait(holds: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def entry_of(folder: Path, job_type: str = "evaluate") -> Entry:
    folder.mkdir(exist_ok=True)
    return Entry(folder, job_type, "group", ("first",), {"model": {"name": "m"}})


@pytest.fixture
def evaluated(online: StubServer, call: Callable[..., Done], tmp_path: Path) -> tuple[Done, Path]:
    done = call(*OVERRIDES, "run.dir=run", "run.overlays=2")
    assert done.code == 0, done.err
    return done, tmp_path / "run"


def test_a_run_is_open_from_its_beginning_and_ends_as_the_same_run(
    evaluated: tuple[Done, Path], online: StubServer
) -> None:
    done, folder = evaluated
    metrics = json.loads((folder / "metrics.json").read_text())
    identifier = run_id(folder)
    rows = history(online, identifier)
    assert rows[-1]["mIoU"] == metrics["mIoU"]
    assert sum("mIoU" in row for row in rows) == 1
    assert online.exits[identifier] == 0
    config = {k: v["value"] for k, v in json.loads(online.runs[identifier]["config"]).items()}
    assert config["model"]["name"] == "demo"
    assert config["provenance"]["status"] == "finished"  # of the manifest at the end, not at the beginning
    assert online.runs[identifier]["tags"] == ["demo", "original_size"]
    assert read_tracking(folder) == {"id": identifier, "url": f"{online.base}/team/ade20k/runs/{identifier}"}
    assert done.out.count(f"/runs/{identifier}") >= 1
    assert not list((folder / "wandb").glob("offline-run-*"))  # one kind of W&B files in a run directory
    assert not online.unknown


def test_masks_can_be_shown_and_hidden(evaluated: tuple[Done, Path], online: StubServer) -> None:
    _, folder = evaluated
    row = history(online, run_id(folder))[-1]
    pictures = {k.removeprefix("overlays/"): v for k, v in row.items() if k.startswith("overlays/")}
    assert len(pictures) == 2
    for image_id, picture in pictures.items():
        assert set(picture["masks"]) == {"prediction", "truth"}
        kept = np.load(folder / "overlays" / f"{image_id}.npz")
        assert kept["image"].shape == (picture["height"], picture["width"], 3)
        assert kept["truth"].shape == kept["prediction"].shape == kept["image"].shape[:2]
    config = json.loads(online.runs[run_id(folder)]["config"])
    text = json.dumps(config["_wandb"])
    assert "void (no class)" in text
    assert "not counted" in text
    assert "wall" in text


def test_a_run_that_goes_on_goes_on_in_its_history(
    evaluated: tuple[Done, Path], online: StubServer, call: Callable[..., Done]
) -> None:
    _, folder = evaluated
    before = history(online, run_id(folder))
    assert call("resume", "run").code == 0
    after = history(online, run_id(folder))
    assert after[: len(before)] == before
    assert after[-1]["mIoU"] == before[-1]["mIoU"]
    assert after[-1]["_step"] > before[-1]["_step"]


PROGRESS_OF_3 = {
    "done": 3, "images": 8, "images_per_second": 1.5, "seconds_left": 3.0, "warnings": [], "ranks": [],
    "updated": "2026-01-01T00:00:00+00:00",
}  # fmt: skip


class OpenRun:
    """What is logged to it."""

    step = 0

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int | None]] = []

    def define_metric(self, name: str, summary: str) -> None:
        assert (name, summary) == ("progress/*", "none")

    def log(self, row: dict[str, float], step: int | None = None, commit: bool = False) -> None:
        assert commit  # else wandb keeps the row until the next one
        self.rows.append((row, step))


@pytest.fixture
def following(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, OpenRun]]:
    """A session's loop in a thread, over an empty run directory."""
    folder, run, inbox = tmp_path / "run", OpenRun(), queue.Queue[Any]()
    start = Start(compose_config([]).tracking, entry_of(folder, request.param), "id", 1, 0.02)
    thread = threading.Thread(target=session._follow, args=(run, start, inbox))
    thread.start()
    yield folder, run
    inbox.put(None)
    thread.join()


@pytest.mark.parametrize("following", ["evaluate"], indirect=True)
def test_progress_and_logs_are_shown_while_it_works(
    following: tuple[Path, OpenRun], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = following
    (folder / "logs").mkdir()
    log = folder / "logs/rank0.log"
    log.write_text("a warning of mine\n")
    (folder / PROGRESS).write_text(json.dumps(PROGRESS_OF_3))
    wait(lambda: run.rows)
    with log.open("a") as file:
        file.write("another one\n")
    (folder / PROGRESS).write_text('{"done": 4, "ima')  # being written
    time.sleep(0.1)
    (folder / PROGRESS).write_text(json.dumps(PROGRESS_OF_3 | {"done": 5}))
    wait(lambda: len(run.rows) == 2)
    assert [(row["progress/done"], step) for row, step in run.rows] == [(3, None), (5, None)]
    printed = ""

    def text() -> str:
        nonlocal printed
        printed += capsys.readouterr().out
        return printed

    wait(lambda: "5 of 8, 1.50/s, 0:03 left" in text())
    assert printed.count("rank0: a warning of mine") == printed.count("rank0: another one") == 1


@pytest.mark.parametrize("following", ["probe"], indirect=True)
def test_losses_of_a_training_come_as_they_are_made(following: tuple[Path, OpenRun]) -> None:
    folder, run = following
    (folder / PROGRESS).write_text(json.dumps(PROGRESS_OF_3))  # without a step: it would take that of a loss
    rows = "".join(f'{{"step": {step}, "loss": {1 / step}}}\n' for step in (1, 10))
    (folder / "loss.jsonl").write_text(rows + '{"step": 20, "lo')  # being written
    time.sleep(0.1)
    (folder / "loss.jsonl").write_text(rows + '{"step": 20, "loss": 0.05}\n')
    wait(lambda: len(run.rows) == 3)
    assert run.rows == [({"loss": 1.0}, 1), ({"loss": 0.1}, 10), ({"loss": 0.05}, 20)]


def test_what_a_server_gets_while_it_works(
    evaluated: tuple[Done, Path], online: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.1)
    _, folder = evaluated
    (folder / PROGRESS).write_text(json.dumps(PROGRESS_OF_3))
    opened: list[str] = []
    entry = entry_of(folder)
    live = LiveRun(compose_config([]).tracking, entry, "live-progress", opened.append)
    wait(live._begun.is_set)
    time.sleep(3)  # several looks
    monkeypatch.setattr(module, "EVERY_S", 600.0)
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "logs/rank00000.log").write_text("the last words of a rank\n")
    assert live.end(FailedContent(entry, "an image"), 120).problem == ""
    assert opened == [f"{online.base}/team/ade20k/runs/live-progress"]
    [row] = history(online, "live-progress")
    assert row["progress/done"] == 3
    metrics = json.loads((folder / "metrics.json").read_text())
    assert row["progress/pixel_accuracy"] == metrics["pixel_accuracy"]  # of what is in the ledger
    assert row["progress/images_per_second"] == 1.5
    assert "the last words of a rank" in str(online.stream["live-progress", "output.log"])
    assert "3 of 8, 1.50/s, 0:03 left" in str(online.stream["live-progress", "output.log"])
    assert online.exits["live-progress"] == 1
    assert online.alerts[-1]["runName"] == "live-progress"
    summary = json.loads(online.run_file("live-progress", "wandb-summary.json"))
    assert summary["reason"] == "an image"
    assert not [name for name in summary if name.startswith("progress/")]
    assert "system.proc.memory.rssMB" in str(online.stream["live-progress", "wandb-events.jsonl"])


def test_a_training_ends_with_the_losses_that_are_missing(online: StubServer, tmp_path: Path) -> None:
    entry = entry_of(tmp_path / "probe", "probe")
    losses = tuple({"step": step, "loss": 1.0 / step} for step in (1, 10, 20))
    for rows in (losses[:2], losses):
        live = LiveRun(compose_config([]).tracking, entry, "live-probe")
        assert live.end(CurveContent(entry, rows), 120).problem == ""
    assert [(row["_step"], row["loss"]) for row in history(online, "live-probe")] == [
        (row["step"], row["loss"]) for row in losses
    ]


def test_what_is_new_in_a_directory_is_given_once(tmp_path: Path) -> None:
    follower = Follower(tmp_path, 0)
    assert list(follower.rows()) == []
    (tmp_path / "loss.jsonl").write_text('{"step": 4, "loss": 2.5, "mean_loss": 3.0}\n')
    assert list(follower.rows()) == [({"loss": 2.5, "mean_loss": 3.0}, 4)]
    assert list(follower.rows()) == []
    assert read_losses(tmp_path, -1)[0]["step"] == 4
    assert list(Follower(tmp_path, 5).rows()) == []  # an earlier session has logged it
    empty = {"done": 0, "images": 8, "images_per_second": 0.0, "seconds_left": None}
    assert progress_row(tmp_path, empty) == {"progress/done": 0, "progress/images_per_second": 0.0}


def test_a_rank_that_is_killed_ends_its_run(online: StubServer, tmp_path: Path) -> None:
    """W&B shows a run that may go on; no process stays."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from ade_harness.config.compose import compose_config\n"
        "from ade_harness.tracking.live import LiveRun; from ade_harness.tracking.wandb_run import Entry\n"
        "live = LiveRun(compose_config([]).tracking, Entry(Path(sys.argv[1]), 'evaluate', None, (), {}), 'live-killed')\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "killed").mkdir()
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")])
    wait(lambda: "live-killed" in online.runs)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert online.exits["live-killed"] == 1


def test_a_server_that_hangs_costs_seconds_and_no_result(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPEN_S", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "1")
    with hang() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        begin = time.monotonic()
        done = call(*OVERRIDES, "run.dir=run", "tracking.timeout_s=3", "run.overlays=0")
    assert time.monotonic() - begin < 40
    assert done.code == 0
    assert "doesitlater" in "".join(done.out.split())
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1
    assert not [p for p in psutil.Process().children(recursive=True) if "tracking.session" in str(p.cmdline())]


def test_a_server_that_goes_away_leaves_a_run_to_be_uploaded_later(
    online: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = compose_config(["tracking.timeout_s=2"]).tracking
    entry = entry_of(tmp_path / "run")
    live = LiveRun(cfg, entry, run_id(entry.folder))
    wait(live._begun.is_set)
    monkeypatch.setattr(online, "refuse", lambda _: 503)
    begin = time.monotonic()
    with pytest.warns(
        UserWarning, match=r"not done within tracking\.timeout_s=2 seconds\. `wandb sync .*` does it later"
    ):
        where = log_curve(cfg, entry.folder, [{"step": 0, "loss": 1.0}], {}, live)
    assert time.monotonic() - begin < 8
    assert where is not None
    monkeypatch.setattr(online, "refuse", lambda _: None)
    assert upload(Path(where), 120).url == f"{online.base}/team/ade20k/runs/{run_id(entry.folder)}"
    assert history(online, run_id(entry.folder))[-1]["loss"] == 1.0


def test_a_run_that_is_not_open_in_time_says_so(
    online: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPEN_S", 0.0)
    entry = entry_of(tmp_path / "run")
    ended = LiveRun(compose_config([]).tracking, entry, "live-late").end(FailedContent(entry, "an image"), 30)
    assert ended.problem == "not open within 0 seconds"  # it may be a moment later: then its address is known


def test_nothing_is_imported_from_a_directory_that_somebody_else_has_written(
    online: StubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = entry_of(tmp_path / "run")
    for name in ("yaml", "wandb", "json"):
        (entry.folder / f"{name}.py").write_text("import os, pathlib\npathlib.Path('was_imported').touch()\n")
    monkeypatch.setattr(module, "subprocess", subprocess)  # as it is started
    monkeypatch.chdir(entry.folder)
    content = CurveContent(entry, ({"step": 0, "loss": 1.0},))
    assert LiveRun(compose_config([]).tracking, entry, "live-clean").end(content, 120).problem == ""
    offline = _write(compose_config([]).tracking, entry, content)
    assert upload(offline, 120).problem == ""
    assert not list(tmp_path.rglob("was_imported"))


def test_what_fails_at_the_beginning_costs_no_work(
    online: StubServer, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(module.subprocess, "Popen", refused)
    done = call(*OVERRIDES, "run.dir=run", "run.overlays=0")
    assert done.code == 0
    assert "W&B: not open yet: no more processes" in done.out


def test_a_variable_that_wandb_refuses_costs_only_itself(
    online: StubServer, call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"WANDB_TAGS": f"{'x' * 65}, a,,", "WANDB_NOTES": "why", "WANDB_QUIET": "maybe", "WANDB_NAME": ""}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    done = call(*OVERRIDES, "run.dir=run", "run.overlays=0")
    assert done.code == 0, done.err
    assert done.out.count("W&B: WANDB_QUIET is invalid and ignored") in (1, 2)  # at the beginning, at the end
    run = online.runs[read_tracking(tmp_path / "run")["id"]]
    assert run["notes"] == "why"
    assert {"x" * 64, "a"} <= set(run["tags"])  # 64 characters are W&B's bound
    assert {key: os.environ[key] for key in given} == given


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("WANDB_TAGS", "nightly,a100,", ""), ("WANDB_TAGS", "", ""), ("WANDB_BASE_URL", "", ""),
        ("WANDB_PROJECT", "a/b:c", "W&B: WANDB_PROJECT is invalid and ignored: Invalid project name 'a/b:c'"),
        ("WANDB_CONSOLE", "nope", "W&B: WANDB_CONSOLE is invalid and ignored"),
    ],
)  # fmt: skip
def test_an_odd_variable_costs_no_offline_run(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, message: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(key, value)
    done = call("dataset.images=2", "runtime.workers=0", "run.dir=run", "run.overlays=0")
    assert done.code == 0, done.err
    assert [line for line in done.out.splitlines() if line.startswith("W&B:")][-1].endswith(
        str(next((tmp_path / "run/wandb").glob("offline-run-*")))
    )
    assert message in done.out
    assert ("invalid" in done.out) == bool(message)
    assert os.environ[key] == value


# a score that is added to the run of a training


@pytest.fixture
def training(online: StubServer, tmp_path: Path) -> Iterator[str]:
    """A run with 3 losses, whose process has ended."""
    folder = tmp_path / "training"
    entry = Entry(folder, "train", "mine", ("kept",), {"lr": 0.1})
    folder.mkdir()
    identifier = f"train{os.getpid()}-{len(online.runs)}"
    live = LiveRun(compose_config([]).tracking, entry, identifier)
    losses = tuple({"step": step, "loss": 3.0 - step} for step in range(3))
    assert live.end(CurveContent(entry, losses), 120).problem == ""
    yield identifier


def test_a_score_is_added_to_a_training_at_its_step(
    training: str, online: StubServer, call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_OPEN_S", 0.0)  # how long a live run is waited for: this one has no other way
    before, known = history(online, training), json.loads(online.runs[training]["config"])
    online.exits[training] = 255  # crashed: adding a score does not make it finished
    done = call(*OVERRIDES, "run.dir=run", f"tracking.run_id={training}", "tracking.step=1")
    assert done.code == 0, done.err
    assert f"/runs/{training}" in done.out, done.out
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    rows = history(online, training)
    assert rows[:-1] == before
    added = rows[-1]
    assert added["demo/mIoU"] == metrics["mIoU"]
    assert added["demo/step"] == 1
    assert added["demo/images"] == 4
    assert added["demo/marks"].startswith("DEMO")
    assert added["_step"] == 3
    now = json.loads(online.runs[training]["config"])
    assert now["lr"] == known["lr"]  # its own configuration stays
    assert "model" not in now
    assert online.runs[training]["tags"] == ["kept"]
    assert online.exits[training] == 255
    assert online.artifact(f"ledger-{training}")["metadata"]["images"] == 4
    assert read_tracking(tmp_path / "run")["id"] != training  # the run directory is no part of the training's


def test_a_run_that_is_not_there_or_still_runs_gets_nothing(
    training: str, online: StubServer, call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = call(*OVERRIDES, "run.dir=run", "tracking.run_id=nowhere", "run.overlays=0")
    assert done.code == 2  # before the work begins
    assert "tracking.run_id=nowhere: W&B has no run ade20k/nowhere" in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()
    assert call(*OVERRIDES, "run.dir=run", "run.overlays=0").code == 0
    monkeypatch.setitem(online.runs[training], "state", "running")
    before = history(online, training)
    done = call("resume", "run", f"tracking.run_id={training}")
    assert done.code == 0
    printed = " ".join(done.out.split())
    assert "that run is still running" in printed
    assert "tries it again" in printed
    assert history(online, training) == before


@pytest.mark.parametrize(
    ("error", "is_missing"),
    [
        (ValueError("Could not find run <Run team/ade20k/abc (not found)>"), True),
        (CommError("Could not find project ade20k"), True),
        (CommError("Post http://127.0.0.1:14041/graphql: dial tcp 127.0.0.1:14041: connection refused"), False),
        (ValueError("1 validation error for Settings: base_url"), False),
        (CommError("host wandb.not found.example: 404 of a proxy"), False),
    ],
)
def test_only_a_run_that_is_missing_ends_what_has_not_begun(
    error: Exception, is_missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def api(**options: Any) -> Any:
        asked.append(options)
        raise error

    monkeypatch.setattr("wandb.Api", api)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    cfg = compose_config(["tracking.run_id=abc", "tracking.mode=online"]).tracking
    require_attachable(cfg, ask=False)  # another rank has asked
    assert not asked
    if is_missing:
        with pytest.raises(NoSuchRunError, match="tracking.run_id=abc: W&B has no run ade20k/abc"):
            require_attachable(cfg)
    else:
        require_attachable(cfg)
    assert len(asked) == 1


def test_a_server_that_is_away_at_the_beginning_may_be_back_at_the_end(
    online: StubServer, call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    done = call(*OVERRIDES, "run.dir=run", "tracking.run_id=abc", "run.overlays=0")
    assert done.code == 0, done.err
    assert "`resume run` tries it again" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tracking.step=3"], "tracking.step: is the step of the run tracking.run_id"),
        (["tracking.run_id=a/b"], "tracking.run_id=a/b: expected the id of a W&B run"),
        (["tracking.run_id=abc", "tracking=none"], "tracking.run_id: needs tracking=wandb"),
        (["tracking.run_id=abc", "tracking.mode=offline"], "a score can be added to a run only online"),
        (["tracking.run_id=abc", "tracking.step=-1"], "tracking.step=-1"),
    ],
)
def test_mistakes_are_found_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(HarnessError) as raised:
        compose_config(overrides)
    assert message in str(raised.value)


def test_without_a_key_nothing_can_be_added(call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRC", "/nowhere")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = call(*OVERRIDES, "tracking.run_id=abc", "run.dir=run")
    assert done.code == 2
    assert "can be added to a run only online, and W&B is offline" in done.err
    assert not Path("run").exists()
