"""Networks: images [N, 3, H, W] to scores [N, C, h, w]; no knowledge of data sets or metrics."""

from typing import Any

__all__ = ["from_official"]


def __getattr__(name: str) -> Any:
    """Import the public door when it is asked for: torch and transformers take seconds."""
    if name == "from_official":
        from ade_harness.models.registry import from_official

        return from_official
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
