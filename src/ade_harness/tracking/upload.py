"""Upload an offline W&B run with ``wandb sync``, in a process of its own that ends in bounded time."""

from __future__ import annotations

import netrc
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ade_harness.files.reading import expanded

LIMITS = {
    "WANDB_HTTP_TIMEOUT": "8",  # seconds, of one request
    "WANDB_X_GRAPHQL_RETRY_MAX": "1",
    "WANDB_X_FILE_STREAM_RETRY_MAX": "3",
    "WANDB_X_FILE_TRANSFER_RETRY_MAX": "3",
    "WANDB_ERROR_REPORTING": "false",  # else wandb waits 10 s for a dead server before it exits
}
"""Settings of wandb in place of its defaults, which retry for minutes; the user's own take precedence."""


@contextmanager
def limits() -> Iterator[None]:
    """Let wandb in this process give up a server that does not answer, and print nothing.

    What of the user's variables it cannot understand is taken away as long, with a warning: it would refuse to begin.
    """
    refused, tags = _warned_of(), _tags()
    left = {*refused, *_empty()}
    ours = {**LIMITS, "WANDB_SILENT": "true"}
    added = {key: value for key, value in ours.items() if key not in os.environ or key in left}
    before = {key: os.environ.get(key) for key in (*added, *left, _TAGS, "WANDB_MODE")}
    service = os.environ.get("WANDB_SERVICE")
    for key in before:
        os.environ.pop(key, None)
    os.environ.update({_TAGS: ",".join(tags)} if tags else {})
    os.environ.update(added, WANDB_MODE="offline")  # what we pass: wandb refuses to start with other spellings
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
        if service is None:
            os.environ.pop("WANDB_SERVICE", None)  # this process' own, which its children would speak through


@dataclass(frozen=True)
class Uploaded:
    """What came of an upload."""

    url: str | None
    """None: it is not (wholly) there."""
    problem: str = ""


_MODES = {
    "online": "online", "run": "online", "shared": "online", "offline": "offline", "dryrun": "offline",
    "disabled": "disabled",
}  # fmt: skip
"""What values of WANDB_MODE mean here."""


def wandb_mode(configured: str | None) -> str:
    """Return online, offline or disabled.

    ``tracking.mode`` decides; else WANDB_DISABLED, WANDB_MODE and W&B's settings files (``wandb offline``,
    ``wandb disabled``), in any case of letters; else it is online only if a key is set. What cannot be understood keeps
    results here: it is offline, with a warning.
    """
    if configured is not None:
        return configured
    if os.environ.get("WANDB_DISABLED", "").strip().lower() not in ("", "0", "false", "no", "off"):
        return "disabled"
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    try:
        found = _MODES[asked or _mode_of_files()]
    except Exception as error:  # pydantic's ValidationError, wandb's UsageError, KeyError, ...
        warnings.warn(f"W&B: offline, since its mode is invalid: {_without_value(error, True)}", stacklevel=2)
        return "offline"
    return "offline" if found == "online" and not has_key() else found


def _mode_of_files() -> str:
    """Return the mode by W&B's own settings, of the machine's user and of the working directory.

    Raises:
        ValueError: a file holds what W&B cannot understand, and so leaves out with all the rest of it.
    """
    import wandb

    found = _settings_of_files()
    written = found.read_system_settings().all()
    wandb.Settings(silent=True, **{key: value for key, value in written.items() if key not in _ALWAYS_TAKEN})
    return str(found.mode)


_ALWAYS_TAKEN = ("ignore_globs", "anonymous")
"""Keys that W&B takes in files in another form than as a setting."""


def _settings_of_files() -> Any:
    import wandb

    # `wandb.setup()` would give them too, but once for all of this process, and it changes the environment
    folder = expanded(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    settings = wandb.Settings(silent=True, settings_system=str(folder / "settings"))
    settings.update_from_system_settings()
    return settings


@dataclass(frozen=True)
class UserSettings:
    """How the user's environment and W&B's settings files call runs; None where they do not say."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()


_VARIABLES = (
    "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_NOTES",
)  # fmt: skip
"""What users say by variables of the environment, and W&B checks."""


_TAGS = "WANDB_TAGS"
_NOT_TRIED = ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_SERVICE", _TAGS)
"""Variables that have another meaning here, or that W&B does not check so."""
_MAX_TAG = 64
"""Characters, by W&B's rule."""


def _tags() -> tuple[str, ...]:
    """Return the tags in WANDB_TAGS: scripts leave commas at the end, or between nothing."""
    given = (tag.strip()[:_MAX_TAG] for tag in os.environ.get(_TAGS, "").split(","))
    return tuple(dict.fromkeys(tag for tag in given if tag))


def _empty() -> list[str]:
    """Return W&B's variables that are set to nothing, as templates of jobs leave them; W&B refuses some of those."""
    return [key for key, value in os.environ.items() if key.startswith("WANDB_") and not value.strip()]


def _refused_variables() -> dict[str, str]:
    """Return which of the user's variables W&B cannot understand, and why."""
    refused = {}
    for key, value in list(os.environ.items()):
        if key.startswith("WANDB_") and value.strip() and key not in _NOT_TRIED:
            from wandb import Settings

            try:
                Settings().update_from_env_vars({key: value})
            except Exception as error:  # pydantic's ValidationError, wandb's UsageError, ...
                refused[key] = _without_value(error)
    return refused


def _without_value(error: Exception, named: bool = False) -> str:
    """Say what is wrong, and if `named` of which setting, without pydantic's copy of the value: it may hold a key."""
    errors: Any = getattr(error, "errors", None)

    def one(found: dict[str, Any]) -> str:
        return f"{'.'.join(map(str, found['loc']))}: {found['msg']}" if named and found["loc"] else str(found["msg"])

    text = "; ".join(one(found) for found in errors()) if errors else str(error)
    return " ".join(text.split())[:200]


def _warned_of() -> dict[str, str]:
    """Warn of each variable that is left out, and return them."""
    refused = _refused_variables()
    for key, reason in refused.items():
        warnings.warn(f"W&B: {key} is invalid and ignored: {reason}", stacklevel=3)
    return refused


def user_settings() -> UserSettings:
    """Read WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_NAME, WANDB_NOTES, WANDB_TAGS and W&B's settings files.

    What cannot be understood is left out, with a warning: the run is logged all the same.
    """
    try:
        found = _settings_of_files()
    except Exception as error:  # pydantic's ValidationError, wandb's UsageError, ...
        warnings.warn(f"W&B: settings cannot be understood: {_without_value(error, True)}", stacklevel=2)
        return UserSettings()
    refused = _warned_of()
    found.update_from_env_vars({k: os.environ[k] for k in _VARIABLES if os.environ.get(k) and k not in refused})
    tags = _tags() or tuple(found.run_tags or ())
    return UserSettings(found.project, found.entity, found.run_group, found.run_name, found.run_notes, tags)


def has_key() -> bool:
    """Whether a key of W&B is set, by WANDB_API_KEY or ``wandb login``."""
    return bool(os.environ.get("WANDB_API_KEY")) or _key_in_netrc()


def _key_in_netrc() -> bool:
    path = expanded(os.environ.get("NETRC", "~/.netrc"))
    try:
        return any("wandb" in host for host in netrc.netrc(path).hosts)
    except (OSError, netrc.NetrcParseError):
        return False


def upload(offline: Path, timeout_s: float) -> Uploaded:
    """Upload an offline run; one that is there already is written again, not doubled.

    Args:
        offline: its folder.
        timeout_s: when to give up. A server that cannot be reached, or does not answer, is given up earlier.
    """
    # a folder of its own, for its logs: in the run directory, which somebody else may have written, it would take a
    # settings file that says to which server the key goes
    with tempfile.TemporaryDirectory(prefix="ade-harness-") as folder:
        return _synchronised(offline, folder, timeout_s)


def _synchronised(offline: Path, folder: str, timeout_s: float) -> Uploaded:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "wandb", "sync", str(offline.resolve())],
        cwd=folder,
        env={"WANDB_BASE_URL": _server(), **environment()},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    with ended(process):
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Uploaded(None, f"not done within tracking.timeout_s={timeout_s:g} seconds")
    whole = any(offline.glob("*.wandb.synced"))
    url = re.search(r"https?://\S+/runs/[\w-]+", output)
    if whole:
        problems = [line for line in output.splitlines() if "ERROR" in line and _LOGS not in line]
        return Uploaded(url[0] if url else None, _short(problems[0]) if problems else "")
    return Uploaded(None, _short(_complaint(output)) or f"`wandb sync` ended with exit code {process.returncode}")


def _server() -> str:
    """Return the address of W&B's server by its settings files, also the one of the working directory."""
    try:
        return str(_settings_of_files().base_url)
    except Exception:  # pydantic's ValidationError, wandb's UsageError, ...: `wandb_mode` warns
        from wandb import Settings

        return str(Settings().base_url)


def environment(patient: bool = False) -> dict[str, str]:
    """Return the environment of a process that speaks with W&B's server.

    Args:
        patient: it works beside an evaluation of hours, in which a server may be away for minutes.
    """
    refused = _warned_of()
    # WANDB_SERVICE: a process that speaks through this one's service would leave its runs open there when it is ended
    unwanted = ("WANDB_MODE", "WANDB_SILENT", "WANDB_QUIET", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_SERVICE")
    limits = {k: v for k, v in LIMITS.items() if not (patient and "RETRY" in k)}
    refused.pop("WANDB_BASE_URL", None)  # or results would go to another server
    left_out = {*unwanted, *refused, *_empty(), _TAGS}
    tags = {_TAGS: ",".join(_tags())} if _tags() else {}
    return limits | tags | {k: v for k, v in os.environ.items() if k not in left_out}


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Leave nothing of a process in a session of its own, nor of wandb's service that it has started, behind."""
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # all ended by themselves
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


_LOGS = "Find detailed error logs"
"""In a line that names a file, and no reason."""
_REFUSED = ("permission denied", "unauthorized", "not logged in", "forbidden", "credentials", "401", "403")
"""What servers say of a key that they do not take."""


def _complaint(output: str) -> str:
    """Return the most informative line of what `wandb sync` printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and _LOGS not in line]
    errors = [line for line in lines if "ERROR" in line or "panic" in line or "Error" in line]
    found = (errors or lines or [""])[0]
    if re.search(r"<!doctype|<html", found, re.IGNORECASE):
        title = re.search(r"<title>\s*(.*?)\s*</title>", output, re.IGNORECASE | re.DOTALL)
        name = f" ({' '.join(re.sub('wandb: (ERROR)?', '', title[1]).split())})" if title else ""
        return f"a page{name} came instead of W&B's answer: WANDB_BASE_URL is another server, or a proxy is between"
    key = next((match[1] for line in lines if (match := re.search(r"Loaded (credentials for .*?)\.?$", line))), None)
    if key is not None and any(word in found.lower() for word in _REFUSED):
        found += f" (it was asked with the {key.replace('credentials', 'key')}: `wandb login --relogin` takes another)"
    return found


def _short(line: str) -> str:
    text = re.sub(r"^(wandb: )?(ERROR )?", "", line)
    return text if len(text) <= 300 else f"{text[:297]}..."
