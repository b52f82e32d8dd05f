"""Do the tests notice? Change the core one operator, constant or condition at a time, and run each file's own tests.

    python scripts/mutation_run.py --sample 300 --seed 0

Every mutant runs in a process that is forked from one which has imported the libraries but nothing of this package: the
changed source is compiled in place of the file, so nothing on disk changes. A mutant that no test notices is printed
with its line: either a test is missing, or no user could tell, and then the reason belongs beside the line.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "ade_harness"
TARGETS: dict[str, tuple[str, ...]] = {
    "metrics/confusion.py": ("tests/metrics/test_confusion.py",),
    "metrics/bootstrap.py": ("tests/metrics/test_statistics.py",),
    "metrics/comparison.py": ("tests/metrics/test_statistics.py",),
    "metrics/verdict.py": ("tests/metrics/test_statistics.py",),
    "metrics/diagnosis.py": ("tests/metrics/test_diagnosis.py",),
    "metrics/areas.py": ("tests/metrics/test_confusion.py", "tests/metrics/test_statistics.py"),
    "models/class_map.py": ("tests/models/test_loading.py",),
    "inference/plan.py": (
        "tests/inference/test_plan.py", "tests/inference/test_predictor.py", "tests/inference/test_forward.py",
    ),
    "inference/resize.py": ("tests/inference/test_plan.py", "tests/inference/test_predictor.py"),
    "runs/ledger.py": (
        "tests/runs/test_runs.py", "tests/hostile/test_documents.py", "-k", "test_runs or ledger or exact",
    ),
    "runs/exactness.py": ("tests/runs/test_runs.py", "tests/cli/test_resume.py"),
    "runs/trust.py": ("tests/runs/test_trust.py",),
    "kernels/reference.py": (
        "tests/kernels/test_reference.py", "tests/kernels/test_kernels.py", "-k", "not triton and not numba",
    ),
    "data/decode.py": ("tests/data/test_containers.py", "tests/data/test_ade20k.py"),
    "data/containers.py": ("tests/data/test_containers.py",),
    "data/palettes.py": ("tests/data/test_containers.py",),
}  # fmt: skip
EQUIVALENT: tuple[tuple[str, str, str, str], ...] = (
    ("data/containers.py", "range(0xC0, 0xD0)", "209", "0xD0 stands alone, and that is looked at first"),
    ("data/containers.py", ".get(header.colour_type, 1)", "2", "a file of another type is refused by Pillow"),
    ("data/containers.py", "_ALONE = (0x00, 0x01", "218", "0xD9 is the end, and that is looked at first"),
    ("data/containers.py", "min(wanted - found, _PIECE_BYTES)", "+", "the same count, of a longer piece"),
    ("inference/plan.py", "max(length - crop + stride - 1, 0)", "1", "at stride 1 one window twice: the same average"),
    ("kernels/reference.py", "torch.zeros(256 * columns", "+", "fails on CUDA: test_fake_cuda, which takes minutes"),
    ("data/containers.py", "_PIECE_BYTES = 2**20", "", "the same pixels, in other pieces"),
    ("data/decode.py", "odd_metadata = plain != data and", "or", "pixels alone give the same error or pixels"),
    ("data/decode.py", "entries = 256 if header.palette", "257", "both are no less than 256"),
    ("kernels/reference.py", 'plain = device.type == "cpu"', "!=", "the same labels, later"),
    ("kernels/reference.py", "merge([whole(scores, size)], size, False)", "True", "one view is never averaged"),
    ("inference/plan.py", "zip(canvas, crop, strict=True)", "False", "both are two"),
    ("kernels/reference.py", "_GPU_BYTES = 256 << 20", "257", "the same labels, of other pieces"),
    ("kernels/reference.py", "zip(starts, [*starts[1:], channels]", "False", "one each"),
    ("data/containers.py", "while 0 <= place < len(data) - 3", "1", "a place is at least 2, or -1"),
    ("data/containers.py", "while 0 <= place < len(data) - 3", "0 < place", "a place is at least 2, or -1"),
    ("data/containers.py", "while 0 <= place < len(data) - 3", "4", "a segment without content changes nothing"),
    ("data/decode.py", "np.bincount(stored.reshape(-1), minlength=256)", "2", "NumPy takes any negative length as -1"),
    ("data/decode.py", "data[place + 1] != _SCAN", "place - 1", "no metadata begins where coded pixels do"),
    ("data/decode.py", "levels = np.zeros(256, np.uint8)", "257", "an entry more than there are indices"),
    ("data/decode.py", "palette[:256, 0]", "1", "entries that are used are grey"),
    ("data/decode.py", "palette[:256, 0]", "257", "a PNG's palette has at most 256 entries"),
    ("data/decode.py", "odd_metadata = False", "True", "Pillow decodes what simplejpeg has: the same pixels, later"),
    ("data/decode.py", "stored.max(initial=0)", "1", "labels are at least 0, and 255 is allowed"),
    ("data/palettes.py", "np.zeros((256, 3), np.uint8)", "257", "an entry more than there are indices"),
    ("runs/ledger.py", "values > _MAX_VALUES", ">=", "no ledger is as large as that"),
    ("inference/resize.py", "if height > width else (side", "height >= width", "of a square, equal sides"),
    ("inference/resize.py", "zip(labels.shape, size, strict=True)", "False", "both are two"),
    ("inference/resize.py", "if height < width else (scale * height", "height <= width", "of a square, equal sides"),
    ("inference/resize.py", "max(new_height, new_width) > rule", ">= rule.max_side", "shrinks by the factor 1"),
    ("inference/resize.py", "rule.pad_at_least or 0", "1", "sides are at least 1"),
    ("inference/resize.py", "if image.shape[:2] == size", "3", "resizing to the same size is a copy"),
    ("inference/plan.py", "zip(plain, mirrored, strict=True)", "False", "one each"),
    ("kernels/reference.py", "if len(views) > 1", ">= 1", "divides by 1"),
    ("kernels/reference.py", "zip(view.origins, scores, strict=True)", "False", "one each"),
    ("kernels/reference.py", "if same and (scores.device.type", "and bool", "resizing to the same size changes no bit"),
    ("kernels/reference.py", "< _ORDINARY for v in views", "<= _ORDINARY", "of one number, and it cannot overflow"),
    ("kernels/reference.py", "view = View(torch.empty(0)", "", "overlaps ask for origins, window and canvas alone"),
    ("kernels/reference.py", "_ORDINARY = ", "1e+37", "the same float"),
    ("kernels/reference.py", "if len(views) > 1", "2", "half of two sums that differ differs: exact"),
    ("kernels/reference.py", "same = tuple(scores.shape[2:])", "3", "resizing to the same size changes no bit"),
    ("kernels/reference.py", 'tensors[0].device.type == "cpu" and', "!=", "a quick pass more or less"),
    ("kernels/reference.py", "if statistics.max_value != 255", "256", "divides by 1"),
    ("kernels/reference.py", "counts.scatter_add_(0", "1", "fails on CUDA: test_fake_cuda, which takes minutes"),
    ("kernels/reference.py", 'if keys.device.type == "cuda"', "'cuda'", "the same counts; test_fake_cuda sees a wait"),
    ("kernels/reference.py", "256 * columns", "257", "rows that are cut off"),
    ("metrics/bootstrap.py", "_BLOCK = 500", "501", "the same draws"),
    ("metrics/bootstrap.py", "names = list(", "1", "every image has the same scores"),
    ("metrics/bootstrap.py", "if kept.size else np.zeros(1)", "2", "a zero more"),
    ("metrics/bootstrap.py", "self.percentile(level), strict=True", "False", "a column each"),
    ("metrics/bootstrap.py", "column in zip(self.value", "False", "a column each"),
    ("metrics/comparison.py", "_BLOCK = 500", "501", "the same draws"),
    ("metrics/comparison.py", "names = list(", "1", "every image has the same scores"),
    ("metrics/comparison.py", "(draws <= _ROUNDING)", "draws < _ROUNDING", "of what no sum gives"),
    ("metrics/comparison.py", "(draws >= -_ROUNDING)", "draws > -_ROUNDING", "of what no sum gives"),
    ("metrics/comparison.py", "self.p_corrected <= 1", "self.p_corrected <", "of a number that no count gives"),
    ("metrics/comparison.py", "zip(classes.items(), corrected, strict", "False", "one a class"),
    ("metrics/comparison.py", "np.empty((0, value.size))", "1", "a jackknife that nobody reads"),
    ("metrics/comparison.py", "abs(difference) - _ROUNDING).sum()", "exchanged) > abs", "of what no sum gives"),
    ("metrics/comparison.py", "dict(zip(names, differences, strict=False))", "", "the names come first"),
    ("metrics/diagnosis.py", "zip(read, constant, strict=True)", "False", "one an image"),
    ("metrics/diagnosis.py", "np.arange(len(classes)) + shift, -1)", "2", "no class is below 0"),
    ("metrics/diagnosis.py", ">= _NEAR_ZERO", "> _NEAR_ZERO", "of what no score is exactly"),
    ("metrics/diagnosis.py", "np.full(matrix.shape[1], -1)", "2", "no class is below 0"),
    ("metrics/diagnosis.py", "chance > _CHANCE", "chance >= _CHANCE", "no sum of halves is a thousandth"),
    ("metrics/diagnosis.py", "for k in range(wins, trials + 1)", "2", "none of the trials can be won once more: 0"),
    ("metrics/bootstrap.py", "drawn.reshape(-1)", "2", "NumPy takes any negative length as -1"),
    ("metrics/areas.py", "zip(stacked, rows, strict=True)", "False", "one each"),
    ("metrics/diagnosis.py", "max(pixels, 1)", "2", "ten images have more than one pixel"),
    ("metrics/verdict.py", "abs(away) <= half + 1e-9", "abs(away) < half", "of a number that no rounding gives"),
    ("models/class_map.py", "found is not None and names", "or", "classes are found by names: both or neither"),
    ("runs/trust.py", "_KEY_BYTES = 32", "33", "a key of another length"),
    ("runs/ledger.py", " = 2**", "", "bounds far above any data set"),
    ("runs/ledger.py", "np.zeros(0, kind)", "1", "of an empty array no number is looked at"),
    ("kernels/reference.py", "View(torch.empty(0), origins", "True", "where windows overlap depends on neither"),
    ("runs/ledger.py", "hex[:8]", "9", "a digit more"),
    ("runs/ledger.py", "row.pixels.min(initial=0)", "1", "not below 0 either"),
    ("runs/ledger.py", ">= _FLUSH_EVERY_S", "> _FLUSH_EVERY_S", "a clock never stands at exactly that"),
)  # fmt: skip
"""Equivalent mutants, which no user could tell from the code: file, a part of the line and of the change, and why."""
_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.Pow: ast.Mult,
}  # fmt: skip
_SKIPPED = ("annotation", "returns", "decorator_list", "bases")


def change(node: ast.AST) -> Callable[[Any], None] | None:
    """Return how a node is changed in place; None for one that is left alone."""
    done: Callable[[Any], None] | None = None
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARE:
        done = lambda n: n.ops.__setitem__(0, _COMPARE[type(n.ops[0])]())  # noqa: E731
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _BINARY:
        done = lambda n: setattr(n, "op", _BINARY[type(n.op)]())  # noqa: E731
    elif isinstance(node, ast.BoolOp):
        done = lambda n: setattr(n, "op", ast.Or() if isinstance(n.op, ast.And) else ast.And())  # noqa: E731
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        done = lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))  # noqa: E731
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        done = lambda n: setattr(n, "value", not n.value)  # noqa: E731
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        done = lambda n: setattr(n, "value", n.value + 1)  # noqa: E731
    return done


def places(tree: ast.AST) -> Iterator[list[tuple[str, int | None]]]:
    """Yield the way to each node that can be changed, as fields and indices; annotations and texts are left out."""

    def walk(node: ast.AST, way: list[tuple[str, int | None]]) -> Iterator[list[tuple[str, int | None]]]:
        if change(node) is not None:
            yield way
        if isinstance(node, ast.JoinedStr | ast.Raise):
            return
        for name, value in ast.iter_fields(node):
            if name in _SKIPPED:
                continue
            for index, below in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(below, ast.AST):
                    yield from walk(below, [*way, (name, index)])

    yield from walk(tree, [])


def mutated(source: str, way: list[tuple[str, int | None]]) -> tuple[ast.Module, int, str]:
    """Return the changed tree, the line, and the changed expression."""
    tree = ast.parse(source)
    node: Any = tree
    for name, index in way:
        node = getattr(node, name) if index is None else getattr(node, name)[index]
    line = node.lineno
    done = change(node)
    assert done is not None
    done(node)
    shown = node.test if isinstance(node, ast.If | ast.While) else node
    return ast.fix_missing_locations(tree), line, ast.unparse(shown).splitlines()[0][:90]


class _Loader(SourceFileLoader):
    """Compiles a changed tree in place of a file."""

    tree: Any = None

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = compile(self.tree, self.path, "exec")
        return code


class _Finder:
    def __init__(self, name: str, path: Path, tree: Any) -> None:
        self.name, self.path, self.tree = name, path, tree

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        """Find the changed module."""
        if name != self.name:
            return None
        loader = _Loader(name, str(self.path))
        loader.tree = self.tree
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def noticed(file: str, tree: Any, limit_s: float) -> bool:
    """Whether the tests of a file fail with a changed tree, or do not end."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        module = "ade_harness." + file.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, _Finder(module, PACKAGE / file, tree))  # type: ignore[arg-type]
        import pytest

        code = 1
        try:
            code = int(
                pytest.main(["-x", "-n0", "-p", "no:cacheprovider", "--hostile=8", "--no-header", *TARGETS[file]])
            )
        finally:
            os._exit(0 if code == 0 else 1)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def why_equivalent(file: str, source_line: str, shown: str) -> str | None:
    """Return why no user could tell a mutant from the code, if that is known."""
    found = (why for name, line, part, why in EQUIVALENT if name == file and line in source_line and part in shown)
    return next(found, None)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--sample", type=int, default=300, help="mutants, drawn from all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=120, help="seconds of one mutant")
    options = parser.parse_args()
    os.chdir(ROOT)
    os.environ["TRITON_INTERPRET"] = "1"  # as in tests/conftest.py, before an import below brings Triton
    import cv2  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import pandas  # noqa: F401
    import pytest  # noqa: F401
    import scipy.special  # noqa: F401
    import torch

    torch.set_num_threads(1)
    sources = {file: (PACKAGE / file).read_text() for file in options.files}
    everything = [(file, way) for file, source in sources.items() for way in places(ast.parse(source))]
    drawn = random.Random(options.seed).sample(everything, min(options.sample, len(everything)))
    for file in options.files:
        if noticed(file, ast.parse(sources[file]), options.timeout):
            raise SystemExit(f"{file}: its tests fail as it is: {' '.join(TARGETS[file])}")
    counts: dict[str, list[int]] = {file: [0, 0, 0] for file in options.files}
    begin = time.monotonic()
    for number, (file, way) in enumerate(sorted(drawn, key=lambda item: item[0]), start=1):
        tree, line, shown = mutated(sources[file], way)
        found = noticed(file, tree, options.timeout)
        counts[file][0] += 1
        counts[file][1] += found
        why = None if found else why_equivalent(file, sources[file].splitlines()[line - 1], shown)
        counts[file][2] += why is not None
        if why is not None:
            print(f"equivalent: {file}:{line}: {shown}: {why}", flush=True)
        elif not found:
            left = (time.monotonic() - begin) / number * (len(drawn) - number)
            print(
                f"survived: {file}:{line}: {shown}   [{number} of {len(drawn)}, {left / 60:.0f} min left]", flush=True
            )
    total, seen, same = (sum(c[i] for c in counts.values()) for i in (0, 1, 2))
    for file, (tried, right, _) in counts.items():
        print(f"{file:28} {right:4} of {tried:4} noticed")
    print(
        f"{seen} of {total} mutants noticed ({seen / max(total, 1):.1%}), of {len(everything)} possible;"
        f" {same} equivalent, {total - seen - same} survived"
    )


if __name__ == "__main__":
    main()
