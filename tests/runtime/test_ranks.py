"""What a rank's Trainer sets: the arithmetic that official code has, repeatable."""

from __future__ import annotations

import os
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
