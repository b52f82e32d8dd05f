"""The command `serve`: answer HTTP requests with a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from ade_harness.endpoint.client import read_token
from ade_harness.endpoint.service import make_server, open_service
from ade_harness.errors import HarnessError, require
from ade_harness.runtime.console import print_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise HarnessError(f"serve: {message}. See `python -m ade_harness --help`.")


def run_serve(console: Console, words: Sequence[str]) -> int:
    """Serve until Ctrl-C; returns the exit code.

    Args:
        console: where to say the address.
        words: ``key=value`` of a configuration, and flags.

    Raises:
        HarnessError: a mistake in them, or the address cannot be used.
    """
    from ade_harness.config.compose import compose_config

    parser = _Parser(prog="serve", add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--token-env", default=None)
    parser.add_argument("--config-dir", type=Path, default=None)
    options, overrides = parser.parse_known_args(list(words))
    unknown = [word for word in overrides if word.startswith("-")]
    require(not unknown, f"serve: {' '.join(unknown)}: no such flag. Known: --host, --port, --token-env, --config-dir.")
    token = read_token(options.token_env)
    service = open_service(compose_config(overrides, options.config_dir))
    with make_server(service, options.host, options.port, token) as server:
        host, port = server.server_address[:2]
        address = f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"
        told = f"{service.name} on {service.device}: model=http model.url={address}   (Ctrl-C ends it)"
        print_line(console, told)
        if token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
            print("anybody who reaches this address can use it: --token-env=NAME asks for a token", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)
    return 0
