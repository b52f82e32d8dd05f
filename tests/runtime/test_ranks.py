"""What a rank's Trainer sets: the arithmetic that official code has, repeatable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from ade_harness.config.runtime import Accelerator, RuntimeConfig
from ade_harness.runtime.ranks import make_trainer


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "CUBLAS_WORKSPACE_CONFIG"})
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_global_switch_is_for_training_alone(training: bool, deterministic: bool) -> None:
    """In evaluation it would replace CUDA's bilinear kernel by a decomposition with other bits."""
    cfg = RuntimeConfig(accelerator=Accelerator.cpu, devices=1, deterministic=deterministic)
    torch.use_deterministic_algorithms(not training)  # as another library may have left it
    make_trainer(cfg, training)
    assert torch.are_deterministic_algorithms_enabled() is (training and deterministic)
    assert torch.is_deterministic_algorithms_warn_only_enabled() is (training and deterministic)
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.backends.cudnn.benchmark is False
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is deterministic


def test_switches_that_a_model_has_set_by_their_newer_names_are_read() -> None:
    """Torch then refuses to read the older ones; in a process of its own, since it remembers which were used."""
    program = (
        "import torch\nfrom ade_harness.runtime.ranks import arithmetic_as_set\n"
        "print(arithmetic_as_set()['allow_tf32'])\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\nprint(arithmetic_as_set()['allow_tf32'])\n"
        "torch.backends.cuda.matmul.fp32_precision = 'ieee'\ntorch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "torch.backends.cudnn.rnn.fp32_precision = 'ieee'\nprint(arithmetic_as_set()['allow_tf32'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1:] == ["True", "False"]
