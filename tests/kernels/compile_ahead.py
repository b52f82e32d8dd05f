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
from typing import Any

import triton
from benchmarks import machine_code
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
        deformable_triton._aggregate,
        {"values": "*{dtype}", "weights": "*{dtype}", "out": "*{dtype}", "levels": "*i32", "points": "*fp32",
         "queries": "i32", "groups": "i32", "pixels": "i32"},
        tuple(
            {"TAPS": taps, "PER_LEVEL": per, "CHANNELS": width, "LANES": triton.next_power_of_2(width), "TILE": 16}
            for taps, per, width in ((12, 4, 32), (12, 4, 64), (9, 9, 16))
        ), deformable_triton.EXACT,
    ),
}  # fmt: skip


def compiled(kernel: Kernel, constants: dict[str, Any], dtype: str, archs: list[int]) -> Iterator[tuple[int, Any]]:
    """Compile one kernel as its launcher would: pointers are multiples of 16 bytes, where that is looked at at all.

    Triton's IR of a source is the same for every GPU (none of these kernels has tensor descriptors), and making it is
    a third of the work: it is made for the first and compiled on for the others.
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
    with tempfile.TemporaryDirectory() as folder:
        for arch in archs:
            made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernel.options)
            yield arch, made
            path = Path(folder, "kernel.ttir")
            path.write_text(made.asm["ttir"])
            source = str(path)


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
    for name, kernel in KERNELS.items():
        for constants in kernel.constants:
            several = "*{dtype}" in kernel.types.values()
            dtypes = ("fp32", "fp16", "bf16") if several else ("fp32",)
            for dtype in dtypes:
                for arch, made in compiled(kernel, constants, dtype, archs):
                    found = {"kernel": name, "arch": arch, "dtype": dtype, "fused": made.metadata.enable_fp_fusion,
                             "specialised": specialised(kernel)}  # fmt: skip
                    print(
                        json.dumps(
                            {
                                **found,
                                "constants": constants,
                                **usage(made.asm["cubin"]),
                                **(
                                    {"loops": machine_code.read(made.asm["cubin"]).loops}
                                    if with_loops or constants.get("WHOLE")
                                    else {}
                                ),
                            }
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    overrides = sys.argv[1:]
    main([int(word) for word in overrides if word != "--loops"], "--loops" in overrides)
