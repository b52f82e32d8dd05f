"""Two nodes without SLURM or a host file, each in a network of its own: only the cable between them is shared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

NAMES = ("ade-n0", "ade-n1")
OVERRIDES = ("dataset.limit=12", "tracking=none", "runtime.accelerator=cpu", "runtime.workers=0", "run.overlays=0")


def ip(*overrides: str) -> None:
    subprocess.run(["ip", *overrides], check=True, capture_output=True, timeout=30)


@pytest.fixture
def networks() -> Iterator[tuple[str, str]]:
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip: apt-get install iproute2")
    try:
        for number, name in enumerate(NAMES):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            if number == 0:
                ip("-n", name, "link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
            else:
                ip("-n", NAMES[0], "link", "set", "cable1", "netns", name)
        for number, name in enumerate(NAMES):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"needs the right to make network namespaces (root): {error.stderr.decode().strip()}")
    yield NAMES
    remove()


def remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False, timeout=30)


@pytest.mark.slow
def test_the_same_command_on_two_machines(networks: tuple[str, str], tmp_path: Path) -> None:
    one = subprocess.run(
        [sys.executable, "-m", "ade_harness", *OVERRIDES, "run.dir=one"], cwd=tmp_path, capture_output=True, check=False
    )
    assert one.returncode == 0, one.stderr
    nodes = []
    for number, name in enumerate(networks):
        settings = {
            "NODE_RANK": str(number), "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29655",
            "GLOO_SOCKET_IFNAME": f"cable{number}",
        }  # fmt: skip
        command = [
            sys.executable,
            "-m",
            "ade_harness",
            *OVERRIDES,
            "runtime.num_nodes=2",
            "runtime.devices=1",
            "run.dir=two",
        ]
        nodes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command], cwd=tmp_path, env={**os.environ, **settings}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    ended = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    tables = [pd.read_parquet(tmp_path / run / "ledger").sort_values("image_id") for run in ("one", "two")]
    assert tables[0].label_hash.tolist() == tables[1].label_hash.tolist()
    assert np.array_equal(*(np.load(tmp_path / run / "confusion_matrix.npy") for run in ("one", "two")))
    assert json.loads((tmp_path / "two/manifest.json").read_text())["timings"]["world_size"] == 2
