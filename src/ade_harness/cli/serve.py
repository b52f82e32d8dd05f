"""The command `serve`: answer HTTP requests with a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from ade_harness.cli.answer import Answer
from ade_harness.config.arguments import refuse_idle
from ade_harness.config.compose import compose_config
from ade_harness.endpoint.client import read_token
from ade_harness.runtime.console import make_console, print_line


def run_serve(options: argparse.Namespace) -> Answer:
    """Serve until Ctrl-C.

    Raises:
        HarnessError: a mistake in the configuration, or the address cannot be used.
    """
    console = make_console()
    refuse_idle(options.overrides, "serve")
    token = read_token(options.token_env, "--token-env")
    config = compose_config(options.overrides, Path(options.config_dir) if options.config_dir else None)
    from ade_harness.endpoint.service import make_server, open_service  # imports torch: not before a mistake is named

    service = open_service(config)
    with make_server(service, options.host, options.port, token) as server:
        host, port = server.server_address[:2]
        address = f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"
        line = f"{service.name} on {service.device}: model=http model.url={address}   (Ctrl-C stops it)"
        print_line(console, line)
        if token is None and options.host not in ("127.0.0.1", "::1", "localhost"):
            print_line(
                console,
                "no authentication: anyone who can reach this address can use it. --token-env=NAME requires a token",
            )
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print_line(console, "stopped")
    return Answer()
