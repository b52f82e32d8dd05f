"""Compile every Triton kernel for real GPUs, without one; prints one JSON object a kernel and target.

Run as a program of its own: the tests' process has TRITON_INTERPRET=1, under which nothing is compiled.
Usage: compile_ahead.py ARCH [ARCH ...], such as 80 90 100.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ade_harness.kernels import triton_gpu
from ade_harness.models.ops import deformable_triton

_LABEL_POINTERS = (
    "scores", "labels", "y_index", "y_weight", "x_index", "x_weight", "y2_index", "y2_weight", "x2_index", "x2_weight",
)  # fmt: skip
_SIZES = ("channels", "low_height", "low_width", "mid_height", "mid_width", "height", "width")
# kernel -> (function, types of its arguments but scores and values, settings of compile-time constants)
KERNELS: dict[str, tuple[Any, dict[str, str], list[dict[str, Any]]]] = {
    "_label_tile": (
        triton_gpu._label_tile,
        {name: "*i32" if name.endswith("index") else "*fp32" for name in _LABEL_POINTERS}
        | {"labels": "*u8"}
        | dict.fromkeys(_SIZES, "i32"),
        [{"TWO_STEPS": two, "ROWS": 4, "COLUMNS": 64} for two in (False, True)],
    ),
    "_aggregate": (
        deformable_triton._aggregate,
        {"levels": "*i32", "points": "*fp32", "queries": "i32", "groups": "i32", "pixels": "i32"},
        [
            {"TAPS": taps, "PER_LEVEL": per, "CHANNELS": width, "LANES": triton.next_power_of_2(width), "TILE": 16}
            for taps, per, width in ((12, 4, 32), (12, 4, 64), (9, 9, 16))
        ],
    ),
}
_OF_DTYPE = {"_label_tile": ("scores",), "_aggregate": ("values", "weights", "out")}


def compiled(name: str, constants: dict[str, Any], dtype: str, arch: int) -> Any:
    """Compile one kernel as its launcher would: pointers are multiples of 16 bytes."""
    function, types, _ = KERNELS[name]
    types = types | dict.fromkeys(_OF_DTYPE[name], f"*{dtype}")
    names = function.arg_names
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    values = {(names.index(key),): value for key, value in constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = ASTSource(function, signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


def main(archs: list[int]) -> None:
    """Compile all; an error ends the program."""
    for arch in archs:
        for name, (_, _, settings) in KERNELS.items():
            for constants in settings:
                for dtype in ("fp32", "fp16", "bf16"):
                    kernel = compiled(name, constants, dtype, arch)
                    local = [line.strip() for line in kernel.asm["ptx"].splitlines() if ".local" in line]
                    found = {"kernel": name, "arch": arch, "dtype": dtype, "cubin": len(kernel.asm["cubin"])}
                    print(json.dumps({**found, "constants": constants, "local": local}), flush=True)


if __name__ == "__main__":
    main([int(arch) for arch in sys.argv[1:]])
