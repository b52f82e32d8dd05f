"""What the hub answers is one message, and the caller's logging is as before."""

from __future__ import annotations

import logging

import huggingface_hub.utils.logging  # which sets its own level when it is imported  # noqa: F401
import pytest

from ade_harness.errors import HarnessError
from ade_harness.files.hub import hub_explained
from ade_harness.files.logs import SILENT
from ade_harness.models.formats.transformers import _quiet


def test_the_hubs_logger_is_as_before() -> None:
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    try:
        logger.setLevel(logging.INFO)
        message = r"some/repo: the download failed \(no route\)\. Try later"
        with pytest.raises(HarnessError, match=message), hub_explained("some/repo", "Try later."):
            assert logger.level == SILENT
            raise OSError("no route")
        assert logger.level == logging.INFO
        with _quiet():
            assert logger.level == SILENT
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(before)
