"""Launch the kernels on a GPU that is not there, and print which were compiled when, as JSON.

Everything of Triton runs but the driver: it takes the launcher's arguments apart, looks for a compiled kernel, compiles
one for the target, and hands arguments over. Tensors lie on the CPU and say that they are on a GPU; nothing is written.

Run as a program of its own: the tests' process has TRITON_INTERPRET=1, under which nothing is compiled.
Usage: launch_ahead.py ARCH, such as 90.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ade_harness.kernels import triton_gpu
from ade_harness.kernels.views import PixelStatistics, Placement, View, whole

launched: list[str] = []
"""Each launch: the kernel's name."""
compiled: list[str] = []
"""Each compilation: the kernel's name and its constants."""


class OnGPU(Tensor):
    """A tensor on the CPU that says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Return the GPU."""
        return torch.device("cuda:0")


class Driver:
    """What Triton asks of a GPU's driver."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        properties = {"max_shared_mem": 100 << 10}
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (name, name, 0, 0, 1024), get_device_properties=lambda _: properties
        )

    def get_current_device(self) -> int:
        """Return the number of the GPU."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Return the default stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return self.target

    def launcher_cls(self, source: Any, _metadata: Any) -> Any:
        """Return what launches a kernel: limits of a grid are CUDA's."""
        types = list(source.signature.values())

        def launch(x: int, y: int, z: int, _stream: int, _function: Any, _packed: Any, *rest: Any) -> None:
            arguments = rest[3:]  # after the metadata and two hooks
            assert 0 < x < 2**31
            assert 0 < min(y, z) <= max(y, z) < 2**16
            assert len(arguments) == len(types)
            for kind, given in zip(types, arguments, strict=True):
                if kind == "i32":
                    assert -(2**31) <= given < 2**31
                elif kind.startswith("*"):
                    assert isinstance(given, OnGPU), (source.name, kind, given)  # no address of the host
            launched.append(source.name)

        return launch


def on_gpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of zeros."""
    return torch.zeros(*size, dtype=dtype).as_subclass(OnGPU)


def prepare(arch: int) -> None:
    """Replace the driver, and what of torch needs a GPU."""
    triton.runtime.driver.set_active(Driver(arch))
    made = {name: getattr(torch, name) for name in ("empty", "zeros", "full_like", "arange")}
    for name, real in made.items():

        def allocate(*given: Any, real: Any = real, **options: Any) -> Tensor:
            options.pop("device", None)
            found: Tensor = real(*given, **options).as_subclass(OnGPU)
            return found

        setattr(torch, name, allocate)
    torch.equal = lambda *_: True  # type: ignore[assignment]
    module: Any = triton_gpu
    module._on_device = lambda numbers, _: torch.tensor(list(numbers), dtype=torch.int64).as_subclass(OnGPU)
    module.constant = lambda values, *_: torch.tensor(values).as_subclass(OnGPU)
    module._label_views, module._enlarge_masks = triton_gpu.launch_labels, triton_gpu.launch_masks
    module._count_pixels, module._count_invalid = triton_gpu.launch_count, triton_gpu.launch_count_invalid
    module._normalise = triton_gpu.launch_normalise
    nothing = on_gpu(*triton_gpu._SIZE, dtype=torch.uint8)
    plain = ("merge", "normalise", "count", "mask_probabilities")
    module.reference = SimpleNamespace(**dict.fromkeys(plain, lambda *_: nothing))
    samples, more = triton_gpu._sample_views, triton_gpu._more_cases

    def moved(views: Sequence[View]) -> list[View]:
        return [replace(view, scores=view.scores.as_subclass(OnGPU)) for view in views]

    module._sample_views, module._more_cases = lambda: moved(samples()), lambda: moved(more())

    def noted(**facts: Any) -> None:
        signature = {name: kind for name, kind in facts["compile"]["signature"].items() if kind != "constexpr"}
        values = list(facts["compile"]["constants"].values())
        compiled.append(f"{facts['fn'].name.rpartition('.')[2]} {values} {signature}")

    triton.knobs.runtime.jit_post_compile_hook = noted


def run(size: tuple[int, int], channels: int, dtype: torch.dtype) -> None:
    """Do what a run may do with an image of this size, by any protocol."""
    height, width = size
    low = (max(1, height // 4), max(1, width // 4))
    scores = on_gpu(1, channels, *low, dtype=dtype)
    half = (max(1, height // 2), max(1, width // 2))
    places = ((0, 0), (height - half[0], 0), (0, width - half[1]), (height - half[0], width - half[1]))
    parts = on_gpu(4, channels, *low, dtype=dtype)
    views: Sequence[View] = [
        whole(scores[0], size),
        whole(scores[0], (height + 7, width + 16), (3, 8, height, width), flipped=True),
        View(parts, places, half, size),
    ]
    for view in views:
        labels = triton_gpu.merge([view], size, False)
        triton_gpu.merge([view], (height + 5, 16), False)
    triton_gpu.merge(views, size, False)
    triton_gpu.count(labels, labels, 150)
    if dtype != torch.float32:
        return  # of sums over queries, whose protocols average scores
    triton_gpu._merge(views, (height + 5, 16), True)
    triton_gpu.invalid_share([scores, parts])
    pixels = on_gpu(height, width, 3, dtype=torch.uint8)
    for placement in (None, Placement((height + 16, width + 1), (0, 1), True, 0.0)):
        triton_gpu.normalise(pixels, PixelStatistics((1.0,) * 3, (2.0,) * 3), placement)
    for out in (torch.float32, torch.bfloat16):
        masks = on_gpu(1, channels, *low)
        triton_gpu._mask_probabilities(masks, size, (0, 0, *size), size, out)
        triton_gpu._mask_probabilities(masks, size, (0, 0, *size), (height + 5, 16), out)


def main(arch: int) -> None:
    """Print what the comparison compiles, and what images do after it."""
    prepare(arch)
    found: dict[str, Any] = {}
    triton_gpu._agrees(0)
    triton_gpu._softmax_fault(0)
    triton_gpu._sigmoid_fault(0)
    found["comparison"] = list(compiled)
    for name, dtype in (("images", torch.float32), ("sums in bfloat16", torch.bfloat16)):
        compiled.clear()
        for size in ((512, 683), (256, 256), (16, 16), (1, 1), (1600, 1600), (2113, 33)):
            for channels in (150, 151, 16, 1):
                run(size, channels, dtype)
        found[name] = list(compiled)
    found["launches"] = {name: launched.count(name) for name in sorted(set(launched))}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
