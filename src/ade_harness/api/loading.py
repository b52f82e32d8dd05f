"""``ade_harness.load_model``: a system by its name, ready for any image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ade_harness.api.arguments import model_overrides, option_overrides, place_of, spelt_for_python
from ade_harness.api.predictors import Segmenter
from ade_harness.api.state import callers_hydra, callers_process, require_usual_device
from ade_harness.config.compose import compose_config
from ade_harness.data.factory import open_classes
from ade_harness.errors import HarnessError
from ade_harness.inference.factory import open_network


@spelt_for_python()
def load_model(
    name: str | Path,
    *,
    checkpoint: str | Path | None = None,
    protocol: str | None = None,
    device: str | torch.device | None = None,
    options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Load a system by its name, or a file, with its own protocol.

    Args:
        name: of a system (``python -m ade_harness models``), an ONNX or TorchScript file, or a folder of transformers.
        checkpoint: weights in place of the public ones.
        protocol: another one than its own.
        device: None takes the first GPU, or the CPU.
        options: any option of the command line by its dotted key.

    Raises:
        HarnessError: no such system, weights that are missing or do not fit, a model that has no network.
    """
    if not isinstance(name, str | Path):
        raise HarnessError(f"load_model takes a name or a path, not a {type(name).__name__}.")
    require_usual_device()
    overrides = [*model_overrides(name, checkpoint), "tracking=none", "dataset=demo"]
    if protocol is not None:
        overrides.append(f"inference={protocol}")
    with callers_hydra():
        cfg = compose_config(overrides + option_overrides(options, memory=False))
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    place = place_of(usual if device is None else device)
    with callers_process():  # a constructor may draw random numbers, of NumPy and Python too
        return Segmenter(open_network(cfg, open_classes(cfg.dataset)), cfg, place)
