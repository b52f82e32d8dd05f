"""submission.yaml: what a submission says, as one mapping; made from a run, or read from somebody else's bundle."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ade_harness.errors import HarnessError
from ade_harness.files.address import check_url
from ade_harness.leaderboard.submission.public_files import PublicSource, is_local, parse_address
from ade_harness.leaderboard.table import METRICS
from ade_harness.runs.finished import FinishedRun

DECLARATION = "submission.yaml"
SCHEMA = 1
BENCHMARK = "ADE20K Scene Parsing Benchmark (2,000 validation images, 150 classes)"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONTACT = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+|https://\S+\.\S+")
_OVERRIDE = re.compile(r"(\+\+)?(model|dataset|inference|metrics|runtime|run)(\.[\w.-]+)?=[^\x00-\x1f\x7f]*")
_UNSAFE = ("run.dir", "run.root", "runtime.slurm")
_NOTHING = type(None)
_SHAPE: Mapping[str, Any] = {
    "schema": int, "benchmark": str, "system": str, "organization": (str, _NOTHING), "paper": (str, _NOTHING),
    "contact": str, "measured": str, "results": list, "references": list, "model_code": (str, _NOTHING),
    "code": {"repository": str, "commit": str, "version": str},
    "seeds": dict, "command": list,
    "environment": {
        "python": str, "platform": str, "device": str, "cpu": str, "gpus": list, "cuda": (str, _NOTHING),
        "driver": (str, _NOTHING), "packages": dict,
    },
    "ledger_sha256": str, "data_sha256": str, "files": dict,
}  # fmt: skip
"""Types of everything but `files`' and `packages`' entries."""
_SOURCE: Mapping[str, Any] = {
    "role": str, "address": str, "sha256": (str, _NOTHING), "gated": bool, "checked": str,
}  # fmt: skip


def make_declaration(
    run: FinishedRun,
    about: Mapping[str, str | None],
    sources: Sequence[PublicSource],
    repository: str,
    command: Sequence[str],
) -> dict[str, Any]:
    """Return the declaration of a run, without its ``files``.

    Args:
        run: complete and clean.
        about: ``contact``, and what there is of ``system``, ``organization``, ``paper``, ``model_code``.
        sources: of weights or endpoint.
        repository: address of the code.
        command: overrides that repeat it anywhere.
    """
    environment, metrics = run.manifest["environment"], run.metrics
    found = metrics["intervals"].get("mIoU")
    interval = {"interval": [found["low"], found["high"]], "level": found["level"]} if found else {}
    value = float(metrics["mIoU"])
    return {
        "schema": SCHEMA,
        "benchmark": BENCHMARK,
        "system": about.get("system") or run.label,
        "organization": about.get("organization"),
        "paper": about.get("paper"),
        "contact": about["contact"],
        "measured": run.manifest["finished"],
        "results": [{"metric": m, "value": round(100 * value, 2), "fraction": value, **interval} for m in METRICS],
        "references": [source.as_dict() for source in sources],
        "model_code": about.get("model_code"),
        "code": {"repository": repository, **{k: run.manifest["code"][k] for k in ("commit", "version")}},
        "seeds": dict(run.manifest["seeds"]),
        "command": list(command),
        "environment": {
            **{k: environment[k] for k in ("python", "platform", "cpu", "gpus", "cuda", "driver")},
            "device": run.manifest["device"],
            "packages": environment["distributions"],
        },
        "ledger_sha256": run.ledger_hash,
        "data_sha256": run.manifest["dataset"]["content_hash"],
    }


def check_contact(contact: str | None) -> None:
    """Raise HarnessError unless somebody can be reached there."""
    if contact is None or not _CONTACT.fullmatch(contact):
        problem = "no contact" if not contact else f"--contact={contact}: no address"
        raise HarnessError(f"{problem}: give --contact you@example.org, or the https address of a page.")


def check_repository(repository: str | None) -> None:
    """Raise HarnessError unless others can clone from there."""
    advice = "name where others can clone this commit: --repository https://HOST/ORGANISATION/ade-harness"
    if not repository:
        raise HarnessError(f"the checkout has no remote: {advice}.")
    address = re.sub(r"^git@([\w.-]+):", r"https://\1/", repository)
    if not address.startswith(("http://", "https://")) or is_local(address):
        raise HarnessError(f"{repository}: others cannot clone from there: {advice}.")
    check_url(address, "--repository", "A submission is public.", "https://example.org/group/ade-harness")


def declaration_problems(declaration: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a declaration that somebody else may have written; nothing in it is trusted."""
    problems = _shape_problems(declaration, _SHAPE, "")
    if problems:
        return problems
    environment = declaration["environment"]
    checks = [
        (declaration["schema"] == SCHEMA, f"schema: {declaration['schema']}, this version reads {SCHEMA}"),
        (bool(_COMMIT.fullmatch(declaration["code"]["commit"])), "code.commit: expected 40 hexadecimal digits"),
        (bool(declaration["system"].strip()), "system: is empty"),
        (bool(declaration["seeds"]), "seeds: none are declared"),
        (all(type(v) is int for v in declaration["seeds"].values()), "seeds: expected whole numbers"),
        (
            bool(re.fullmatch(r"\d+\.\d+[\w.+]*", environment["python"])),
            "environment.python: no version",
        ),
        (all(isinstance(g, str) for g in environment["gpus"]), "environment.gpus: expected names"),
        (bool(environment["packages"]), "environment.packages: none are declared"),
        (
            environment["device"] == "cpu" or bool(environment["gpus"]),
            "environment.gpus: none",
        ),
        *(
            (bool(_SHA256.fullmatch(declaration[k])), f"{k}: expected 64 digits")
            for k in ("ledger_sha256", "data_sha256")
        ),
    ]
    problems = [text for holds, text in checks if not holds]
    for name, package in declaration["environment"]["packages"].items():
        fine = isinstance(package, dict) and isinstance(package.get("version"), str) and "sha256" in package
        if not fine or not re.fullmatch(r"[\w.-]+", str(name)) or not re.fullmatch(r"[\w.+!-]+", package["version"]):
            problems.append(f"environment.packages.{name}: expected version and sha256")
    for check, value in (
        (check_contact, declaration["contact"]),
        (check_repository, declaration["code"]["repository"]),
    ):
        try:
            check(value)
        except HarnessError as error:
            problems.append(str(error))
    problems += [
        f"command: {override!r} is not allowed" for override in declaration["command"] if not is_safe_override(override)
    ]
    return problems + _result_problems(declaration["results"]) + _source_problems(declaration["references"])


def is_safe_override(override: Any) -> bool:
    """Whether an override of somebody else's command sets an option of the evaluation and nothing else."""
    if not isinstance(override, str) or _OVERRIDE.fullmatch(override) is None or "${" in override:
        return False
    return not override.lstrip("+").startswith(_UNSAFE)


def _shape_problems(content: Any, shape: Mapping[str, Any], where: str) -> list[str]:
    if not isinstance(content, Mapping):
        return [f"{where.rstrip('.') or DECLARATION}: expected a mapping"]
    problems = [f"{where}{key}: missing" for key in shape if key not in content]
    problems += [f"{where}{key}: unknown" for key in content if key not in shape]
    for key, expected in shape.items():
        if key not in content:
            continue
        if isinstance(expected, Mapping):
            problems += _shape_problems(content[key], expected, f"{where}{key}.")
        elif not isinstance(content[key], expected) or (isinstance(content[key], bool) and expected is not bool):
            problems.append(f"{where}{key}: wrong type, {type(content[key]).__name__}")
    return problems


def _result_problems(results: Sequence[Any]) -> list[str]:
    rows = [r for r in results if isinstance(r, dict) and isinstance(r.get("fraction"), float)]
    metrics = [row.get("metric") for row in rows]
    if len(rows) != len(results) or metrics != list(METRICS):
        return [f"results: expected one row for each of {', '.join(METRICS)}, with value and fraction"]
    if len({row["fraction"] for row in rows}) != 1:
        return ["results: the rows differ, and are one number by two names"]
    if any(row.get("value") != round(100 * row["fraction"], 2) for row in rows):
        return ["results: value is not fraction in percent"]
    return []


def _source_problems(sources: Sequence[Any]) -> list[str]:
    problems = []
    if not sources:
        return ["references: neither a checkpoint nor an endpoint is named"]
    for number, source in enumerate(sources):
        where = f"references[{number}]"
        shaped = _shape_problems(source, _SOURCE, f"{where}.")
        if shaped:
            problems += shaped
            continue
        try:
            parse_address(source["address"], f"{where}.address")
        except HarnessError as error:
            problems.append(str(error))
        digest, on_hub = source.get("sha256"), source["address"].startswith("hub:")
        if source.get("role") not in ("checkpoint", "backbone", "endpoint"):
            problems.append(f"{where}.role: expected checkpoint, backbone or endpoint")
        elif digest is None and source["role"] != "endpoint" and not on_hub:
            problems.append(f"{where}.sha256: missing")
        if digest is not None and not _SHA256.fullmatch(str(digest)):
            problems.append(f"{where}.sha256: expected 64 hexadecimal digits")
    return problems
