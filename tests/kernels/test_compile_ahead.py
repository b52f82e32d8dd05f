"""Triton kernels compile for real GPUs. The interpreter, which other tests use, takes code that no compiler takes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import machine_code

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

_PROGRAM = Path(__file__).with_name("compile_ahead.py")


def jitted() -> dict[str, set[str]]:
    """Return every `@triton.jit` function of the package, with the names of the jitted functions that it calls."""
    found: dict[str, set[str]] = {}
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                calls = (c.func.id for c in ast.walk(node) if isinstance(c, ast.Call) and isinstance(c.func, ast.Name))
                found[node.name] = set(calls)
    return {name: calls & found.keys() for name, calls in found.items()}


ARCHS = (80, 86, 89, 90, 100)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every kernel for every target, by one program."""
    pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to compile the GPU kernels")
    folder = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(_PROGRAM), *map(str, ARCHS)], capture_output=True, text=True, timeout=900, check=False,
        env={**environment, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(REPOSITORY)}, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_for(compiled: list[dict[str, Any]], arch: int) -> None:
    found = [kernel for kernel in compiled if kernel["arch"] == arch]
    functions = jitted()
    launched = functions.keys() - set().union(*functions.values())
    assert {f["kernel"] for f in found} == launched  # a new kernel belongs on compile_ahead.py's list
    of_scores = {
        "label_tile",
        "view_norms",
        "mask_tile",
        "count_invalid",
        "_aggregate",
    }  # in which no dtype is the only one
    assert {(f["kernel"], f["dtype"]) for f in found if f["kernel"] in of_scores} == {
        (kernel, dtype) for kernel in of_scores for dtype in ("fp32", "fp16", "bf16")
    }
    for kernel in found:
        assert kernel["local"] == kernel["stack"] == 0, kernel  # nothing is spilled
        # a quarter of the warps that a multiprocessor can hold, in programs of 4 warps
        assert 16 <= kernel["registers"] <= 128, kernel
        assert kernel["specialised"] == [], kernel  # it would be compiled in the middle of a run, for some image's size
        assert not kernel["fused"], kernel  # a product and a sum round twice, unless the code says fma


def test_the_page_has_the_registers_that_were_counted(compiled: list[dict[str, Any]]) -> None:
    """In the order of docs/gpu.md's rows, of float32."""
    page = (REPOSITORY / "docs/gpu.md").read_text().partition("| kernel | sm_80 |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip(" |").split("|")] for line in page.splitlines()[2:]]
    written = {row[0]: [int(cell) for cell in row[1:]] for row in rows}
    found: dict[str, list[int]] = {}
    for kernel in compiled:
        name = name_on_page(kernel["kernel"], kernel["constants"])
        few = kernel["types"].get("labels") != "*i32"  # of more than 256 channels, which is beside the page
        if kernel["dtype"] == "fp32" and few:
            found.setdefault(name, []).append(kernel["registers"])
    for name, registers in found.items():  # each for the five targets; of variants that share a row, the most
        number = len(registers) // len(ARCHS)
        most = [max(registers[arch + part * len(ARCHS)] for part in range(number)) for arch in range(len(ARCHS))]
        assert written[name] == most, name
    assert found.keys() == written.keys()


def name_on_page(kernel: str, constants: dict[str, Any]) -> str:
    """Return the row of a variant on the page."""
    steps = "two steps" if constants.get("TWO_STEPS") else "one step"
    if kernel == "label_tile":
        soft = ", softmax" if constants["PROBABILITIES"] else ""
        return f"labels, {'one view and window, ' if constants['WHOLE'] else ''}{steps}{soft}"
    if kernel == "_aggregate":
        channels = (
            "44 or 48" if constants["TAPS"] == 12 and constants["CHANNELS"] in (44, 48) else constants["CHANNELS"]
        )
        return f"deformable attention, {constants['TAPS']} points, {channels} channels"
    names = {"view_norms": f"softmax norms, {steps}", "mask_tile": f"masks, {steps}", "count_tile": "counts",
             "normalise_tile": "pixels", "count_invalid": "NaN, +inf"}  # fmt: skip
    return names[kernel]


@pytest.mark.timeout(300)
def test_what_images_launch_is_compiled_by_the_comparison_before_them(tmp_path: Path) -> None:
    """By Triton's own launching, with all but the driver of a GPU: see launch_ahead.py."""
    pytest.importorskip("triton", reason="pip install triton (a Linux wheel) to compile the GPU kernels")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(_PROGRAM.with_name("launch_ahead.py")), "90"], capture_output=True, text=True, timeout=280,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    kernels = {"label_tile", "view_norms", "mask_tile", "count_tile", "normalise_tile", "count_invalid"}
    assert {one.split()[0] for one in found["comparison"]} == kernels
    assert len(found["comparison"]) == len(set(found["comparison"])) > 12
    assert found["images"] == []  # whatever their sizes, channels, windows and views
    assert found["sums in bfloat16"] == []
    assert found["launches"].keys() == kernels
    assert min(found["launches"].values()) > 24  # six sizes, four numbers of channels


def test_the_bound_of_instructions_knows_the_loop_of_whole_images(compiled: list[dict[str, Any]]) -> None:
    """What `benchmarks/gpu_acceptance.py` multiplies by the blocks of channels."""
    found = [k for k in compiled if "loops" in k]
    assert len(found) == 2 * 3 * 2  # sm_80, 90
    for kernel in found:
        block = kernel["constants"]["BLOCK"]
        [instructions] = kernel["loops"]
        corners = 16 if kernel["constants"]["TWO_STEPS"] else 4
        assert corners * block < instructions < 12 * corners * block, kernel  # at least a load for each corner


def test_instructions_of_a_listing_are_counted() -> None:
    listing = "\n".join(
        f"        /*{16 * i:04x}*/                   {text} ;"
        for i, text in enumerate(
            ["MOV R1, R2", "LDG.E R3, [R4]", "FADD R5, R5, R3", "@P0 BRA 0x10", "EXIT", "BRA 0x50", "NOP"]
        )
    )
    code = machine_code.parse(listing)
    assert code == machine_code.Code(5, (3,))
    assert code.executed(1) == 5
    assert code.executed(20) == 5 + 19 * 3
    with pytest.raises(ValueError, match="2 loops"):
        machine_code.Code(9, (3, 3)).executed(1)
    # 132 multiprocessors at 1.98 GHz issue 1.045 billion instructions a ms
    assert machine_code.least_milliseconds(11264, 6600, 132, 1_980_000) == pytest.approx(0.0711, rel=1e-2)


def test_jitted_functions_have_no_annotations_that_the_compiler_would_evaluate() -> None:
    for path in (REPOSITORY / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                arguments = [a for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation is not None]
                assert {ast.unparse(a.annotation) for a in arguments if a.annotation} <= {"tl.constexpr"}, node.name
                assert node.returns is None, node.name
