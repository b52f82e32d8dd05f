"""Try one model of each of timm's families below a linear head; prints the table of docs/timm.md.

Usage: python scripts/timm_table.py [FAMILY ...]; all families take about ten minutes on one core.
"""

from __future__ import annotations

import sys

import timm
import torch
from timm.models import list_models, list_modules

from ade_harness.errors import HarnessError
from ade_harness.models.backbones.timm import DEFAULT_SIDE, build_timm
from ade_harness.models.heads.linear import LinearSegmenter

SMALL = 8e6
"""Parameters: the first model of a family with fewer is taken, else its smallest."""


def smallest(family: str) -> tuple[str, float]:
    """Return a small model of a family and its parameters."""
    found: list[tuple[float, str]] = []
    for name in list_models(module=family):
        try:
            with torch.device("meta"):
                found.append((sum(p.numel() for p in timm.create_model(name).parameters()), name))
        except Exception:  # some need arguments
            continue
        if min(found)[0] < SMALL:
            break
    size, name = min(found)
    return name, size


def row(family: str) -> str:
    """Build a model with random weights, run it, at another size too where it takes any, and return its line."""
    name, size = smallest(family)
    try:
        backbone = build_timm(name, None, None, None)
        network = LinearSegmenter(backbone, pad=True, classes=150).eval()
        side = backbone.side or DEFAULT_SIDE
        with torch.inference_mode():
            width = network(torch.randn(1, 3, side, side)).shape[-1]
            if backbone.side is None:
                network(torch.randn(1, 3, side - 64, side + 30))
    except (HarnessError, RuntimeError, AssertionError, ValueError) as error:
        return f"| {family} | `{name}` | {size / 1e6:.1f} | fails: {str(error).splitlines()[0][:80]} | | | |"
    sizes = "any" if backbone.side is None else f"{backbone.side} only"
    cells = (
        family,
        f"`{name}`",
        f"{size / 1e6:.1f}",
        backbone.channels,
        backbone.patch_size,
        f"{side / width:.0f}",
        sizes,
    )
    return f"| {' | '.join(map(str, cells))} |"


def main(families: list[str]) -> None:
    """Print the table."""
    print(
        "| family | model | M parameters | channels | stride | of the logits | sizes |\n|---|---|---|---|---|---|---|"
    )
    for family in families or [m for m in sorted(list_modules()) if list_models(module=m)]:
        print(row(family), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
