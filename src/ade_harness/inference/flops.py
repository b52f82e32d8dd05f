"""What one image costs a network: floating-point operations, counted on shapes alone."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ade_harness.config.inference import InferenceConfig
from ade_harness.inference.plan import plan_views


def flops_of_image(
    network: nn.Module | None, inference: InferenceConfig, size: tuple[int, int], own_hooks: bool = True
) -> int | None:
    """Return the operations of all forward passes of one image, as torch's FlopCounterMode counts them.

    Matrix products, convolutions and attention count, two for each multiplication with its addition; what lies around
    them does not. A copy of the network on the meta device takes them: nothing is computed, and what a forward keeps
    (tables by the input's size) stays out of the network itself.

    Args:
        network: of the predictor; None has no count.
        inference: the protocol: its windows, mirrors and scales.
        size: (height, width) of the image.
        own_hooks: whether its hooks are the network's own: backbones of transformers pass their features by some. Those
            of a network in the caller's memory may be somebody else's, who would see tensors without values.

    Returns:
        None where the network has operators without shape functions, such as those of exported programs.
    """
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper would be traced, with a warning
    if network is None or isinstance(network, torch.jit.ScriptModule):
        return None
    windows = Counter(plan.window for plan in plan_views(size, inference) for _ in plan.origins)
    try:
        on_meta = _copy_on_meta(network, own_hooks)
        return sum(number * _flops(on_meta, window) for window, number in windows.items())
    except Exception:  # of the many kinds that operators without a meta implementation raise
        return None


def _copy_on_meta(network: nn.Module, hooks: bool) -> nn.Module:
    """Return a copy that shares nothing with a network, and has no memory of weights; perhaps without its hooks."""
    known: dict[int, Any] = {}
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        on_meta = tensor.detach().to("meta")
        is_weight = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = nn.Parameter(on_meta, requires_grad=False) if is_weight else on_meta
    copied = copy.deepcopy(network, known)
    for module in () if hooks else copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        if "_output_capturing_hooks_installed" in vars(module):  # transformers' own, which it makes anew
            module._output_capturing_hooks_installed = False  # type: ignore[assignment]
    return copied


def _flops(network: nn.Module, window: tuple[int, int]) -> int:
    images = torch.empty(1, 3, *window, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    return int(counter.get_total_flops())
