"""Write src/ade_harness/inference/memory.json and the table of docs/gpu.md: GPU memory and least times, computed.

Usage: python scripts/memory_table.py  (three minutes; no GPU)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ade_harness.config.compose import compose_config
from ade_harness.inference.flops import flops_of_image
from ade_harness.models.checkpoint.strict import Strictness
from ade_harness.models.registry import family_of, systems

ROOT = Path(__file__).parents[1]
SIZE = (512, 683)
"""(height, width) of the image, as in tests/inference/fake_cuda.py."""
LAUNCH_S = 4e-6
"""Assumed of a kernel that Python launches: what the host needs for it."""
FP32_PER_S, BF16_PER_S = 67e12, 989e12
"""Operations of an H100 SXM by NVIDIA's data sheet: float32 without tensor cores, and bfloat16 with them, dense."""
_COLUMNS = (
    "| model | fp32 GiB | bf16 GiB | views, windows | launches in the network: fp32 | bf16 | beside it"
    " | 10^12 operations | ms: launches, fp32 | launches, bf16 | operations, fp32 | operations, bf16 |"
)
_HEAD = f"{_COLUMNS}\n|{'---|' * 12}\n"


def operations(name: str) -> float:
    """Return the operations of an image, by a network without values."""
    cfg = compose_config([f"model={name}"])
    architecture: Any = OmegaConf.to_container(OmegaConf.structured(cfg.model)).get("architecture")
    with torch.device("meta"):
        network = family_of(cfg.model.kind).load(architecture or {}, None, Strictness("")).eval()
    found = flops_of_image(network, cfg.inference, SIZE)
    if found is None:  # it makes tensors in its forward
        with torch.device("meta"):
            found = flops_of_image(network, cfg.inference, SIZE)
    assert found is not None, name
    return float(found)


def row(whole: dict[str, Any], half: dict[str, Any]) -> str:
    """Return a system's line of the table, of what both passes found."""
    launches, in_half = (sum(found["forward"].values()) for found in (whole, half))
    beside, count = sum(whole["beside"].values()), operations(whole["model"])
    of_launches = [LAUNCH_S * (number + beside) for number in (launches, in_half)]
    times = (*of_launches, count / FP32_PER_S, count / BF16_PER_S)
    return (
        f"| `{whole['model']}` | {whole['peak_mib'] / 1024:.1f} | {half['peak_mib'] / 1024:.1f} | {whole['views']},"
        f" {whole['windows']} | {launches} | {in_half} | {beside} | {count / 1e12:.3g} |"
        f" {' | '.join(_milliseconds(seconds) for seconds in times)} |\n"
    )


def _milliseconds(seconds: float) -> str:
    found = 1e3 * seconds
    return f"{found:,.0f}" if found >= 10 else f"{found:.2g}"


def main() -> None:
    """Run all systems on fake tensors and write what was found."""
    command = [sys.executable, ROOT / "tests/inference/fake_cuda.py", *systems(), "--half", *systems()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    lines = [json.loads(line) for line in out.splitlines()]
    whole, half = ([line for line in lines if line["half"] is half] for half in (False, True))
    peaks = {
        a["model"]: {"fp32": a["peak_mib"], "bf16": b["peak_mib"], "weights": a["weights_mib"], "pixels": a["pixels"]}
        for a, b in zip(whole, half, strict=True)
    }
    text = "".join(f"  {json.dumps(name)}: {json.dumps(peak)},\n" for name, peak in peaks.items())
    (ROOT / "src/ade_harness/inference/memory.json").write_text("{\n" + text.rstrip(",\n") + "\n}\n")
    rows = [row(a, b) for a, b in zip(whole, half, strict=True)]
    page = ROOT / "docs/gpu.md"
    table = _HEAD + "".join(rows) + "\n"
    page.write_text(re.sub(r"\| model \| fp32 GiB.*?\n\n", lambda _: table, page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
