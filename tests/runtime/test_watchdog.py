"""Signs of life: silence is measured by one clock alone, a stopped process is not a dead one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from ade_harness.runs.live_status import slow_ranks
from ade_harness.runtime import watchdog as module
from ade_harness.runtime.coordination import (
    Coordinator,
    LocalStore,
    RankLostError,
    StopRequestedError,
    broken_connections,
)
from ade_harness.runtime.notes import NOTE_BYTES, SIBLING_DIED, Note
from ade_harness.runtime.signals import handled_signals
from ade_harness.runtime.uninterrupted import uninterrupted
from ade_harness.runtime.watchdog import Beat, Watchdog


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Watchdog, LocalStore, Coordinator]:
    """Rank 0 of two, whose store is here; no thread runs."""
    store = LocalStore()
    coordinator = Coordinator(store)
    watchdog = Watchdog(coordinator, silent_s=10.0)
    watchdog._store, watchdog.world_size = store, 2
    monkeypatch.setattr(module, "GRACE_S", 0.0)
    watchdog._ended.set()  # so that a loss does not end this process
    return watchdog, store, coordinator


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def report(store: LocalStore, number: int, item: str = "") -> None:
    store.set("beat/1", json.dumps(asdict(Beat(1, "n2", 77, item, number=number))))


def test_a_silent_rank_is_lost_with_all_that_is_known_of_it(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog, store, coordinator = watched
    clock = Clock(monkeypatch)
    watchdog._looked = clock.now
    watchdog._publish()
    report(store, 1, "ADE_val_00000007")
    for _ in range(11):
        clock.now += 1.0
        watchdog._publish()
        watchdog._look_at_all()
    assert coordinator.lost is None
    clock.now += 1.0
    watchdog._publish()
    watchdog._look_at_all()
    text = "rank 1 on n2 (process 77) has been silent for 10 s, last processing ADE_val_00000007"
    assert coordinator.lost == text
    assert store.get("lost").decode() == text  # the other ranks read it there
    with pytest.raises(RankLostError, match="silent for 10 s"):
        _ = coordinator.stopped
    with pytest.raises(RankLostError):
        coordinator.meet("anywhere")


def test_a_rank_that_speaks_is_not_lost_however_clocks_jump(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog, store, coordinator = watched
    clock = Clock(monkeypatch)
    watchdog._looked = clock.now
    for number in range(60):
        monkeypatch.setattr(module.time, "time", lambda number=number: (-1.0) ** number * 1e9)
        clock.now += 1.0
        report(store, number)
        watchdog._look_at_all()
    assert coordinator.lost is None


def test_after_being_stopped_itself_rank_0_gives_everybody_time(watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and fg: all ranks were stopped, none is dead."""
    watchdog, store, coordinator = watched
    clock = Clock(monkeypatch)
    watchdog._looked = clock.now
    report(store, 1)
    watchdog._look_at_all()
    clock.now += 3600.0
    watchdog._publish()
    watchdog._look_at_all()
    assert coordinator.lost is None
    for _ in range(12):
        clock.now += 1.0
        watchdog._publish()
        watchdog._look_at_all()
    assert coordinator.lost is not None  # but one that stays silent is


def test_a_stop_with_a_reason_reaches_those_who_wait() -> None:
    store = LocalStore()
    here, there = Coordinator(store), Coordinator(store)
    there.world_size = 2
    here.asked = "terminated"
    assert here.stopped
    with pytest.raises(StopRequestedError, match="terminated"):
        there.meet("worked")


def test_the_queue_gives_each_place_once() -> None:
    store = LocalStore()
    ranks = [Coordinator(store) for _ in range(3)]
    assert sorted(rank.next_item() for _ in range(5) for rank in ranks) == list(range(15))
    assert ranks[0].taken() == 15


def test_slow_ranks_are_judged_by_the_work_they_did() -> None:
    beats = [Beat(rank, "n", 1, cost=100.0, busy_seconds=10.0) for rank in range(4)]
    beats[2].busy_seconds = 30.0
    beats[3].cost, beats[3].busy_seconds = 20.0, 6.0  # fewer, larger images: three times slower too
    found = slow_ranks(beats)
    assert list(found) == [2, 3]
    assert "rank 2 on n takes 3.0 times as long as the median rank for the same work" in found[2]
    beats[1].busy_seconds = 1.0  # not long enough to compare
    assert slow_ranks(beats) == {}
    assert slow_ranks(beats[:1]) == {}


def test_a_note_outlives_its_writer_and_a_half_one_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "note"
    path.write_bytes(bytes(NOTE_BYTES))
    assert Note.read(path) == {}
    note = Note(path)
    note.write(run="runs/x", item="a" * 1000)
    note.write(item="ADE_val_00000001")
    assert Note.read(path) == {"run": "runs/x", "item": "ADE_val_00000001"}
    path.write_bytes(b'{"run": "ru' + bytes(50))
    assert Note.read(path) == {}
    assert Note.read(tmp_path / "none") == {}


@pytest.mark.parametrize("error", [ValueError("a closed file"), RuntimeError("no new thread")])
def test_a_console_that_fails_ends_no_run(watched: Any, capfd: pytest.CaptureFixture[str], error: Exception) -> None:
    """Its thread goes on: without its beats this rank would be taken for dead, and end itself."""
    watchdog, store, coordinator = watched
    watchdog.world_size, watchdog._ended = 1, threading.Event()
    calls: list[int] = []

    def shown(beats: Sequence[Beat]) -> None:
        calls.append(beats[0].number)
        raise error

    watchdog.on_beats = shown
    store.set("beat/0", json.dumps(asdict(watchdog.beat)))
    for _ in range(3):
        watchdog._publish()
        watchdog._look_at_all()
    assert calls == [1, 2, 3]
    assert coordinator.lost is None
    printed = capfd.readouterr().err
    assert printed.count(f"warning: progress is not shown: {type(error).__name__}: {error}") == 1


def test_beats_carry_a_moving_number() -> None:
    watchdog = Watchdog(Coordinator(LocalStore()), 10.0)
    reported: list[int] = []
    watchdog.on_beats = lambda beats: reported.append(beats[0].number)
    watchdog._store = LocalStore()
    watchdog.start()
    time.sleep(2.5)
    watchdog.close()
    assert reported == sorted(set(reported))
    assert len(reported) >= 2


@pytest.mark.parametrize("text", ["[pair.cc:547] Connection closed by peer [127.0.0.1]:3", "Broken pipe"])
def test_a_step_that_another_ranks_end_breaks_has_that_ranks_reason(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ade_harness.runtime.coordination._REASON_WITHIN_S", 0.3)
    store = LocalStore()
    here, there = Coordinator(store), Coordinator(store)
    here.world_size = there.world_size = 2
    with pytest.raises(RankLostError, match="the connection to another rank broke"), broken_connections(here):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="out of range") as other, broken_connections(here):
        raise RuntimeError("index out of range")
    assert not isinstance(other.value, RankLostError | StopRequestedError)
    there.stop("terminated")
    with pytest.raises(StopRequestedError, match="terminated"), broken_connections(here):
        raise RuntimeError(text)


_LEAN = """
import sys
import threading
import torch
from ade_harness.runtime.lazy_imports import import_lightning
disable = torch.compiler.disable
import_lightning()
unused = {"torch._dynamo", "sympy", "matplotlib", "transformers", "scipy", "torchmetrics.classification"}
assert not unused & set(sys.modules), unused & set(sys.modules)
assert torch.compiler.disable is disable
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        """
import lightning.pytorch
import torchmetrics
from torchmetrics.classification import MulticlassJaccardIndex
assert issubclass(MulticlassJaccardIndex, torchmetrics.Metric)
assert torchmetrics.JaccardIndex(task="multiclass", num_classes=3) is not None
assert lightning.pytorch.core.module.Metric is torchmetrics.Metric
import_lightning()  # too late, and harmless
assert torchmetrics.JaccardIndex is not None
metric = torchmetrics.MeanMetric()
metric.update(1.0)
figure, _ = metric.plot()
assert type(figure).__module__ == "matplotlib.figure"
try:
    torchmetrics.Nonsense
except AttributeError as error:
    print(error)
""",
        """
from lightning.pytorch.utilities.compile import OptimizedModule
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
network = torch.nn.Linear(2, 2)
assert not isinstance(network, OptimizedModule)
compiled = torch.compile(network, backend="eager")
assert "torch._dynamo" in sys.modules
assert isinstance(compiled, OptimizedModule)
assert compiled(torch.ones(1, 2)).equal(network(torch.ones(1, 2)))
results = _ResultCollection(training=False)  # a method of it is kept from the compiler
results.log("step", "score", torch.tensor(2.0), on_step=True, on_epoch=True, batch_size=1)
assert results.metrics(on_step=True)["log"] == {"score_step": 2.0}
import torch._dynamo as real
assert real.OptimizedModule is not OptimizedModule
print("has no attribute 'Nonsense'")
""",
        """
import lightning.pytorch as pl
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, index):
        loss = self.layer(batch).mean()
        self.log("loss", loss, on_epoch=True)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(4, 2)))
assert "loss_epoch" in trainer.callback_metrics
print("has no attribute 'Nonsense'")
""",
    ],
    ids=["metrics", "compiler", "training"],
)
def test_what_is_put_off_is_there_when_asked_for(code: str) -> None:
    """In a process of its own: this one has imported everything."""
    done = subprocess.run(
        [sys.executable, "-c", _LEAN + code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "has no attribute 'Nonsense'" in done.stdout


@pytest.mark.slow
def test_a_lightning_that_asks_for_more_is_imported_as_it_is() -> None:
    code = """
import sys, torch
from ade_harness.runtime import lazy_imports
lazy_imports._Plots.__getattr__ = lambda self, name: (_ for _ in ()).throw(AttributeError(name))  # as if plots had other names
lazy_imports.import_lightning()
import lightning.pytorch as pl
assert "matplotlib" in sys.modules and "torch._dynamo" in sys.modules
print(pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).world_size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"


class GoneStore(LocalStore):
    """The store of a rank 0 that has ended, as torch's answers."""

    def set(self, key: str, value: str) -> None:
        raise DistNetworkError("Broken pipe")

    def get(self, key: str) -> bytes:
        raise DistNetworkError("Broken pipe")

    def add(self, key: str, amount: int) -> int:
        raise DistNetworkError("Connection reset by peer")

    def check(self, keys: list[str]) -> bool:
        raise DistNetworkError("Broken pipe")


def test_whatever_is_asked_of_a_store_that_is_gone_is_one_error() -> None:
    """Ranks are asked to stop one after another: the signal of one may come when rank 0 has ended already."""
    asked = Coordinator(GoneStore())
    asked.asked = "terminated"
    for ask in (
        lambda: asked.stopped, lambda: asked.stop("terminated"), asked.stop, asked.raise_if_ended, asked.next_item,
        lambda: asked.done(1), lambda: asked.meet("here"),
    ):  # fmt: skip
        with pytest.raises(RankLostError, match="rank 0, which keeps the ranks' store, is gone"):
            ask()
    asked.lose("rank 1 is lost")  # says nothing, and keeps the reason
    assert asked.lost == "rank 1 is lost"


def test_a_signal_does_not_interrupt_what_is_being_saved() -> None:
    coordinator = Coordinator(LocalStore())
    done = []
    with handled_signals(coordinator):
        with pytest.raises(RankLostError, match="another rank of this node has died"), uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), SIBLING_DIED)
                time.sleep(0.05)
                done.append("inner")
            done.append("outer")  # only the end of the outermost one raises
        assert done == ["inner", "outer"]
        os.kill(os.getpid(), signal.SIGTERM)  # the run is ending already: nothing more is raised
        with uninterrupted():
            pass
    with handled_signals(Coordinator(LocalStore())), pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        done.append("saved")
    assert done[-1] == "saved"
