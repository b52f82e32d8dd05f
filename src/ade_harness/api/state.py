"""The caller's process and network stay as they were: an evaluation in a training loop or a notebook leaves no trace.

What belongs to the whole process (torch's switches, generators of random numbers) is set by the first evaluation that
begins and given back by the last one that ends, so that evaluations in several threads do not undo each other's. A
network is evaluated by one thread at a time: the next one waits.
"""

from __future__ import annotations

import copy
import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ade_harness.errors import HarnessError
from ade_harness.runtime.lifetime import exit_location

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_composing = threading.RLock()
_process = threading.Lock()
_modules: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""A lock for each module that was evaluated: two networks may share a backbone."""


@dataclass(frozen=True)
class _Before:
    """What the process was like before the first evaluation."""

    python: Any
    numpy: Any
    torch: Any
    cuda: list[Any]
    threads: int
    switches: tuple[bool, bool, bool]
    """cuDNN's: deterministic, benchmark, attention."""
    tf32: tuple[bool, bool] | None
    """Torch's older switches: of matrix products, of cuDNN. None: the caller uses the newer ones."""
    matmul: str | None
    """``torch.get_float32_matmul_precision``, if torch gives it: not after ``allow_tf32`` was set."""
    precisions: tuple[str, ...]
    """Values of torch's newer switches, in the order of :func:`_newer`."""
    strict: bool
    warns: bool
    workspace: str | None
    """cuBLAS's, from the environment."""


@dataclass
class _Active:
    """Evaluations under way in this process."""

    number: int = 0
    precision: str | None = None
    before: _Before | None = None


_active = _Active()


@contextmanager
def callers_hydra() -> Iterator[None]:
    """Compose configurations without touching those of a caller that is a Hydra application itself."""
    with _composing:
        Plugins.instance()  # they register what they offer once in a process, so before the copy is made
        instance, store = GlobalHydra.instance(), ConfigStore.instance()
        hydra, repository = instance.hydra, store.repo
        store.repo = copy.deepcopy(repository)  # Hydra's own entries are in it too
        instance.hydra = None
        try:
            yield
        finally:
            GlobalHydra.set_instance(instance)  # Hydra's own contexts leave a copy
            instance.hydra, store.repo = hydra, repository


@contextmanager
def callers_process() -> Iterator[None]:
    """Set torch's switches as every evaluation does, and give everything back, random numbers too.

    Imports belong inside: some libraries draw random numbers when they are imported.

    Raises:
        HarnessError: in place of a SystemExit, by which a model would end the caller's program as if all were well.
    """
    with _process:
        if not _active.number:
            _active.before, _active.precision = _remember(), None
            _set_switches()
        _active.number += 1
    try:
        yield
    except SystemExit as error:
        raise HarnessError(exit_location(error)) from error
    finally:
        with _process:
            _active.number -= 1
            if not _active.number and _active.before is not None:
                _give_back(_active.before)
                _active.before = None


def begin(precision: str, seed: int) -> None:
    """Say how an evaluation computes, before it does; the first one seeds the generators, for networks that draw.

    Torch's default type stays as it is: a network may make tensors by it.

    Args:
        precision: ``inference.precision``.
        seed: ``runtime.seed``.

    Raises:
        HarnessError: another evaluation in this process needs other switches, torch's default type is not float32,
            in which images, and so scores, are, or its default device is not the CPU.
    """
    if torch.get_default_dtype() != torch.float32:
        name = str(torch.get_default_dtype()).removeprefix("torch.")
        raise HarnessError(
            f"torch's default dtype is {name}: scores would differ from those of any other run."
            " torch.set_default_dtype(torch.float32) before, and back afterwards; inference.precision chooses how the"
            " network computes."
        )
    require_usual_device()
    with _process:
        if _active.precision is None:
            _active.precision = precision
            _seed(seed)
        if (precision == "tf32") != (_active.precision == "tf32"):
            raise HarnessError(
                f"another evaluation is under way in this process with inference.precision={_active.precision}, and"
                f" torch has one switch of TF32 for all threads: wait for it, or evaluate {precision} in a process of"
                " its own."
            )


def require_usual_device() -> None:
    """Raise HarnessError if torch's default device is not the CPU, where images are prepared and counts are kept."""
    if torch.get_default_device().type != "cpu":
        raise HarnessError(
            f"torch's default device is {torch.get_default_device()}: images and counts would be made there."
            " torch.set_default_device('cpu') before, and back afterwards; device= chooses where the network computes."
        )


@contextmanager
def callers_network(network: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Have a network in evaluation mode on a device; it gets its modes, buffers and device back.

    Modules that override ``train`` (as those that merge low-rank weights in evaluation, or freeze layers) are asked to
    go back by it, and get the bits of their own parameters, since merging rounds.

    The device is the current one meanwhile, which is where kernels are launched and events recorded.
    """
    with ExitStack() as locks:
        if device.type == "cuda":
            locks.enter_context(torch.cuda.device(device))
        if network is None:
            yield
            return
        for lock in _locks_of(network):
            locks.enter_context(lock)
        # what was frozen or exported has one mode, and no such attribute
        modes = [(module, module.training) for module in network.modules() if hasattr(module, "training")]
        home = device_of(network)
        own = [module for module, _ in modes if type(module).train is not nn.Module.train]
        kept = [(p, p.detach().clone()) for module in own for p in module.parameters(recurse=False)]
        wanted = [(p, p.requires_grad) for p in network.parameters()]
        buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
        try:
            _evaluation_mode(network, [module for module, _ in modes])
            if home is not None and home != device:
                network.to(device)
            yield
        finally:
            if home is not None and home != device:
                network.to(home)
            if own:
                _back_by_their_train(own, {id(module): mode for module, mode in modes})
            for module, mode in modes:
                module.training = mode
            for parameter, wants in wanted:
                if parameter.requires_grad != wants:
                    parameter.requires_grad_(wants)
            with torch.no_grad():
                _copy_back([*kept, *((b, buffers[n]) for n, b in network.named_buffers() if n in buffers)])


def _back_by_their_train(modules: list[nn.Module], modes: dict[int, bool]) -> None:
    """Put modules into their modes by their own ``train``, the outermost first; what refuses gets the attribute."""
    for module in modules:
        with suppress(NotImplementedError, AttributeError, RuntimeError):
            module.train(modes[id(module)])


def _copy_back(values: list[tuple[Tensor, Tensor]]) -> None:
    """Give tensors the values that they had, where an evaluation has changed them."""
    for now, before in values:
        if now.shape == before.shape and not torch.equal(now, before.to(now.device)):
            # what was made in that mode may be changed in it alone
            with torch.inference_mode() if now.is_inference() else nullcontext():
                now.copy_(before)


def _evaluation_mode(network: nn.Module, modules: list[nn.Module]) -> None:
    """Have a network evaluate, also if a part of it refuses to be put into a mode: what torch.export gives does."""
    try:
        network.eval()
    except (NotImplementedError, AttributeError, RuntimeError):
        for module in modules:
            module.training = False


def _locks_of(network: nn.Module) -> list[threading.RLock]:
    """Return the locks of all modules, in one order for all threads: none waits for another in a circle."""
    with _process:
        found = {id(module): _modules.setdefault(module, threading.RLock()) for module in network.modules()}
    return [found[number] for number in sorted(found)]


def device_of(network: nn.Module) -> torch.device | None:
    """Return where a network's weights are; None if it has none.

    Raises:
        HarnessError: they are on several devices, or on none, or have no shape yet.
    """
    unknown = [n for n, t in (*network.named_parameters(), *network.named_buffers()) if is_lazy(t)]
    if unknown:
        raise HarnessError(
            f"the network's {unknown[0]} has no shape yet (a lazy layer): call it once on an image before, or load its"
            " weights."
        )
    devices = {tensor.device for tensor in [*network.parameters(), *network.buffers()]}
    if len(devices) > 1 or any(device.type == "meta" for device in devices):
        raise HarnessError(
            f"the network's weights are on {', '.join(sorted(map(str, devices)))}: expected one device. Move it to one,"
            " or evaluate it by name with devices=1."
        )
    return next(iter(devices), None)


def _remember() -> _Before:
    backends = torch.backends
    return _Before(
        random.getstate(),
        np.random.get_state(),
        torch.get_rng_state(),
        torch.cuda.get_rng_state_all() if _uses_cuda() else [],
        torch.get_num_threads(),
        (backends.cudnn.deterministic, backends.cudnn.benchmark, bool(backends.cuda.cudnn_sdp_enabled())),  # type: ignore[no-untyped-call]
        _older(),
        _matmul(),
        tuple(newer.fp32_precision for newer in _newer()),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        os.environ.get(_WORKSPACE),
    )  # fmt: skip


def _older() -> tuple[bool, bool] | None:
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:  # torch reads them no more once a newer one has been set otherwise
        return None


def _matmul() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _newer() -> list[Any]:
    """Return what has torch's newer switch ``fp32_precision``, the general before the particular; none before 2.9."""
    b: Any = torch.backends
    if not hasattr(b, "fp32_precision"):
        return []
    return [b, b.cuda.matmul, b.cudnn, b.cudnn.conv, b.cudnn.rnn, b.mkldnn, b.mkldnn.matmul]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also decide what CUDA begins with later
    if _uses_cuda():
        torch.cuda.manual_seed_all(seed)


def _set_switches() -> None:
    if not _uses_cuda():  # read when CUDA starts; a process that uses it has chosen
        os.environ.setdefault(_WORKSPACE, ":4096:8")
    backends = torch.backends
    backends.cudnn.deterministic, backends.cudnn.benchmark = True, False
    backends.cuda.enable_cudnn_sdp(False)  # as in the command line's runs (runtime/ranks.py)
    if _older() is None:
        for newer in _newer():
            newer.fp32_precision = "none"
    if _matmul() not in (None, "highest"):
        torch.set_float32_matmul_precision("highest")
    if backends.cuda.matmul.allow_tf32:
        backends.cuda.matmul.allow_tf32 = False
    backends.cudnn.allow_tf32 = False
    if torch.are_deterministic_algorithms_enabled():  # it would give every bilinear upsampling other bits on CUDA
        torch.use_deterministic_algorithms(False)


def _give_back(before: _Before) -> None:
    random.setstate(before.python)
    np.random.set_state(before.numpy)
    torch.set_rng_state(before.torch)
    if before.cuda:
        torch.cuda.set_rng_state_all(before.cuda)
    if torch.get_num_threads() != before.threads:
        torch.set_num_threads(before.threads)
    backends: Any = torch.backends
    backends.cudnn.deterministic, backends.cudnn.benchmark, of_attention = before.switches
    backends.cuda.enable_cudnn_sdp(of_attention)
    if before.tf32 is not None:
        of_products, backends.cudnn.allow_tf32 = before.tf32
        if before.matmul is not None and _matmul() != before.matmul:
            torch.set_float32_matmul_precision(before.matmul)
        if backends.cuda.matmul.allow_tf32 != of_products:
            backends.cuda.matmul.allow_tf32 = of_products
    else:
        backends.cudnn.allow_tf32 = True  # torch's default, with which the newer ones agree
    for newer, value in zip(_newer(), before.precisions, strict=True):
        if newer.fp32_precision != value:
            newer.fp32_precision = value
    if before.workspace is None:
        os.environ.pop(_WORKSPACE, None)
    if torch.are_deterministic_algorithms_enabled() != before.strict:
        torch.use_deterministic_algorithms(before.strict, warn_only=before.warns)


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
