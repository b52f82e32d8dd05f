"""Compile every Triton kernel for real GPUs, without one; prints one JSON object a kernel and target.

Run as a program of its own: the tests' process has TRITON_INTERPRET=1, under which nothing is compiled.
Usage: compile_ahead.py [--loops|--check] ARCH [ARCH ...], such as 80 90 100; with --loops also the instructions of each loop of all kernels;
--check compares what is compiled by way of another GPU with what is compiled from the source, and prints nothing.
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
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    """What ``{dtype}`` stands for."""


_SIZES = dict.fromkeys(("channels", "height", "width", "views"), "i32")
_VIEWS = {"table": "*i64", "first": "*{dtype}", "norms": "*fp32", "labels": "*u8", "inverse": "fp32", **_SIZES}
_ROWS, _COLUMNS = triton_gpu.TILES["cuda"]
_TILE = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "CUDA": True}
_RUN = {"SIZE": triton_gpu.RUN}
_SAMPLES = {"values": "*{dtype}", "out": "*{dtype}", "levels": "*i32", "points": "*fp32", "weights": "*fp32",
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
            {**_TILE, "TWO_STEPS": two, "PROBABILITIES": False, "WHOLE": whole, "BLOCK": triton_gpu.BLOCKS["cuda"][two]}
            for two in (False, True) for whole in (True, False)
        ), triton_gpu.OF_VIEWS, ("fp32",),
    ),
    "view_norms": Kernel(
        triton_jit.view_norms, _VIEWS, tuple({**_TILE, "TWO_STEPS": two} for two in (False, True)), triton_gpu.OF_VIEWS,
    ),
    **{
        f"mask_tile to {dtype}": Kernel(
            triton_jit.mask_tile,
            {"masks": "*{dtype}", "out": f"*{dtype}"}
            | dict.fromkeys(("queries", "low_height", "low_width", "area_height", "area_width", *_PLACES), "i32"),
            tuple({**_TILE, "TWO_STEPS": two, "BLOCK": triton_gpu.MASK_BLOCKS["cuda"][two]} for two in (False, True)),
            triton_gpu.OF_VIEWS, dtypes,
        )
        for dtype, dtypes in (("fp32", ("fp32", "fp16", "bf16")), ("bf16", ("fp32",)))  # the forward gives float32
    },
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


def compiled(
    kernel: Kernel, constants: dict[str, Any], dtype: str, archs: list[int], whole: bool = False
) -> Iterator[tuple[int, Any]]:
    """Compile one kernel as its launcher would: pointers are multiples of 16 bytes, where that is looked at at all.

    What Triton makes of a source on its way is the same for several GPUs: its own two IRs for all of them (they differ
    for matrix products and tensor descriptors, which none of these kernels has), PTX for sm_86 and sm_89. Each is made
    for the first and compiled on for the others, which saves a third of the work; with `whole`, and for sm_100 in the first
    variant of each kernel, from the source. `--check` compares the machine code of all variants.
    """
    names = kernel.function.arg_names
    types = {n: t.format(dtype=dtype) for n, t in kernel.types.items() if n not in constants}
    if constants.get("PROBABILITIES") is False:  # as the launcher has it: there are no norms, and it gives the scores
        types["norms"] = types["first"]
    signature = {n: types.get(n, "constexpr") for n in names}
    values = {(names.index(key),): value for key, value in constants.items()}
    looked_at = {p.name for p in kernel.function.params if not p.do_not_specialize_on_alignment}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*") and n in looked_at
    }
    source: Any = ASTSource(kernel.function, signature, constexprs=values, attrs=aligned)
    first_variant = constants == kernel.constants[0] and dtype == "fp32"
    before: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:

        def rewritten(suffix: str, first: int, arch: int, name: str) -> str:
            text = before[first].asm[suffix]
            assert text.count(name.format(first)) == 1
            return text.replace(name.format(first), name.format(arch))

        for arch in archs:
            target = GPUTarget("cuda", arch, 32)
            if arch == 89 and 86 in before and not whole:
                backend, ptx = make_backend(target), rewritten("ptx", 86, arch, ".target sm_{}")
                cubin = backend.make_cubin(ptx, {}, backend.parse_options(dict(kernel.options)), arch)
                made: Any = SimpleNamespace(asm={"cubin": cubin}, metadata=before[86].metadata)
            elif not before or whole or (first_variant and arch >= 100):
                made = triton.compile(source, target=target, options=kernel.options)
            else:
                path = Path(folder, f"kernel{arch}.ttgir")
                path.write_text(rewritten("ttgir", next(iter(before)), arch, '"cuda:{}"'))
                made = triton.compile(str(path), target=target, options=kernel.options)
            before[arch] = made
            yield arch, made


def check_shortcut(kernel: Kernel, constants: dict[str, Any], dtype: str, archs: list[int]) -> None:
    """Compile a kernel from its source for each GPU too, and compare machine code and registers."""
    whole = dict(compiled(kernel, constants, dtype, archs, whole=True))
    for arch, made in compiled(kernel, constants, dtype, archs):
        found, expected = (machine_code.sections(one.asm["cubin"]) for one in (made, whole[arch]))
        assert found == expected, (kernel.function.__name__, constants, dtype, arch)


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


def variants() -> Iterator[tuple[Kernel, dict[str, Any], str]]:
    """Yield each kernel with the constants and dtypes that it is launched with."""
    for kernel in KERNELS.values():
        several = "*{dtype}" in kernel.types.values()
        for constants in kernel.constants:
            for dtype in kernel.dtypes if several else ("fp32",):
                yield kernel, constants, dtype


def main(archs: list[int], with_loops: bool) -> None:
    """Compile all; an error ends the program."""
    for name, dtype in (("_aggregate", "fp16"), ("view_norms", "bf16")):
        check_shortcut(KERNELS[name], KERNELS[name].constants[0], dtype, archs)
    for kernel, constants, dtype in variants():
        for arch, made in compiled(kernel, constants, dtype, archs):
            found = {"kernel": kernel.function.__name__, "arch": arch, "dtype": dtype, "fused": made.metadata.enable_fp_fusion,
                     "specialised": specialised(kernel), "types": kernel.types}  # fmt: skip
            whole = constants.get("WHOLE") and kernel.types["labels"] == "*u8" and arch in (80, 90)
            if re.search(r"cvt\.rz\.b?f16", str(made.asm.get("ptx", ""))):
                raise AssertionError(f"{found}: numbers are cut off, not rounded, to half precision")
            code = {"loops": machine_code.read(made.asm["cubin"]).loops} if with_loops or whole else {}
            print(json.dumps({**found, "constants": constants, **usage(made.asm["cubin"]), **code}), flush=True)


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:] if not word.startswith("--")]
    if "--check" in sys.argv:
        for one in variants():
            check_shortcut(*one, given)
    else:
        main(given, "--loops" in sys.argv)
