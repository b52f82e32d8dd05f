"""Acceptance on real GPUs: `python benchmarks/gpu_acceptance.py [--parts exact waits ...] [--minutes 8] [--out FILE]`.

Each line is PASS, FAIL, INFO or SKIP; the exit code is 1 after a FAIL. With several GPUs the last part uses them all.
A part for which no time is left is a SKIP; the time of each is on its last line.
Without a GPU the parts run small on the CPU, kernels in Triton's interpreter: that shows that this program works,
and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import machine_code  # noqa: E402
import triton  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from ade_harness import kernels  # noqa: E402
from ade_harness.config.compose import compose_config  # noqa: E402
from ade_harness.data.ade20k_labels import ade20k_classes  # noqa: E402
from ade_harness.errors import HarnessError  # noqa: E402
from ade_harness.inference.factory import open_network  # noqa: E402
from ade_harness.inference.forward import BatchedForward  # noqa: E402
from ade_harness.inference.memory import peaks  # noqa: E402
from ade_harness.inference.network import NetworkPredictor  # noqa: E402
from ade_harness.inference.plan import plan_views  # noqa: E402
from ade_harness.inference.predictor import Prepared  # noqa: E402
from ade_harness.inference.stopwatch import Stopwatch  # noqa: E402
from ade_harness.kernels import View, reference, triton_gpu, triton_jit, whole  # noqa: E402
from ade_harness.models.loaded import LoadedModel  # noqa: E402
from ade_harness.models.ops import deformable  # noqa: E402
from ade_harness.runs.ledger import read_rows  # noqa: E402
from ade_harness.runtime.cluster import usable_gpus  # noqa: E402
from ade_harness.runtime.ranks import set_arithmetic  # noqa: E402

DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
CLASSES = 150 if CUDA else 7
SCORES = (128, 171) if CUDA else (16, 20)
SIZE = (512, 683) if CUDA else (64, 80)
MODELS = (
    ("model=segformer_b0",), ("model=segformer_b0", "inference=mmseg_slide_512"), ("model=mask2former_swin_t",)
) if CUDA else ((),)  # fmt: skip
_lines: list[dict[str, Any]] = []
_SLEEP_CYCLES = 200_000_000
"""About 0.1 s of a GPU."""
_QUEUE = 900
"""Launches that a GPU's queue certainly holds: with more, the host waits for the first to end."""
_end = [float("inf")]
"""When the time is up, on the clock of `time.monotonic`."""


def report(verdict: str, what: str, **facts: Any) -> None:
    """Print one line and keep it."""
    _lines.append({"verdict": verdict, "what": what, **facts})
    print(f"{verdict:5} {what}  " + "  ".join(f"{key}={value}" for key, value in facts.items()), flush=True)


def check(holds: bool, what: str, **facts: Any) -> None:
    """Tell whether something holds."""
    report("PASS" if holds else "FAIL", what, **facts)


def native(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Torch's own bilinear kernel: [N, C, H, W]."""
    return torch.ops.aten.upsample_bilinear2d(scores, list(size), False)


def scores_of(kind: str, seed: int = 0) -> Tensor:
    """Return scores [C, h, w] as noise, in regions of one class, or with many ties."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(CLASSES, *SCORES, generator=generator)
    if kind == "regions":
        owner = torch.randint(0, CLASSES, (1, SCORES[0] // 8, SCORES[1] // 8), generator=generator)
        owner = nn.functional.interpolate(owner[None].float(), SCORES, mode="nearest")[0].long()
        scores = (0.3 * scores).scatter_add_(0, owner, torch.full(owner.shape, 8.0))
    return (scores.round() if kind == "ties" else scores).to(DEVICE)


def gpu_milliseconds(function: Callable[[], Any], calls: int = 20) -> float:
    """Return the time of a call on the device alone, of one that never waits for it.

    The calls are queued while the GPU sleeps: else what is measured is how fast Python launches.
    """
    for _ in range(3):
        function()
    if not CUDA:
        return milliseconds(function, 0)
    torch.cuda.synchronize()
    torch.cuda._sleep(_SLEEP_CYCLES)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / calls


def milliseconds(function: Callable[[], Any], seconds: float = 0.4) -> float:
    """Return the median time of a call that may wait for the device, the host's part included."""
    function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        if CUDA:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return float(np.median(times))


def environment() -> None:
    """Say what this is."""
    names = [torch.cuda.get_device_name(i) for i in range(usable_gpus())]
    cudnn = torch.backends.cudnn.version() if CUDA else None
    report("INFO", "environment", torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda,
         cudnn=cudnn, gpus=names or "none", cores=len(os.sched_getaffinity(0)))  # fmt: skip
    chosen, reason = kernels.selection("auto", DEVICE.type)
    check(reason is None, "the compiled kernels are chosen", kernels=kernels.name_of(chosen), reason=reason)
    _, why = deformable.compiled(DEVICE.type)
    check(why is None, "the compiled deformable attention is chosen", reason=why)


def exact() -> None:
    """Compare labels with torch's own kernels and argmax, every bit."""
    size = (SIZE[0] * 3 // 4, SIZE[1] * 3 // 4) if CUDA else (70, 90)
    for kind in ("noise", "regions", "ties"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            scores = scores_of(kind).to(dtype)
            for name, canvas in (("one step", size), ("two steps", SIZE)):
                planes = native(scores[None].float(), canvas)
                planes = planes if canvas == size else native(planes, size)
                found = triton_gpu.merge([whole(scores, canvas)], size, False)
                differ = int((found != planes[0].argmax(0)).sum())
                check(differ == 0, f"labels equal interpolate + argmax: {kind}, {dtype}, {name}", differ=differ)
    infinite = scores_of("noise")
    infinite[2] = -torch.inf
    if CUDA:  # its CPU kernel makes NaN where the size stays
        differ = int((triton_gpu.label_map(infinite, SCORES) != native(infinite[None], SCORES)[0].argmax(0)).sum())
        check(differ == 0, "labels equal interpolate + argmax: a size that stays, infinite scores", differ=differ)
        last = infinite.to(memory_format=torch.contiguous_format)[None].contiguous(memory_format=torch.channels_last)
        there = native(last, SIZE)[0].argmax(0)
        report("INFO", "labels of channels-last logits, which torch upsamples by another kernel",
             differ=int((triton_gpu.label_map(infinite, SIZE) != there).sum()))  # fmt: skip
    for odd in ((7, 5), (33, 129), (1, 1)):
        small = torch.randn(CLASSES, *odd, generator=torch.Generator().manual_seed(4)).to(DEVICE)
        target = (odd[0] * 5 + 1, odd[1] * 3 + 2)
        differ = int((triton_gpu.label_map(small, target) != native(small[None], target)[0].argmax(0)).sum())
        verdict = "PASS" if differ == 0 else "FAIL" if CUDA else "INFO"  # torch's CPU code has other kernels for these
        report(verdict, f"labels equal interpolate + argmax: {odd[0]}x{odd[1]}", differ=differ)
    windows = ((0, 0), (0, SIZE[1] - SIZE[0]))
    parts = torch.stack([scores_of("noise", seed)[:, :, : SCORES[0]] for seed in (1, 2)])
    slide = View(parts, windows, (SIZE[0], SIZE[0]), SIZE)
    views = [slide, replace(slide, scores=parts.flip(0), flipped=True), whole(scores_of("regions", 3), SIZE)]
    for name, case, soft in (("windows", [slide], False), ("views", views, False), ("softmax of views", views, True)):
        if not CUDA and soft:
            continue  # minutes in the interpreter
        differ = int((triton_gpu._merge(case, size, soft) != reference.merge(case, size, soft)).sum())
        replaced = soft and not triton_gpu.softmax_agrees_with_torch()  # then a run takes plain torch
        verdict = "PASS" if differ == 0 else "INFO" if replaced else "FAIL"
        report(verdict, f"labels equal plain torch: {name}", differ=differ)
    masks = 4 * scores_of("noise", 5)[None]
    for dtype in (torch.float32, torch.bfloat16):
        for name, area, to in (
            ("one step", (0, 0, *SIZE), SIZE),
            ("two steps", (2, 3, SIZE[0] - 9, SIZE[1] - 8), size),
        ):
            steps = (masks, SIZE, area, to, dtype)  # of the results; a run's forward gives float32
            differ = int((triton_gpu._mask_probabilities(*steps) != reference.mask_probabilities(*steps)).sum())
            replaced = not triton_gpu.sigmoid_agrees_with_torch()  # as in the interpreter, whose exp is NumPy's
            verdict = "PASS" if differ == 0 else "INFO" if replaced else "FAIL"
            report(verdict, f"mask probabilities equal plain torch: {dtype}, {name}", differ=differ)
    truth = torch.randint(0, CLASSES + 1, SIZE, generator=torch.Generator().manual_seed(1)).to(torch.uint8).to(DEVICE)
    labels = truth.roll(3, 1)
    counted, expected = triton_gpu.count(labels, truth, CLASSES), reference.count(labels, truth, CLASSES)
    check(torch.equal(counted, expected), "counts equal plain torch")
    for number in range(usable_gpus()):
        with torch.cuda.device(number):
            check(triton_gpu.agrees_with_torch(), f"all kernels equal torch on GPU {number}")
        # tensors on one GPU while another is the current one
        scores = scores_of("noise").to(f"cuda:{number}")
        found, first = (triton_gpu.label_map(s, SIZE).cpu() for s in (scores, scores_of("noise")))
        check(torch.equal(found, first), f"labels of a tensor on GPU {number} while GPU 0 is the current one")


def large() -> None:
    """Index more scores than 32 bits count."""
    if not CUDA or torch.cuda.mem_get_info()[0] < 24 << 30:
        report("SKIP", "more than 2^31 scores", needs="24 GiB of free GPU memory")
        return
    height, width = 4000, 6000
    expected = torch.randint(0, 150, (height, width), device=DEVICE)
    scores = torch.zeros((150, height, width), dtype=torch.float16, device=DEVICE).scatter_(0, expected[None], 1.0)
    found = triton_gpu.merge([whole(scores, (height, width))], (height, width), False)
    check(torch.equal(found.long(), expected), "more than 2^31 scores", wrong=int((found != expected).sum()))


def speed() -> None:
    """Time the label step beside plain torch and the naive way, and beside a copy of as many bytes."""
    scores = scores_of("regions")
    size = (SIZE[0] * 3 // 4, SIZE[1] * 3 // 4)
    moved = torch.empty(scores.numel() * 4 + size[0] * size[1], dtype=torch.uint8, device=DEVICE)
    halves = moved[: len(moved) // 2], moved[len(moved) // 2 :][: len(moved) // 2]
    rows: dict[str, Callable[[], Any]] = {
        "naive": lambda: native(native(scores[None], SIZE), size)[0].argmax(0),
        "plain torch": lambda: reference.merge([whole(scores, SIZE)], size, False),
        "Triton, two steps": lambda: triton_gpu.merge([whole(scores, SIZE)], size, False),
        "Triton, one step": lambda: triton_gpu.label_map(scores, SIZE),
        "a copy of the bytes": lambda: halves[0].copy_(halves[1]),
    }
    times = {name: gpu_milliseconds(function) for name, function in rows.items()}
    for name, spent in times.items():
        report("INFO", f"label step, {name}", ms=round(spent, 4), of_naive=round(spent / times["naive"], 3))


class _Recorded:
    """A jitted function that keeps what its last launch ran."""

    def __init__(self, function: Any) -> None:
        self.function, self.grid, self.made = function, (0, 0), None

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.grid, self.made = grid, self.function[grid](*arguments, **options)
            return self.made

        return launch


def bound() -> None:
    """Time the label step beside what its bytes and its instructions take at least on this GPU.

    Bytes: low-resolution scores read once and labels written once, at the rate of a large copy here. Instructions:
    those of the kernel's machine code, every scheduler issuing one a cycle at the GPU's highest clock.
    """
    if not CUDA or torch.version.hip:
        report("SKIP", "bounds of the label step", needs="a GPU of Nvidia's")
        return
    gpu = torch.cuda.get_device_properties(DEVICE)
    if not getattr(gpu, "clock_rate", 0):
        report("SKIP", "bounds of the label step", needs="the GPU's clock rate, which CUDA does not say here")
        return
    large_copy = torch.empty((2, 1 << 30), dtype=torch.uint8, device=DEVICE)
    gib_per_ms = 2 / gpu_milliseconds(lambda: large_copy[0].copy_(large_copy[1]))
    scores, launched = scores_of("regions"), triton_jit.label_tile
    two_steps = (SIZE[0] * 3 // 4, SIZE[1] * 3 // 4)
    for name, size, block in (("one step", SIZE, 0), ("two steps", two_steps, 1)):
        kept = _Recorded(launched)
        triton_jit.label_tile = kept
        try:
            triton_gpu.merge([whole(scores, SIZE)], size, False)
        finally:
            triton_jit.label_tile = launched
        code = machine_code.read(kept.made.asm["cubin"])
        warps = kept.grid[0] * kept.grid[1] * kept.made.metadata.num_warps
        if len(code.loops) != 1:
            report("SKIP", f"bounds of the label step, {name}", needs="machine code of one loop", loops=code.loops)
            continue
        executed = code.executed(triton.cdiv(CLASSES, triton_gpu.BLOCKS["cuda"][block]))
        by_code = machine_code.least_milliseconds(warps, executed, gpu.multi_processor_count, gpu.clock_rate)
        by_bytes = (scores.numel() * scores.element_size() + size[0] * size[1]) / 2**30 / gib_per_ms
        spent = gpu_milliseconds(lambda size=size: triton_gpu.merge([whole(scores, SIZE)], size, False))
        report("INFO", f"label step beside its bounds, {name}", ms=round(spent, 4), ms_of_bytes=round(by_bytes, 4),
             ms_of_instructions=round(by_code, 4), of_the_higher_bound=round(spent / max(by_code, by_bytes), 2),
             instructions_a_warp=executed, gib_per_s=round(1000 * gib_per_ms))  # fmt: skip


def _ready(given: tuple[str, ...]) -> tuple[NetworkPredictor, Prepared, Tensor]:
    weights = ["model.weights=random"] if given else []
    predictor = open_network(compose_config([*given, *weights]), ade20k_classes())
    predictor.network.to(DEVICE)
    image = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    prepared = predictor.prepare("image", image)
    if CUDA:
        prepared = replace(prepared, pixels=tuple(p.pin_memory() for p in prepared.pixels))
    return predictor, prepared, torch.zeros(SIZE, dtype=torch.uint8, device=DEVICE)


def waits() -> None:
    """Count what makes the host wait inside an image, and the launches, and time the host beside the GPU."""
    from torch.profiler import ProfilerActivity, profile

    chosen = kernels.select("auto", DEVICE.type)
    for given in MODELS:
        predictor, prepared, target = _ready(given)

        def once(predictor: Any = predictor, prepared: Any = prepared, target: Any = target) -> Tensor:
            [made] = predictor.predict([prepared], DEVICE, Stopwatch(DEVICE))
            return chosen.count(made.labels, target, 150)

        name = " ".join(given) or "the demo's network"
        once()
        if not CUDA:
            report("SKIP", f"waits of {name}", needs="a GPU")
            continue
        once()
        torch.cuda.synchronize()
        where = _waits_in(predictor, once, target)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            once()
            torch.cuda.synchronize()
        launches = sum(e.count for e in seen.key_averages() if "LaunchKernel" in e.key)
        beside = launches - _launches_of_network(predictor, once)
        torch.cuda.reset_peak_memory_stats()
        once()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda._sleep(10 * _SLEEP_CYCLES)
        asleep = torch.cuda.Event()
        asleep.record()
        begin = time.perf_counter()
        once()
        queued = time.perf_counter() - begin
        text, asleep_still = f"the host has queued an image before the GPU has begun: {name}", not asleep.query()
        if 0 < launches < _QUEUE:  # without CUPTI none is seen
            check(asleep_still, text, host_ms=round(1000 * queued, 2))
        else:
            report("INFO", text, held=asleep_still, host_ms=round(1000 * queued, 2), needs=f"under {_QUEUE} launches")
        torch.cuda.synchronize()
        plans = plan_views(SIZE, predictor.cfg)
        parts = max(len(plans), sum(len(p.origins) for p in plans))
        allowed = 3 * parts + (10 if "mask2former" in name else 8)  # cuBLAS may take two kernels for a product
        if launches:
            check(0 < beside <= allowed, f"launches beside the network: {name}", launches=beside, allowed=allowed,
                  network=launches - beside)  # fmt: skip
        else:
            report(
                "SKIP", f"launches beside the network: {name}", needs="CUPTI, by which torch's profiler sees launches"
            )
        system = given[0].partition("=")[2]
        computed = peaks()[system]["fp32"] / 1024
        check(peak <= computed + 1.5, f"peak memory is what was computed: {name}", gib=round(peak, 2),
              computed_gib=round(computed, 2))  # fmt: skip
        begin = time.perf_counter()
        for _ in range(20):
            once()
        host = 50 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        both = 50 * (time.perf_counter() - begin)
        check(not where, f"nothing waits for the GPU: {name}", where=dict(where), host_ms=round(host, 2),
              with_gpu_ms=round(both, 2))  # fmt: skip


def others() -> None:
    """Count what makes the host wait inside an image of other architectures, and nothing else of them."""
    for name in ("vit_adapter_beitv2_l", "eomt_l", "oneformer_swin_l", "internimage_h", "dinov2_g_linear"):
        needed = peaks()[name]["fp32"] / 1024 + 1.5
        torch.cuda.empty_cache()
        if not CUDA or torch.cuda.mem_get_info()[0] < needed * 2**30:
            report("SKIP", f"waits of {name}", needs=f"a GPU with {needed:.1f} GiB free")
            continue
        where = _waits_of(name)
        check(not where, f"nothing waits for the GPU: {name}", where=dict(where))


def _waits_of(system: str) -> Counter[str]:
    predictor, ready, target = _ready((f"model={system}",))

    def once(prepared: Prepared = ready, target: Tensor = target) -> list[Any]:
        return predictor.predict([prepared], DEVICE, Stopwatch(DEVICE))

    once()
    return _waits_in(predictor, once, target)


def _waits_in(predictor: NetworkPredictor, once: Callable[..., Any], target: Tensor) -> Counter[str]:
    """Return the lines at which the host waits, in an image of a size that has not come yet: nothing is kept of it."""
    other = predictor.prepare("other", np.zeros((SIZE[0] - 40, SIZE[1] - 24, 3), np.uint8))
    other = replace(other, pixels=tuple(p.pin_memory() for p in other.pixels))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            once(prepared=other, target=target[: SIZE[0] - 40, : SIZE[1] - 24])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


def _launches_of_network(predictor: NetworkPredictor, once: Callable[[], Any]) -> int:
    """Return how many kernels the forwards of one image start."""
    from torch.profiler import ProfilerActivity, profile

    given: list[Tensor] = []
    handle = predictor.network.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    once()
    handle.remove()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen, torch.inference_mode():
        for images in given:
            predictor.network(images)
        torch.cuda.synchronize()
    return sum(e.count for e in seen.key_averages() if "LaunchKernel" in e.key)


def throughput() -> None:
    """Time one image on the same network in the ways of mmsegmentation and transformers, and in ours."""
    predictor, prepared, target = _ready(MODELS[0])
    chosen, network = kernels.select("auto", DEVICE.type), predictor.network
    mean, std = (torch.tensor(v, device=DEVICE)[:, None, None] for v in (predictor.model.mean, predictor.model.std))

    def ours() -> Any:
        [made] = predictor.predict([prepared], DEVICE, Stopwatch(DEVICE))
        return chosen.count(made.labels, target, 150).cpu()

    def peer(argmax_on_host: bool) -> Any:
        with torch.inference_mode():
            pixels = prepared.pixels[0].to(DEVICE).permute(2, 0, 1).float()
            output = network(((pixels - mean) / std)[None])
            scores = output if argmax_on_host else native(output, tuple(pixels.shape[1:]))  # transformers: in one step
            scores = native(scores, SIZE)
            labels = scores[0].argmax(0)
            labels = labels.cpu() if argmax_on_host else labels
            truth = target.cpu() if argmax_on_host else target
            kept = truth != 255
            return torch.bincount(150 * truth[kept].long() + labels[kept], minlength=150 * 150).cpu()

    found = {"ade-harness": ours, "mmsegmentation's way": lambda: peer(False), "transformers' way": lambda: peer(True)}
    times = {name: milliseconds(function, 2 if CUDA else 0) for name, function in found.items()}
    for name, spent in times.items():
        ratio = round(spent / times["mmsegmentation's way"], 3)
        report("INFO", f"one image after the other, {name}", images_per_s=round(1e3 / spent, 1), ratio=ratio)


class _Greedy(nn.Module):
    """Takes a share of the free memory for each image of a batch."""

    def __init__(self, share: float, free: int) -> None:
        super().__init__()
        self.share, self.free = share, free

    def forward(self, images: Tensor) -> Tensor:
        """Return scores that differ between images."""
        held = torch.empty(int(len(images) * self.share * self.free), dtype=torch.uint8, device=images.device)
        return images.mean((1, 2, 3))[:, None, None, None].expand(-1, 150, 8, 8) + held[:1].float() * 0


def short_memory() -> None:
    """Halve a batch on a real shortage, with the same outputs; refuse what does not fit at all."""
    if not CUDA:
        report("SKIP", "short memory", needs="a GPU")
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    cfg = compose_config([]).inference
    forward = BatchedForward(LoadedModel(_Greedy(0.3, free), "random", (0.0,) * 3, (1.0,) * 3), cfg, 150)
    images = [torch.full((3, 8, 8), float(i), device=DEVICE) for i in range(8)]
    found = [round(float(o.mean())) for o in forward(images, "test") if isinstance(o, Tensor)]
    check(found == list(range(8)) and forward.fits == 2, "a batch is halved until it fits", fits=forward.fits)
    torch.cuda.empty_cache()
    check(torch.cuda.mem_get_info()[0] > 0.97 * free, "its memory is given back")
    greedy = BatchedForward(LoadedModel(_Greedy(1.5, free), "random", (0.0,) * 3, (1.0,) * 3), cfg, 150)
    try:
        greedy(images[:1], "test")
        check(False, "one image that does not fit is refused")
    except HarnessError as error:
        check("out of memory" in str(error), "one image that does not fit is refused", message=str(error)[:90])


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command with its ranks, and end them all when the time is up; returns its exit code and standard error."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -signal.SIGKILL, f"not done within {seconds:.0f} s"
    return process.returncode, errors


def ranks() -> None:
    """Run the command with plain torch, with our kernels, and on 1 to all GPUs: every label hash must be equal.

    Scaling is the images/s of the loop alone (without the start) on N GPUs over N times those on one.
    """
    maximum = usable_gpus() if CUDA else 2
    counts = sorted({1, min(2, maximum), maximum})
    images = 600 if CUDA else 4
    system = ["model=segformer_b0", "model.weights=random", "dataset=demo"] if CUDA else []
    cases = [("plain torch", ["runtime.devices=1", "runtime.kernels=torch"])]
    cases += [(f"{n} ranks", [f"runtime.devices={n}"]) for n in counts]
    first: dict[str, str] = {}
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in cases:
            if (left := _end[0] - time.monotonic()) < 30:
                report("SKIP", f"a run with {name}", needs="more time: --minutes")
                continue
            run = Path(folder, name.replace(" ", "-"))
            begin = time.perf_counter()
            common = [f"dataset.images={images}", "tracking=none", f"run.dir={run}", "run.overlays=0"]
            command = [sys.executable, "-m", "ade_harness", *system, *overrides, *common]
            code, errors = _run(command, min(left, 400))
            seconds = time.perf_counter() - begin
            if code:
                check(False, f"a run with {name}", code=code, error=errors[-300:])
                continue
            hashes = {row.image_id: row.label_hash for row in read_rows(run / "ledger")[0]}
            first = first or hashes
            manifest = json.loads((run / "manifest.json").read_text())
            timings = manifest["timings"]
            rates[name] = timings["images_per_second"]
            check(hashes == first, f"label hashes of a run with {name}", images=len(hashes), seconds=round(seconds, 1),
                  loop_seconds=timings["seconds"], images_per_s=rates[name], kernels=manifest["kernels"],
                  reason=manifest.get("kernels_reason"))  # fmt: skip
    for n in counts[1:]:
        if {"1 ranks", f"{n} ranks"} <= rates.keys():
            report("INFO", f"scaling to {n} ranks", efficiency=round(rates[f"{n} ranks"] / (n * rates["1 ranks"]), 2))


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part
    for part in (environment, exact, large, speed, bound, waits, others, throughput, short_memory, ranks)
}  # fmt: skip


def main() -> int:
    """Run the parts; one that breaks is a FAIL and costs the others nothing but what it did to the GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, help="write the lines there, as JSON")
    parser.add_argument("--minutes", type=float, default=8, help="no part begins after that time")
    options = parser.parse_args()
    set_arithmetic(True)
    begin = time.monotonic()
    _end[0] = begin + 60 * options.minutes
    for name in options.parts:
        if time.monotonic() > _end[0]:
            report("SKIP", f"part {name}", needs="more time: --minutes")
            continue
        started = time.monotonic()
        try:
            PARTS[name]()
        except Exception as error:
            check(False, f"part {name} ran", error=f"{type(error).__name__}: {error}".splitlines()[0][:300])
        report("INFO", f"part {name}", seconds=round(time.monotonic() - started, 1))
    report("INFO", "all parts", seconds=round(time.monotonic() - begin, 1))
    if options.out is not None:
        options.out.write_text(json.dumps(_lines, indent=1, default=str))
    failed = [line["what"] for line in _lines if line["verdict"] == "FAIL"]
    print(f"{len(failed)} failed of {len(_lines)}{'' if CUDA else ' (no GPU: nothing of one was shown)'}")
    return 1 if failed else 0


if __name__ == "__main__":
    if main():
        sys.exit(1)
