"""Which errors are Hydra's own, and which come from the job that it runs."""

from __future__ import annotations

import traceback
from pathlib import Path

from hydra.core.plugins import Plugins

from ade_harness.errors import HarnessError


def check_plugins() -> None:
    """Let Hydra import the plugins that are installed, which it would do with the first command line.

    Raises:
        HarnessError: one of them cannot be imported: it names the file.
    """
    try:
        Plugins.instance()
    except Exception as error:  # whatever another package raises
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        raise HarnessError(
            f"a Hydra plugin that is installed cannot be imported ({file}: {' '.join(str(error).split())}). Hydra"
            " imports every plugin it finds: update that package, or uninstall it."
        ) from error


def while_composing(error: Exception) -> bool:
    """Whether an error was raised below Hydra's loader of configurations, not in the work of a job."""
    return any("config_loader_impl" in frame.filename for frame in traceback.extract_tb(error.__traceback__))


def is_hydras(error: Exception) -> bool:
    """Whether an error was raised by Hydra, OmegaConf or the logging that Hydra configures, of what it was given.

    They check few types of their own options: ``hydra.launcher=3`` is a TypeError, ``hydra.verbose={a:1}`` asserts.
    """
    if isinstance(error, HarnessError):
        return False
    for frame in reversed(traceback.extract_tb(error.__traceback__)):  # the standard library is at the end of some
        parts = set(Path(frame.filename).parts)
        if {"hydra", "omegaconf"} & parts:
            return True
        if {"ade_harness", "hydra_plugins", "site-packages"} & parts:
            return False
    return False
