"""Several ranks through the real Lightning launcher: the same bits as one, every image once, clean ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import Done
from tests.warm import WarmPopen

IMAGES = 10
OVERRIDES = ("tracking=none", "runtime.accelerator=cpu", "runtime.workers=0", "run.overlays=2")


def table(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "ledger").sort_values("image_id").reset_index(drop=True)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    command = [sys.executable, "-m", "ade_harness", f"dataset.limit={IMAGES}", *OVERRIDES, f"run.dir={run}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3])
def test_any_number_of_ranks_gives_the_same_bits(
    cli: Callable[..., Done], tmp_path: Path, one_rank: Path, ranks: int
) -> None:
    """Through the command itself; tests/runtime/test_same_bits.py has all combinations."""
    done = cli(
        f"dataset.limit={IMAGES}", *OVERRIDES, f"runtime.devices={ranks}", "runtime.sharding=static", "run.dir=run"
    )
    assert done.code == 0, done.err
    assert done.out.count("mIoU  ") == 1  # rank 0 alone speaks
    run = tmp_path / "run"
    assert (run / "confusion_matrix.npy").read_bytes() == (one_rank / "confusion_matrix.npy").read_bytes()
    first, found = table(one_rank), table(run)
    assert found.image_id.tolist() == first.image_id.tolist()  # each once, none padded
    assert found.label_hash.tolist() == first.label_hash.tolist()  # every pixel of every image
    assert sorted(found["rank"].unique()) == list(range(ranks))
    assert json.loads((run / "manifest.json").read_text())["timings"]["world_size"] == ranks
    assert sorted(path.name for path in (run / "logs").iterdir())[-1] == f"rank{ranks - 1:05d}.log"


@pytest.mark.slow
def test_lightnings_own_launcher_works_too(cold_cli: Callable[..., Done], tmp_path: Path, one_rank: Path) -> None:
    """Without a supervisor, as for a Python program that calls ``evaluate`` itself."""
    done = cold_cli(
        f"dataset.limit={IMAGES}", *OVERRIDES, "runtime.devices=2", "runtime.supervise=false", "run.dir=run"
    )
    assert done.code == 0, done.err
    assert table(tmp_path / "run").label_hash.tolist() == table(one_rank).label_hash.tolist()


@pytest.mark.slow
def test_a_bad_image_on_one_rank_ends_all_with_one_message(
    cli: Callable[..., Done], tiny_ade: Path, tmp_path: Path
) -> None:
    victim = tiny_ade / "images/validation/ADE_val_00001002.jpg"
    victim.write_bytes(victim.read_bytes()[:-300])
    folder = tiny_ade / "annotations/validation"
    done = cli(
        "model=predictions", f"model.path={folder}", "dataset=ade20k", f"dataset.root={tiny_ade}", *OVERRIDES,
        "runtime.devices=3", timeout=90,
    )  # fmt: skip
    assert done.code == 2, done.out + done.err
    assert done.err.count("error: ") == 1
    assert "ADE_val_00001002.jpg: this image cannot be read" in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_torchrun_works_too(tmp_path: Path, one_rank: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29731", "-m", "ade_harness",
        f"dataset.limit={IMAGES}", *OVERRIDES, "runtime.devices=2", "run.dir=run",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/confusion_matrix.npy").read_bytes() == (one_rank / "confusion_matrix.npy").read_bytes()


SLOW_MODEL = """
import time
import torch

class Net(torch.nn.Module):
    def forward(self, images):
        time.sleep(0.2)
        n, _, h, w = images.shape
        return torch.zeros(n, 150, h // 4, w // 4)
"""


@pytest.mark.slow
def test_ctrl_c_ends_quickly_keeps_the_ledger_and_says_how_to_go_on(cli: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "slow_model.py").write_text(SLOW_MODEL)
    overrides = [
        "model=custom",
        "model._target_=slow_model.Net",
        "inference=original_size",
        *OVERRIDES,
        "dataset.limit=60",
    ]
    command = [sys.executable, "-m", "ade_harness", *overrides, "runtime.devices=2", "run.dir=run"]
    process = WarmPopen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while not list((tmp_path / "run/overlays").glob("*.png")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    begin = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - begin < 15
    assert process.returncode == 2, out + err
    assert "Traceback" not in err
    assert err.count("Interrupted. Completed work is saved; to resume:") == 1
    assert err.strip().splitlines()[-1] == "  python -m ade_harness resume run"
    assert not (tmp_path / "run/metrics.json").exists()
    kept = len(table(tmp_path / "run"))
    assert kept > 0
    done = cli(*overrides, "run.dir=run")
    assert done.code == 0, done.err
    assert f"continuing: {kept} images are done" in done.out
    assert len(table(tmp_path / "run")) == 60
