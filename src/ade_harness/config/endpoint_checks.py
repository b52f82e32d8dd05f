"""Ranges of ``model.url`` and ``model.http``, and that no secret is written where a run records it."""

from __future__ import annotations

import re

from omegaconf import DictConfig

from ade_harness.errors import did_you_mean, require
from ade_harness.files.address import check_url

_SECRET = (
    "It would be written into the run's record: put it into an environment variable, and name that as"
    " model.http.token_env."
)
_EXAMPLE = "http://127.0.0.1:8000 or https://example.org/segmenter; images go to /predict below it"
_CHOICES = {"send": ("png", "jpeg"), "returns": ("labels", "scores")}
_RANGES = {
    "jpeg_quality": (1, 100, ""),
    "timeout_s": (0.1, 3600, " (seconds)"),
    "retries": (0, 20, ""),
    "concurrency": (1, 256, " (requests under way, of all ranks together)"),
}


def check_endpoint(model: DictConfig) -> None:
    """Check a ``model`` node of kind http.

    Raises:
        HarnessError: names the key; it never shows what may be a secret.
    """
    check_url(model.url, "model.url", _SECRET, _EXAMPLE)
    for key, allowed in _CHOICES.items():
        value = model.http[key]
        require(
            value in allowed,
            f"model.http.{key}={value}: expected one of {', '.join(allowed)}.{did_you_mean(value, allowed)}",
        )
    for key, (least, most, unit) in _RANGES.items():
        value = model.http[key]
        require(least <= value <= most, f"model.http.{key}={value}: expected {least} to {most}{unit}.")
    name = model.http.token_env
    require(
        name is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None,
        "model.http.token_env: expected the name of an environment variable, such as MY_TOKEN, not the token.",
    )
    require(
        model.class_map is None or model.http.returns == "scores",
        "model.class_map: is about channels of scores. Set model.http.returns=scores, or leave model.class_map out.",
    )
