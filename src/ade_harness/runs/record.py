"""config.yaml and manifest.json: a run directory alone says what was run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ade_harness.config.plain import flatten
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_json, write_text
from ade_harness.files.documents import MAX_TEXT_BYTES, checked, damaged, parse_yaml, yaml_text
from ade_harness.files.reading import read_regular
from ade_harness.metrics.counts import Row, hash_rows
from ade_harness.runs.directory import MANIFEST, PROBE, SCHEMA_VERSION, differences, is_new, make_run_dir, read_manifest
from ade_harness.runs.lock import RunLock
from ade_harness.runs.provenance import code_state, command_line, computing_packages, distributions, environment
from ade_harness.runs.shapes import CONFIG
from ade_harness.runs.trust import is_signed, signature

_HOW_TO_ASK = ("timeout_s", "retries", "concurrency", "token_env")
"""Fields of ``model.http``: they change no label, so a run may be continued with others."""


@dataclass
class RunRecord:
    """The record of one run, held by rank 0."""

    path: Path
    manifest: dict[str, Any]
    lock: RunLock

    def leave(self, status: str, failures: Mapping[str, str]) -> None:
        """Note an end without a score: ``incomplete``, and which images failed why."""
        self.manifest.update(status=status, finished=_now(), failures=dict(failures))
        write_json(self.path / MANIFEST, self.manifest)

    def add_changes(self, changes: Sequence[str]) -> None:
        """Note in the manifest, at once, what was found to differ while the run was continued, and mark the run."""
        before = self.manifest.get("changes", [])
        found = [*before, *(change for change in changes if change not in before)]
        marks = [mark for mark in self.manifest["marks"] if not is_mixed(mark)]
        self.manifest.update(changes=found, marks=[*marks, mixed_mark(found)])
        write_json(self.path / MANIFEST, self.manifest)

    def finish(
        self, rows: Sequence[Row], timings: Mapping[str, Any], marks: Sequence[str], failures: Mapping[str, str]
    ) -> None:
        """Note the end: timings, images that were skipped and why, and a hash of everything that was read.

        The timings are those of the last session that evaluated an image: one that found all of them done has none.
        """
        digest = hashlib.sha256()
        for row in rows:
            digest.update(f"{row.image_id} {row.all_files}\n".encode())
        self.manifest["dataset"]["content_hash"] = digest.hexdigest()
        self.manifest["ledger"] = {"images": len(rows), "sha256": hash_rows(rows)}
        self.manifest.update(status="finished", finished=_now())
        predict_seconds = round(sum(row.seconds for row in rows), 3)
        before = [session["timings"] for session in self.manifest.get("earlier", ()) if "timings" in session]
        if before and not timings["images_per_second"]:
            timings = before[-1]
        self.manifest["timings"] = {**timings, "predict_seconds": predict_seconds}
        self.manifest.update(failures=dict(failures), marks=list(marks))
        self.manifest["result_signature"] = signature(*_result(self.path, self.manifest))
        write_json(self.path / MANIFEST, self.manifest)

    def finish_training(self, loss: float, iterations: int) -> None:
        """Note the end of a training: its last loss, and its optimiser steps."""
        self.manifest.update(status="finished", finished=_now(), loss=loss, iterations=iterations)
        write_json(self.path / MANIFEST, self.manifest)


@contextmanager
def holding_lock(record: RunRecord | None) -> Iterator[None]:
    """Release a record's lock at the end; None, of the ranks that have no record, holds nothing."""
    try:
        yield
    finally:
        if record is not None:
            record.lock.release()


def short_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest without what repeats the configuration, and without each package's hash."""
    short = {key: value for key, value in manifest.items() if key not in ("identity", "repeat")}
    short["environment"] = {k: v for k, v in manifest.get("environment", {}).items() if k != "distributions"}
    return short


_LOADED = ("model.state_sha256", "model.files.", "model.config_sha256", "code.model_source")
"""What an identity says of the model in memory; runs of earlier versions do not have it."""
_LATER = ("environment.", "model.pixels_sha256")
"""What came into identities last."""
_EARLIER = ("code.commit", "code.diff_sha256")
_PART = "backbone.part"
_OF_TRAININGS = ("device", "environment.", "code.", "runtime.", _PART)
"""What the identity of a training says of what computes it, and of which weights; those of earlier versions do not."""


def start_record(
    config: dict[str, Any],
    facts: dict[str, Any],
    marks: Sequence[str],
    seeds: dict[str, int],
    say: Callable[[str], None] = lambda _: None,
    decides: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
    found: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Open and lock the run directory, and write config.yaml, code.diff and a first manifest.json.

    Args:
        config: resolved configuration.
        facts: ``model`` and ``dataset``: origins and hashes.
        marks: what the run's numbers are not.
        seeds: every seed in use.
        say: called with the reason why a start takes longer than usual.
        decides: fields of a configuration that must be equal for the run to be continued; None takes those that decide
            an evaluation's counts.
        found: what else must be equal and is no configuration (hashes), beside device and versions; None takes an
            evaluation's.

    Raises:
        HarnessError: the directory cannot be written, another job is at work in it, or it holds a run of something
            else (unless ``run.allow_changed``).
    """
    code = code_state()
    diff = code.pop("diff", "")
    decides = decides or decided_counts
    found = {**found, **_computed_by(facts, code)} if found is not None else _found(facts, code)
    now = {**decides(config), **found}
    name = f"probe-{config['model']['name']}" if facts.get("kind") == PROBE else config["model"]["name"]
    path = make_run_dir(config["run"]["dir"], config["run"]["root"], name)
    lock = RunLock(path, say)
    lock.acquire()
    try:
        before = None if is_new(path) else read_manifest(path)
        if before and "config_sha256" in before and not (path / "config.yaml").exists():
            before = None  # killed at its very start, before anything was counted
        if before and before.get("kind") != facts.get("kind"):
            held = "a probe" if before.get("kind") == PROBE else "an evaluation"
            raise HarnessError(f"run.dir={path} holds {held}. Choose another run.dir.")
        then = run_identity(path, before, decides) if before else now
        if "model.state_sha256" not in then:  # of an earlier version, which did not look at these
            then = {**{key: value for key, value in now.items() if key.startswith(_LOADED)}, **then}
        then = {**{key: value for key, value in now.items() if key.startswith(_LATER)}, **then}  # likewise
        if "code.src" in now and "code.src" not in then:  # earlier versions looked at the commit, or at conf/ too
            name = "tree" if "code.tree" in then else "commit"
            now = {**{key: value for key, value in now.items() if key != "code.src"}, f"code.{name}": code[name]}
            now["code.diff_sha256"] = code.get("diff_sha256")
        if facts.get("kind") == PROBE:
            then = {**{key: value for key, value in now.items() if key.startswith(_OF_TRAININGS)}, **then}
            if _PART in then:  # earlier versions added what else the file holds, and how it is chosen
                then[_PART] = str(then[_PART]).partition(";")[0]
        changes = differences(then, now)
        if changes and not config["run"]["allow_changed"]:
            raise HarnessError(
                f"run.dir={path} holds a run with another setup, so it is not continued. Different: "
                + "; ".join(changes[:8])
                + ". Restore these to continue this run, or choose another run.dir for a new one."
            )
        return _write_record(path, lock, config, facts, marks, seeds, code, diff, found, then, before, changes)
    except BaseException:
        lock.release()
        raise


def _write_record(
    path: Path,
    lock: RunLock,
    config: dict[str, Any],
    facts: dict[str, Any],
    marks: Sequence[str],
    seeds: dict[str, int],
    code: dict[str, Any],
    diff: str,
    found: Mapping[str, Any],
    then: Mapping[str, Any],
    before: dict[str, Any] | None,
    changes: Sequence[str],
) -> RunRecord:
    text = yaml_text(config)
    manifest: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "status": "running",
        "started": _now(),
        "command": command_line(),
        "marks": list(marks),
        "code": code,
        "seeds": seeds,
        "environment": {**environment(), "distributions": distributions()},
        **facts,
        "identity": dict(found),
        "config_sha256": _hash(text),
        "directory": str(Path.cwd()),
        "signature": signature(_hash(text), facts.get("repeat"), str(Path.cwd())),
    }
    all_changes = list(changes)
    if before is not None:
        kept = ("started", "command", "config_sha256", "timings", *(("code",) if changes else ()))
        earlier = {key: before[key] for key in kept if key in before}
        if changes:
            earlier["identity"] = dict(then)  # whole: config.yaml is about to be another
        try:  # a score is there only if the last session came to its end
            (path / "metrics.json").unlink(missing_ok=True)
        except OSError as error:
            raise HarnessError(f"{path / 'metrics.json'}: cannot be removed ({error.strerror or error}).") from error
        manifest["earlier"] = [*before.get("earlier", []), earlier]
        all_changes = [*before.get("changes", []), *(c for c in changes if c not in before.get("changes", []))]
    if all_changes:
        manifest["changes"] = all_changes
        manifest["marks"] = [*marks, mixed_mark(all_changes)]
    write_json(path / MANIFEST, manifest)  # first: from now on the directory is known as this run's
    if diff:
        write_text(path / "code.diff", diff)
    header = "".join(f"# {mark}\n" for mark in manifest["marks"])
    write_text(path / "config.yaml", header + text)
    return RunRecord(path, manifest, lock)


def is_own(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether this user has made a run: its config.yaml, the overrides that repeat it, and where it was started."""
    try:
        return _is_signed(read_regular(path / "config.yaml", MAX_TEXT_BYTES).decode("utf-8"), manifest)
    except (HarnessError, UnicodeDecodeError):
        return False


def is_own_result(path: Path, manifest: Mapping[str, Any]) -> bool:
    """Whether a finished run is this user's, and its counts, marks and model are still what it has written.

    Runs of earlier versions did not sign them: nobody can tell.
    """
    return is_own(path, manifest) and is_signed(manifest.get("result_signature"), *_result(path, manifest))


def marks_now(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the marks of a run, and one more if its result was changed after this user had signed it."""
    signed = manifest.get("status") == "finished" and manifest.get("result_signature")
    changed = bool(signed) and is_own(path, manifest) and not is_own_result(path, manifest)
    return [*(manifest.get("marks") or ()), *([_CHANGED] if changed else [])]


_CHANGED = "CHANGED: manifest.json or metrics.json is not as the run has written it"


def _result(path: Path, manifest: Mapping[str, Any]) -> list[Any]:
    """Return what a finished run's signature is of, beside its configuration: its scores too."""
    decides = {key: manifest.get(key) for key in ("ledger", "marks", "model", "dataset", "failures", "finished")}
    try:
        scores = hashlib.sha256(read_regular(path / "metrics.json", MAX_TEXT_BYTES)).hexdigest()
    except HarnessError:
        scores = None
    return ["result", json.dumps(decides, sort_keys=True), scores]


def config_and_owner(path: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the content of a run's config.yaml, and whether this user has made the run: of one reading of the file.

    Raises:
        HarnessError: it cannot be read, or is damaged.
    """
    file = path / "config.yaml"
    try:
        text = read_regular(file, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(str(file), "expected UTF-8") from error
    return checked(parse_yaml(text, str(file)), CONFIG, str(file)), _is_signed(text, manifest)


def _is_signed(text: str, manifest: Mapping[str, Any]) -> bool:
    started = [manifest["directory"]] if "directory" in manifest else []  # earlier versions did not keep it
    return is_signed(manifest.get("signature"), _hash(_body(text)), manifest.get("repeat"), *started)


def _body(text: str) -> str:
    """Return a config.yaml without the marks above it."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


_MIXED = "MIXED"


def is_mixed(mark: str) -> bool:
    """Whether a mark is that of :func:`mixed_mark`."""
    return mark.startswith(_MIXED)


def mixed_mark(changes: Sequence[str]) -> str:
    """Return the mark of a run that was continued though something had changed."""
    keys = ", ".join(dict.fromkeys(c.partition(":")[0] for c in changes[:4]))
    return f"{_MIXED}: continued with changed settings: {keys}{', ...' if len(changes) > 4 else ''}"


def decided_counts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a resolved configuration that decide the counts of an evaluation, by dotted keys."""
    kept: dict[str, Any] = {group: config[group] for group in ("model", "dataset", "inference")}
    kept["metrics"] = {"calibration": config["metrics"]["calibration"]}
    http = {k: v for k, v in config["model"].get("http", {}).items() if k not in _HOW_TO_ASK}
    kept["model"] = {**config["model"], "http": http}
    runtime = {k: config["runtime"][k] for k in ("seed", "threads", "deterministic")}
    return {**flatten(kept), **flatten({"runtime": runtime})}


def _found(facts: Mapping[str, Any], code: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else must be equal for counts of two sessions to be added up."""
    model = facts["model"]
    loaded = {
        "model.state_sha256": model.get("state_sha256"),
        **{f"model.files.{name}": digest for name, digest in model.get("files", {}).items()},
        "code.model_source": model.get("source"),
        "model.config_sha256": model.get("config_sha256"),
        "model.pixels_sha256": model.get("pixels_sha256"),
    }
    return {
        **{key: value for key, value in loaded.items() if value is not None},
        "checkpoint.sha256": model.get("sha256"),
        "checkpoint.origin": model.get("origin"),
        "dataset.ids_hash": facts["dataset"]["ids_hash"],
        "dataset.labels_hash": facts["dataset"].get("labels_hash"),
        **_computed_by(facts, code),
    }


def _computed_by(facts: Mapping[str, Any], code: Mapping[str, Any]) -> dict[str, Any]:
    """Return what computes, of evaluations and trainings alike."""
    import torch

    return {
        "device": facts["device"],
        "environment.torch": torch.__version__,
        **{f"environment.{name}": version for name, version in computing_packages().items()},
        "code.version": code["version"],
        # a commit may change prose alone; what was installed without it has no other name
        **({"code.src": code["src"]} if code.get("src") else {name: code.get(name[5:]) for name in _EARLIER}),
    }


def run_identity(
    path: Path, manifest: Mapping[str, Any], decides: Callable[[Mapping[str, Any]], dict[str, Any]] = decided_counts
) -> dict[str, Any]:
    """Return what a run directory was made with: its configuration, as far as it decides numbers, and hashes.

    Args:
        path: of the run directory.
        manifest: its content.
        decides: as of :func:`start_record`.

    Raises:
        HarnessError: config.yaml is damaged, or was edited since the run wrote it.
    """
    found: dict[str, Any] = manifest["identity"]
    if "config_sha256" not in manifest:
        return found  # of a version that kept the configuration there too, or of a submission
    return {**decides(read_config(path, manifest)), **found}


def read_config(path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a run's config.yaml, checked against its manifest; raises as :func:`run_identity`."""
    file = path / "config.yaml"
    try:
        text = read_regular(file, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise damaged(str(file), "expected UTF-8") from error
    content = parse_yaml(text, str(file))
    body = _body(text)
    # a session that was killed between its manifest and its config.yaml left the earlier one's
    known = {manifest["config_sha256"], *(e.get("config_sha256") for e in manifest.get("earlier", ())[-1:])}
    if not isinstance(content, dict) or _hash(body) not in known:
        raise HarnessError(
            f"{file}: was changed since the run wrote it. Put it back, or start a new run: what is different goes on"
            " the command line."
        )
    return content


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
