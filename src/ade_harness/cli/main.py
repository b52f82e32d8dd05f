"""The command line: finds the command, and is the one place where errors become messages and exit codes.

Exit codes: 0 done; 2 a user error, or Ctrl-C; 3 `reproduce` ran, and the labels are not identical; 75 asked to stop
(SIGTERM, or the signal before a time limit), to be continued; 76 another rank was lost; 128 + N a rank was killed by
signal N; 1 a fault of this package or of a model's code (with its traceback).
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path

from ade_harness.cli.answer import Answer
from ade_harness.cli.commands import COMMANDS, EVERYWHERE, find_command, overview, parser_of
from ade_harness.errors import HarnessError
from ade_harness.runtime.console import OUTPUT, Output, debug_messages, print_error
from ade_harness.runtime.lifetime import no_silent_exit, watched
from ade_harness.runtime.notes import COMMAND, EXIT_MESSAGE, GIVEN_FULL_ERROR

_TRACEBACK = "ADE_HARNESS_TRACEBACK"
_verbose: ContextVar[bool] = ContextVar("verbose", default=False)
"""Whether the command that runs was given ``--verbose``."""
_OF_PATHS = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EROFS)
"""What a path that the user named may be: before Python 3.12, `Path.exists` raises some of these too."""

_WITHOUT_RANKS = (["predict"], ["serve"])
"""Commands that run a model themselves."""
_OF_STREAMS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        arguments: of the command; None takes those of this process. A command that is given here is evaluated in this
            very process, on one rank; otherwise ranks are processes of their own.
    """
    _open_streams()
    if arguments is None:  # before Hydra writes its own arguments there; ranks inherit it
        os.environ[COMMAND] = json.dumps(["python", "-m", "ade_harness", *sys.argv[1:]])
        given = list(sys.argv[1:])
        return watched(lambda: _run_alone(given)) if _flags_last(given)[:1] in _WITHOUT_RANKS else _run_alone(given)
    return run_command(list(arguments), in_this_process=True)


def _run_alone(arguments: list[str]) -> int:
    with no_silent_exit():
        return run_command(arguments)


def _open_streams() -> None:
    """Give a process that was started without standard output or error (cron, daemons) /dev/null in their places.

    The next file that is opened would get their numbers, and what is printed would go into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding costs no result


def run_command(arguments: list[str], in_this_process: bool = False) -> int:
    """Run one command as :func:`main` does; evaluate it with ranks that are processes, unless `in_this_process`."""
    return guarded(lambda: _dispatch(arguments, in_this_process))


def guarded(work: Callable[[], int]) -> int:
    """Do `work`; errors become messages and exit codes."""
    _verbose.set(False)
    try:
        _require_working_directory()
        return work()
    except HarnessError as error:
        if os.environ.get(_TRACEBACK):
            raise
        if _verbose.get() or os.environ.get(GIVEN_FULL_ERROR, os.environ.get("HYDRA_FULL_ERROR")) == "1":
            traceback.print_exc()
        print_error(f"error: {error}")
        return EXIT_MESSAGE
    except KeyboardInterrupt:
        from ade_harness.cli.launch import print_resume_hint

        print_resume_hint("Interrupted")
        return EXIT_MESSAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `... | head` is no error
        return 0
    except OSError as error:
        if error.filename is None and error.errno in _OF_STREAMS and _output_is_lost():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of the output goes there
            print_error(f"error: standard output cannot be written ({error.strerror}).")
            return EXIT_MESSAGE
        if os.environ.get(_TRACEBACK) or error.filename is None or error.errno not in _OF_PATHS:
            raise
        print_error(f"error: {os.fsdecode(error.filename)}: {error.strerror}.")
        return EXIT_MESSAGE


def _output_is_lost() -> bool:
    """Whether standard output takes not even a new line: other files fail with the same errors."""
    try:
        number = sys.stdout.fileno()
    except (OSError, ValueError):  # a caller's own stream
        return False
    try:
        sys.stdout.flush()
        os.write(number, b"\n")
    except OSError:
        return True
    return False


def _require_working_directory() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise HarnessError(
            f"the working directory cannot be used ({error.strerror}): it was deleted, or is of a disk that is gone. cd"
            " to another one."
        ) from error


def _dispatch(arguments: list[str], in_this_process: bool) -> int:
    if "--version" in arguments:
        from ade_harness.runs.provenance import code_state, describe_code

        print(describe_code(code_state()))
        return 0
    if arguments[:1] == ["help"] and len(arguments) > 1:
        command, _ = find_command(arguments[1:])
        print(parser_of(command, _choices()).format_help(), end="")
        return 0
    if arguments[:1] in (["help"], ["-h"], ["--help"]):
        print(overview())
        return 0
    group = [command for command in COMMANDS if arguments and command.name.startswith(f"{arguments[0]} ")]
    if group and arguments[1:2] in (["-h"], ["--help"]):
        print("\n".join(parser_of(command).format_help() for command in group), end="")
        return 0
    command, rest = find_command(_flags_last(arguments))
    if "-h" in rest or "--help" in rest:
        print(parser_of(command, _choices()).format_help(), end="")
        return 0
    options = parser_of(command).parse_intermixed_args(rest)
    options.in_this_process = in_this_process
    module, _, name = command.function.partition(":")
    with _output(options):
        function: Callable[[argparse.Namespace], Answer] = getattr(import_module(f"ade_harness.cli.{module}"), name)
        try:
            answer = function(options)
        except SystemExit as end:
            from ade_harness.runtime.lifetime import CommandEnded, exit_location

            if isinstance(end, CommandEnded):
                raise
            raise HarnessError(exit_location(end)) from end
    if options.json and answer.content is not None:
        print(json.dumps(answer.content, indent=2))
    return answer.code


def _flags_last(arguments: list[str]) -> list[str]:
    """Return arguments with the options of every command behind the command's name: `--quiet status RUN` is usual."""
    flags = {name for argument in EVERYWHERE for name in argument.names}
    first = next((place for place, given in enumerate(arguments) if given not in flags), len(arguments))
    return [*arguments[first:], *arguments[:first]]


@contextmanager
def _output(options: argparse.Namespace) -> Iterator[None]:
    """Say to this process and to the ranks that it starts how much to print, and where."""
    before = {name: os.environ.get(name) for name in (OUTPUT, _TRACEBACK)}
    if options.json:
        os.environ[OUTPUT] = Output.errors if options.quiet else Output.stderr
    elif options.quiet:
        os.environ[OUTPUT] = Output.quiet
    if options.verbose:
        os.environ[_TRACEBACK] = "1"  # of ranks
        _verbose.set(True)
    try:
        with debug_messages() if options.verbose else nullcontext():
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _choices() -> dict[str, str]:
    from ade_harness.config.files import choices

    return {group: ", ".join(choices(group)) for group in ("model", "inference", "probe")}
