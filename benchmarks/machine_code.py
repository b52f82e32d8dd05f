"""What the machine code of a compiled Triton kernel says: its loops, and the least time that its instructions take."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
"""Nvidia's tools, which come with Triton's Linux wheels."""
SCHEDULERS = 4
"""Schedulers of a streaming multiprocessor since Volta; each issues at most one instruction of one warp a cycle."""


@dataclass(frozen=True)
class Code:
    """Counts of a kernel's instructions, of one warp."""

    total: int
    loops: tuple[int, ...]
    """Instructions of each loop: from the target of a backward branch to that branch."""

    def executed(self, iterations: int) -> int:
        """Return how many instructions a warp executes whose one loop runs so often, every branch forward not taken.

        Raises:
            ValueError: the kernel has several loops, or none: how often each runs is not known.
        """
        if len(self.loops) != 1:
            raise ValueError(f"a kernel of {len(self.loops)} loops; one is expected")
        return self.total + self.loops[0] * (iterations - 1)


def read(cubin: bytes) -> Code:
    """Disassemble a cubin.

    Raises:
        subprocess.CalledProcessError: cuobjdump cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        out = subprocess.run([TOOLS / "cuobjdump", "-sass", path], capture_output=True, text=True, check=True).stdout
    return parse(out)


def sections(cubin: bytes) -> dict[str, tuple[bytes, int]]:
    """Return the machine code of a cubin's functions, and the registers of each, by their sections' names.

    A cubin is an ELF file of 64 bits whose code sections have their registers in the upper byte of `sh_info`.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, number, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(number)]
    names = headers[of_names][4]
    found = {}
    for name, _, _, _, offset, length, _, info, _, _ in headers:
        text = cubin[names + name :].split(b"\0", 1)[0].decode()
        if text.startswith(".text."):
            found[text] = cubin[offset : offset + length], info >> 24
    return found


def parse(sass: str) -> Code:
    """Count the instructions of a listing by ``cuobjdump -sass``, without the padding behind its end."""
    lines = re.findall(r"^\s+/\*([0-9a-f]+)\*/\s+(.*?);", sass, flags=re.MULTILINE)
    number = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops, end = [], len(lines)
    for i, (_, text) in enumerate(lines):
        branch = re.search(r"BRA\b.*0x([0-9a-f]+)", text)
        start = number.get(int(branch[1], 16)) if branch else None
        if start == i:
            end = min(end, i)
        elif start is not None and start < i:
            loops.append(i + 1 - start)
    return Code(end, tuple(loops))


def least_milliseconds(warps: int, instructions: int, processors: int, clock_khz: int) -> float:
    """Return the time in which a GPU can issue so many instructions of so many warps, all schedulers always busy."""
    return warps * instructions / (processors * SCHEDULERS * clock_khz)
