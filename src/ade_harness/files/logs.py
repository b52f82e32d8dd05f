"""The log of a library, quieter for a while."""

from __future__ import annotations

import logging.config
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SILENT = logging.CRITICAL + 1
"""Above every level that libraries log at."""


@contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Let a library log only from `level` up: what it reports is reported by us. Its level is as before afterwards.

    Args:
        name: of the logger, such as ``timm``.
        level: of :mod:`logging`, or `SILENT`.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def configure_log(settings: dict[str, Any], verbose: bool | str | list[str]) -> None:
    """Do what Hydra does with its ``job_logging`` and ``verbose``, without importing Hydra."""
    logging.config.dictConfig(settings)
    names = {False: [], True: [None]}[verbose] if isinstance(verbose, bool) else verbose
    for name in [names] if isinstance(names, str) else names:
        logging.getLogger(name).setLevel(logging.DEBUG)
