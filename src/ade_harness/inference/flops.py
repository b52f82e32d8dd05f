"""What one image costs a network: floating-point operations, counted on shapes alone."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ade_harness.config.inference import InferenceConfig
from ade_harness.inference.plan import plan_views


def flops_of_image(network: nn.Module | None, inference: InferenceConfig, size: tuple[int, int]) -> int | None:
    """Return the operations of all forward passes of one image, as torch's FlopCounterMode counts them.

    Matrix products, convolutions and attention count, two for each multiplication with its addition; what lies around
    them does not. Weights and images are put on the meta device for it: nothing is computed.

    Args:
        network: of the predictor; None has no count.
        inference: the protocol: its windows, mirrors and scales.
        size: (height, width) of the image.

    Returns:
        None where the network has operators without shape functions, such as those of exported programs.
    """
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper would be traced, with a warning
    if network is None or isinstance(network, torch.jit.ScriptModule):
        return None
    windows = Counter(plan.window for plan in plan_views(size, inference) for _ in plan.origins)
    try:
        # a module may keep one tensor under two names
        tensors = {
            n: t.detach().to("meta") for n, t in itertools.chain(network.named_parameters(), network.named_buffers())
        }
        return sum(number * _flops(network, tensors, window) for window, number in windows.items())
    except Exception:  # of the many kinds that operators without a meta implementation raise
        return None


def _flops(network: nn.Module, tensors: dict[str, Any], window: tuple[int, int]) -> int:
    images = torch.empty(1, 3, *window, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, tensors, (images,))
    return int(counter.get_total_flops())
