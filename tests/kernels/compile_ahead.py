"""Compile every Triton kernel for real GPUs, without one; prints one JSON object a kernel and target.

Run as a program of its own: the tests' process has TRITON_INTERPRET=1, under which nothing is compiled.
Usage: compile_ahead.py [--loops] ARCH [ARCH ...], such as 80 90 100; with --loops also the instructions of each loop of all kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from benchmarks import machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from ade_harness.kernels import triton_gpu, triton_jit
from ade_harness.models.ops import deformable_triton


@dataclass(frozen=True)
class Kernel:
    """How a kernel is launched."""

    function: Any
    types: dict[str, str]
    """Types of its arguments; ``*{dtype}`` stands for the dtypes in which scores and features come."""
    constants: tuple[dict[str, Any], ...]
    options: dict[str, Any]


_SIZES = dict.fromkeys(("channels", "height", "width", "views"), "i32")
_VIEWS = {"table": "*i64", "first": "*{dtype}", "norms": "*fp32", "labels": "*u8", "inverse": "fp32", **_SIZES}
_ROWS, _COLUMNS = triton_gpu.TILES["cuda"]
_TILE = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "CUDA": True}
_RUN = {"SIZE": triton_gpu.RUN}
_SAMPLES = {"values": "*{dtype}", "weights": "*{dtype}", "out": "*{dtype}", "levels": "*i32", "points": "*fp32",
            "queries": "i32", "groups": "i32", "pixels": "i32"}  # fmt: skip
_PLACES = ("canvas_height", "canvas_width", "top", "left", "height", "width")
KERNELS = {
    "label_tile": Kernel(
        triton_jit.label_tile, _VIEWS,
        tuple(
            {**_TILE, "TWO_STEPS": two, "PROBABILITIES": soft, "WHOLE": whole,
             "BLOCK": 1 if soft else triton_gpu.BLOCKS["cuda"][two]}
            for two in (False, True) for soft, whole in ((False, True), (False, False), (True, False))
        ), triton_gpu.OF_VIEWS,
    ),
    "label_tile of many channels": Kernel(  # more than labels of 8 bits hold: a class map makes fewer of them
        triton_jit.label_tile, {**_VIEWS, "labels": "*i32"},
        tuple(
            {**_TILE, "TWO_STEPS": two, "PROBABILITIES": False, "WHOLE": True, "BLOCK": triton_gpu.BLOCKS["cuda"][two]}
            for two in (False, True)
        ), triton_gpu.OF_VIEWS,
    ),
    "view_norms": Kernel(
        triton_jit.view_norms, _VIEWS, tuple({**_TILE, "TWO_STEPS": two} for two in (False, True)), triton_gpu.OF_VIEWS,
    ),
    "count_tile": Kernel(
        triton_jit.count_tile,
        {"labels": "*u8", "target": "*u8", "counts": "*i64", "pixels": "i32", "classes": "i32"}, (_RUN,), triton_gpu.EXACT,
    ),
    "normalise_tile": Kernel(
        triton_jit.normalise_tile,
        {"pixels": "*u8", "canvas": "*fp32", "means": "*fp32", "scale": "fp32", "pad": "fp32"}
        | dict.fromkeys((*_PLACES, "reverse", "flipped", "padded"), "i32"),
        ({**_RUN, "CUDA": True},), triton_gpu.EXACT,
    ),
    "count_invalid": Kernel(triton_jit.count_invalid, {"table": "*i64", "first": "*{dtype}", "total": "*i64"}, (_RUN,), triton_gpu.EXACT),
    "_aggregate": Kernel(
        deformable_triton._aggregate, _SAMPLES,
        tuple(
            deformable_triton.constants_of(taps, levels, channels)
            for taps, levels, channels in ((12, 3, 32), (12, 3, 44), (12, 3, 48), (4, 1, 32), (4, 1, 44), (9, 1, 32))
        ), deformable_triton.EXACT,
    ),
    "_aggregate of wide heads": Kernel(
        deformable_triton._aggregate, _SAMPLES,
        tuple(deformable_triton.constants_of(taps, levels, 128) for taps, levels in ((12, 3), (4, 1))), deformable_triton.WIDE,
    ),
}  # fmt: skip


def compiled(kernel: Kernel, constants: dict[str, Any], dtype: str, archs: list[int]) -> Iterator[tuple[int, Any]]:
    """Compile one kernel as its launcher would: pointers are multiples of 16 bytes, where that is looked at at all.

    What Triton makes of a source on its way is the same for several GPUs: its own IR for all of them (none of these
    kernels has tensor descriptors), its IR for GPUs before sm_100 (that of sm_90 has other passes for matrix products
    alone), PTX for sm_86 and sm_89. Each is made for the first and compiled on for the others, which halves the work;
    `check_shortcut` compares machine code.
    """
    names = kernel.function.arg_names
    types = {n: t.format(dtype=dtype) for n, t in kernel.types.items() if n not in constants}
    signature = {n: types.get(n, "constexpr") for n in names}
    values = {(names.index(key),): value for key, value in constants.items()}
    looked_at = {p.name for p in kernel.function.params if not p.do_not_specialize_on_alignment}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") and n in looked_at
    }
    source: Any = ASTSource(kernel.function, signature, constexprs=values, attrs=aligned)
    before: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def rewritten(suffix: str, first: int, arch: int, name: str) -> str:
            text = before[first].asm[suffix]
            assert text.count(name.format(first)) == 1
            return text.replace(name.format(first), name.format(arch))

        for arch in archs:
            like = next((first for first in before if first < 100 and arch < 100), None)
            target = GPUTarget("cuda", arch, 32)
            if arch == 89 and 86 in before:
                backend, ptx = make_backend(target), rewritten("ptx", 86, arch, ".target sm_{}")
                cubin = backend.make_cubin(ptx, {}, backend.parse_options(dict(kernel.options)), arch)
                made: Any = SimpleNamespace(asm={"cubin": cubin}, metadata=before[86].metadata)
            elif like is not None:
                path = Path(folder, f"kernel{arch}.ttgir")
                path.write_text(rewritten("ttgir", like, arch, '"cuda:{}"'))
                made = triton.compile(str(path), target=target, options=kernel.options)
            else:
                made = triton.compile(source, target=target, options=kernel.options)
            before[arch] = made
            yield arch, made
            if len(before) == 1:
                source = str(Path(folder, "kernel.ttir"))
                Path(source).write_text(made.asm["ttir"])


def check_shortcut(archs: list[int]) -> None:
    """Compile two kernels from their sources for each GPU too, and compare the instructions."""
    for name, dtype in (("_aggregate", "fp16"), ("view_norms", "bf16")):
        kernel = KERNELS[name]
        for arch, made in compiled(kernel, kernel.constants[0], dtype, archs):
            [(_, whole)] = compiled(kernel, kernel.constants[0], dtype, [arch])
            assert code_of(whole.asm["cubin"]) == code_of(made.asm["cubin"]), (name, arch)


def code_of(cubin: bytes) -> str:
    """Return the machine instructions of a cubin, without the names of the files that it was made from."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [machine_code.TOOLS / "cuobjdump", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def specialised(kernel: Kernel) -> list[str]:
    """Return the integers for whose values Triton would compile a kernel again: multiples of 16, and 1."""
    return [
        p.name for p in kernel.function.params if not (p.is_constexpr or p.do_not_specialize)
        and not kernel.types[p.name].startswith(("*", "fp"))
    ]  # fmt: skip


def usage(cubin: bytes) -> dict[str, int]:
    """Return registers, bytes of stack, of shared and of local memory (to which registers are spilled) of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [machine_code.TOOLS / "cuobjdump", "-res-usage", path]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", out)
    assert found is not None, out
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


def main(archs: list[int], with_loops: bool) -> None:
    """Compile all; an error ends the program."""
    check_shortcut(archs)
    for kernel in KERNELS.values():
        for constants in kernel.constants:
            several = "*{dtype}" in kernel.types.values()
            dtypes = ("fp32", "fp16", "bf16") if several else ("fp32",)
            for dtype in dtypes:
                for arch, made in compiled(kernel, constants, dtype, archs):
                    found = {"kernel": kernel.function.__name__, "arch": arch, "dtype": dtype, "fused": made.metadata.enable_fp_fusion,
                             "specialised": specialised(kernel)}  # fmt: skip
                    whole = constants.get("WHOLE") and kernel.types["labels"] == "*u8" and arch % 10 == 0
                    loops = with_loops or whole
                    code = {"loops": machine_code.read(made.asm["cubin"]).loops} if loops else {}
                    print(json.dumps({**found, "constants": constants, **usage(made.asm["cubin"]), **code}), flush=True)


if __name__ == "__main__":
    overrides = sys.argv[1:]
    main([int(word) for word in overrides if word != "--loops"], "--loops" in overrides)
