"""Commands in processes of their own that have imported everything already.

A command imports for a second, and each of its ranks for three: most of what a test of a command costs. Here a server
imports once, and forks a process for each command; what that starts with ``python -m ade_harness`` (the ranks of a
supervisor, the jobs of a sweep) is forked as well, as its own child. `WarmPopen` is `subprocess.Popen` in all else: pipes,
signals, exit codes, sessions and environments are real, and processes die as they do elsewhere.

What is about starting and importing (the README's commands, SLURM, untrusted directories, what is imported at all) is tested
with processes that start cold: `subprocess`, and the fixture `cold_cli`.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

_MODULES = ("ade_harness", "ade_harness.cli.rank", "ade_harness.tracking.session")
_OWN_CHILDREN = _MODULES[:2]
"""What a forked process forks itself. It may have threads by the time it starts a session of W&B's."""
_LATER = (
    "ade_harness.cli.evaluate", "ade_harness.cli.rank", "ade_harness.config.overrides", "ade_harness.evaluation.session",
    "ade_harness.kernels.numba_cpu", "ade_harness.report.pages", "ade_harness.tracking.figures",
    "ade_harness.tracking.session", "hydra._internal.logging_config", "scipy.special",
)  # fmt: skip
"""What a command imports when it needs it."""
_OF_TRAININGS = ("torch._inductor", "transformers.models.dinov3_vit.modeling_dinov3_vit")
"""What they import beside: torch's global switch of determinism the first, the tests' backbone the second."""
_READ_WHILE_IMPORTING = ("OMP_", "MKL_", "NUMBA_", "TRITON_", "TORCH_", "HF_", "PYTHONWARNINGS", "COVERAGE", "LD_")
"""Begins of variables that modules look at only once: a command with others than the server's starts cold."""
_MAX_REQUEST_BYTES = 2**20


def module_of(command: Any) -> tuple[str, list[str]] | None:
    """Return the module of this package that a command runs, and its arguments; None for any other command."""
    given = [os.fspath(word) for word in command] if isinstance(command, list | tuple) else []
    if given[:1] != [sys.executable]:
        return None
    rest = given[2:] if given[1:2] == ["-P"] else given[1:]
    return (rest[1], rest[2:]) if rest[:1] == ["-m"] and rest[1:2] and rest[1] in _MODULES else None


# ---- the side of the tests


class WarmPopen(subprocess.Popen):
    """`subprocess.Popen` for ``python -m ade_harness``, by the server."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        """Ask the server for a process (`rest` is what Popen gives its own method, in its order)."""
        found, cwd, environment = module_of(args), rest[4], rest[5]
        path = server_path() if found is not None else ""
        if found is None or _starts_cold(os.environ if environment is None else environment):
            return super()._execute_child(args, *rest)
        module, given = found
        request = {
            "module": module, "given": given, "cwd": os.fspath(cwd or Path.cwd()), "session": bool(rest[20]),
            "environment": dict(os.environ if environment is None else environment),
        }  # fmt: skip
        self._server = connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        streams = array.array("i", _streams(rest))
        connection.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        connection.sendall(json.dumps(request).encode() + b"\n")
        self._answers = connection.makefile("r")
        self.pid = json.loads(self._answers.readline())["pid"]
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])
        return None

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if not hasattr(self, "_server"):
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._wait(0)
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        if not hasattr(self, "_server"):
            return super()._wait(timeout)
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._server, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = json.loads(self._answers.readline())["code"]
            self._answers.close()
            self._server.close()
        return self.returncode


def _streams(rest: tuple[Any, ...]) -> list[int]:
    """Return the three file descriptors that a child is to have, of the arguments of `_execute_child`."""
    p2cread, _, _, c2pwrite, _, errwrite = rest[9:15]
    return [own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))]


def _starts_cold(environment: Any) -> bool:
    names = {name for name in {*environment, *_imported_with} if name.startswith(_READ_WHILE_IMPORTING)}
    return any(environment.get(name) != _imported_with.get(name) for name in names)


_server: list[tuple[subprocess.Popen[bytes], str]] = []
_imported_with = dict(os.environ)
"""The server's environment."""


def server_path() -> str:
    """Return the socket of this worker's server, which is started the first time."""
    if not _server:
        _imported_with.clear()
        _imported_with.update(os.environ)
        path = f"\0ade-harness-tests-{os.getpid()}-{time.monotonic_ns()}"
        process = subprocess.Popen([sys.executable, __file__, path[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        _server.append((process, path))
    return _server[0][1]


def stop_server() -> None:
    """End it; it ends by itself when this process does."""
    for process, _ in _server:
        process.kill()
        process.communicate()
    _server.clear()


# ---- the server


def main(name: str) -> None:
    """Import everything; then fork a process for each request until the tests are gone."""
    sys.path[0] = str(Path(__file__).parents[1])
    import_all()
    del sys.path[0]
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("\0" + name)
    listener.listen(64)
    print("ready", flush=True)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        for source in (listener, reader, 0):
            selector.register(source, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if 0 in ready:
                return  # the tests are gone
            if reader in ready:
                os.read(reader, 4096)
                _report(running)
            if listener in ready:
                connection, _ = listener.accept()
                streams, request = _request(connection)
                if request["given"][:1] == ["probe"]:
                    for module in _OF_TRAININGS:  # four seconds for each rank of each training
                        importlib.import_module(module)
                    assert threading.active_count() == 1
                pid = os.fork()
                if pid == 0:
                    become(request["module"], request["given"], streams, request)
                running[pid] = connection
                connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
                for stream in streams:
                    os.close(stream)


def import_all() -> None:
    """Import what a command and its ranks do, and compile their kernels; start no thread, which would not outlive a fork."""
    gc.disable()
    import torch

    from ade_harness.runtime.lazy_imports import import_lightning

    import_lightning()
    for module in _LATER:
        importlib.import_module(module)
    from PIL import Image

    from ade_harness import kernels
    from ade_harness.config.compose import compose_config, packaged_choices, packaged_tree
    from ade_harness.report.page import _environment
    from ade_harness.runs.provenance import distributions
    from tests.faster_hydra import faster

    faster()
    for overrides in (["tracking=none"], ["dataset.limit=1"]):  # most commands; fills the caches of Hydra's grammar too
        config = compose_config(overrides)
    packaged_tree(tuple(packaged_choices(config)))
    distributions()  # of what is installed, which no test changes
    for template in _environment().list_templates(extensions=["j2"]):
        _environment().get_template(template)  # compiled by jinja, once
    Image.preinit()
    threads, tasks = torch.get_num_threads(), len([*Path("/proc/self/task").iterdir()])
    torch.set_num_threads(1)
    labels = torch.zeros(2, 2, dtype=torch.uint8)
    kernels.select("auto", "cpu").count(labels, labels, 150)  # after it has compared labels with torch's
    torch.set_num_threads(threads)
    assert threading.active_count() == 1
    assert len([*Path("/proc/self/task").iterdir()]) == tasks  # OpenBLAS has its own, and knows of forks
    gc.freeze()
    gc.enable()


def _request(connection: socket.socket) -> tuple[list[int], dict[str, Any]]:
    streams = array.array("i")
    _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(ancillary[0][2][: 3 * streams.itemsize])
    text = b""
    while not text.endswith(b"\n"):
        text += connection.recv(_MAX_REQUEST_BYTES)
    return list(streams), json.loads(text)


def _report(running: dict[int, socket.socket]) -> None:
    """Tell who waits for it that a process has ended."""
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with contextlib.suppress(OSError), running.pop(pid) as connection:
            connection.sendall(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


# ---- the forked process


class _ForkedPopen(subprocess.Popen):
    """`subprocess.Popen` that forks what would import the same again."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        found, environment = module_of(args), rest[5]
        if (
            found is None
            or found[0] not in _OWN_CHILDREN
            or _starts_cold(os.environ if environment is None else environment)
        ):
            return super()._execute_child(args, *rest)
        request = {
            "cwd": os.fspath(rest[4] or Path.cwd()), "session": bool(rest[20]),
            "environment": dict(os.environ if environment is None else environment),
        }  # fmt: skip
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            become(*found, _streams(rest), request)
        self._child_created = True
        self._close_pipe_fds(*rest[9:15])
        return None


def become(module: str, given: list[str], streams: list[int], request: dict[str, Any]) -> None:
    """Be ``python -m module ARGUMENTS``; never returns."""
    code = 1
    try:
        _settle(module, given, streams, request)
        sys.modules.pop(module, None)  # it is run as `__main__`
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if not isinstance(end.code, int | None):
                print(end.code, file=sys.stderr)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            if isinstance(error, KeyboardInterrupt):
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGINT)
        from ade_harness.runtime.lifetime import leave

        leave(code)
    finally:
        os._exit(code)


def _settle(module: str, given: list[str], streams: list[int], request: dict[str, Any]) -> None:
    """Take on what an exec would have changed."""
    if request["session"]:
        os.setsid()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # temporary folders are the parent's
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    high = [os.dup(stream) for stream in streams]
    for number, stream in enumerate(high):
        os.dup2(stream, number)
    os.closerange(3, 4096)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        binary = open(number, "wb", closefd=False)  # noqa: SIM115
        stream = io.TextIOWrapper(
            binary, "utf-8", errors, line_buffering=number == 2 or os.isatty(number), write_through=unbuffered
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    known = set(sys.path)
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [folder for folder in folders if folder and folder not in known]
    sys.argv = [str(Path(sys.modules["ade_harness"].__file__ or "").parent / "__main__.py"), *given]
    if module == "ade_harness":  # the others are started with -P
        sys.path.insert(0, request["cwd"])
    subprocess.Popen = _ForkedPopen  # type: ignore[misc]


if __name__ == "__main__":
    main(sys.argv[1])
