"""Write src/ade_harness/inference/memory.json and the table of docs/gpu.md: GPU memory of every system, computed.

Usage: python scripts/memory_table.py  (a minute or two; no GPU)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from ade_harness.models.registry import systems

ROOT = Path(__file__).parents[1]
_COLUMNS = "| model | fp32 GiB | bf16 weights GiB | views, windows | launches in the network | beside it |"
_HEAD = f"{_COLUMNS}\n|---|---|---|---|---|---|\n"


def main() -> None:
    """Run all systems on fake tensors and write what was found."""
    command = [sys.executable, ROOT / "tests/inference/fake_cuda.py", *systems(), "--half", *systems()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    whole, half = ([line for line in lines if line["half"] is half] for half in (False, True))
    peaks = {a["model"]: {"fp32": a["peak_mib"], "bf16": b["peak_mib"]} for a, b in zip(whole, half, strict=True)}
    text = "".join(f"  {json.dumps(name)}: {json.dumps(peak)},\n" for name, peak in peaks.items())
    (ROOT / "src/ade_harness/inference/memory.json").write_text("{\n" + text.rstrip(",\n") + "\n}\n")
    rows = [
        f"| `{a['model']}` | {a['peak_mib'] / 1024:.1f} | {b['peak_mib'] / 1024:.1f} | {a['views']}, {a['windows']} |"
        f" {sum(a['forward'].values())} | {sum(a['beside'].values())} |\n"
        for a, b in zip(whole, half, strict=True)
    ]
    page = ROOT / "docs/gpu.md"
    table = _HEAD + "".join(rows) + "\n"
    page.write_text(re.sub(r"\| model \| fp32 GiB.*?\n\n", lambda _: table, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
