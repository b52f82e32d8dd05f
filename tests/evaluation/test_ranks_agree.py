"""Ranks that would count something else, or round otherwise, do not begin."""

from __future__ import annotations

from typing import Any

import pytest

from ade_harness.config.compose import compose_config
from ade_harness.data.factory import open_dataset
from ade_harness.errors import HarnessError
from ade_harness.evaluation import job as module
from ade_harness.runtime.coordination import Coordinator, LocalStore

SAME = {"the label kernels": "triton_gpu", "deformable attention": "triton"}


def compare(monkeypatch: pytest.MonkeyPatch, **other: str | None) -> list[str]:
    """Compare this rank with one that differs in what is given."""
    coordinator = Coordinator(LocalStore())
    coordinator.world_size = 2

    def gather(mine: Any) -> list[Any]:
        _, first, seen, device, _ = mine
        assert set(other) <= set(seen)
        return [mine, ("n2", first, {**seen, **other}, device, "OSError: stale file handle")]

    monkeypatch.setattr(module, "gather", gather)
    dataset = open_dataset(compose_config(["dataset.images=2"]).dataset)
    return module.compare_ranks(coordinator, dataset, "ids", {"sha256": "a", "source": None}, True, SAME)


def test_equal_ranks_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(monkeypatch) == []


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("the implementation of the label kernels", "reference"),
        ("the implementation of the label kernels", "triton_gpu, plain torch enlarges masks"),
        ("the implementation of deformable attention", "torch"),
        ("torch", "2.0.0"),
        ("cuDNN", "8"),
        ("torch's allow_tf32", "True"),
        ("torch's CUBLAS_WORKSPACE_CONFIG", ":16:8"),
        ("the checkpoint (sha256)", "b"),
        ("the code's commit", "c"),
    ],
)
def test_a_rank_that_differs_is_named(monkeypatch: pytest.MonkeyPatch, what: str, value: str) -> None:
    with pytest.raises(HarnessError) as raised:
        compare(monkeypatch, **{what: value})
    assert "rank 1 on n2 differs from rank 0 on" in str(raised.value)
    assert f"{what} is {value}, not " in str(raised.value)
    files = what.startswith(("the checkpoint", "the code"))
    assert ("(OSError: stale file handle)" in str(raised.value)) == what.startswith("the implementation")
    assert ("the same files" if files else "the same software and GPUs") in str(raised.value)
