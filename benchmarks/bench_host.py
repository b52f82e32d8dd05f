"""Does the host keep up with a GPU? `python benchmarks/bench_host.py` runs the loop with an instantaneous network.

Labels and counts of each image are there at once, as a GPU's would be, so what is left is the host's work: images from
loader processes, what the main thread does with each, and the recorder (ledger row, label hash, label map). Shown
for 1, 2 and 4 ranks, with the recorder in the main thread (as it was once) and in its own: images/s per rank,
milliseconds of processor time that the main thread spends on an image, and those of the recorder's thread.
A network that launches 300 kernels needs about 1.5 ms of the main thread beside that.

The second table is of whole evaluations with the same network: what the main thread spends from its first image to the
end of ``Trainer.test``, so also in Lightning's loop, in the DataLoader, in callbacks and in asking the shared queue.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from images import make_folder
from measure import machine_line, one_thread
from ours import predictor
from peers import TrivialNetwork
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from ade_harness import kernels
from ade_harness.config.compose import compose_config
from ade_harness.config.composed import Composed
from ade_harness.data.ade20k import open_ade20k
from ade_harness.evaluation.data import ImageItems
from ade_harness.evaluation.module import EvaluationModule
from ade_harness.evaluation.recorder import Recorder
from ade_harness.inference.predictor import Prediction
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerWriter
from ade_harness.runtime.coordination import Coordinator
from ade_harness.runtime.lazy_imports import import_lightning
from ade_harness.runtime.queue import ignore_signals

CPU = torch.device("cpu")
RECORDERS = (False, True)
"""Whether in a thread of its own."""


class MainThread(Executor):
    """Records in the thread that asks for it."""

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        """Call at once."""
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments, **named))
        except Exception as error:  # (the recorder's caller sees it, as from a thread)
            future.set_exception(error)
        return future


def rank_context() -> Any:
    """Return how ranks are started: forked from a process that has imported everything, but has no threads yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ours", "peers", "ade_harness.evaluation.session"])
    return context


def work(folder: Path, images: int, workers: int, label_maps: str, threaded: bool, barrier: Any) -> dict[str, float]:
    """Do one rank's work `images` times; return its times.

    Returns:
        images_per_second, and of an image in milliseconds: main (processor time of the main thread) and recorder.
    """
    one_thread()
    dataset = open_ade20k(folder, "validation")
    made = predictor(TrivialNetwork(), "torch")
    order = [[n % len(dataset.pairs)] for n in range(images)]
    answers = []
    for index in range(len(dataset.pairs)):
        target = torch.from_numpy(dataset.load(index).target)
        labels = torch.where(target == 255, torch.zeros_like(target), target).roll(7, 1)  # some pixels wrong
        answers.append((labels, kernels.select("torch", "cpu").count(labels, target, len(dataset.classes))))
    of_batches = iter([answers[group[0]] for group in order])
    counts: list[torch.Tensor] = []

    def answer(*_: Any) -> list[Prediction]:
        labels, counted = next(of_batches)
        counts.append(counted)
        return [Prediction(labels)]

    loader = DataLoader(
        ImageItems(dataset, order, made, set()), batch_size=None, num_workers=workers, worker_init_fn=ignore_signals,
        prefetch_factor=4 if workers else None, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary)
        recorder = Recorder(
            run, dataset.classes, LedgerWriter(run / "ledger"), LabelMaps(run, label_maps),
            executor=None if threaded else MainThread(),
        )  # fmt: skip
        module = EvaluationModule(made, recorder, Coordinator())
        ready = SimpleNamespace(count=lambda *_: counts.pop())
        main = 0.0
        with mock.patch.object(made, "predict", answer), mock.patch("ade_harness.kernels.select", lambda *_: ready):
            items = iter(loader)
            barrier.wait()
            begin = time.perf_counter()
            for batch in items:
                before = time.thread_time()
                module.process(batch, CPU, 0)
                main += time.thread_time() - before
            before = time.thread_time()
            module.close(0)
            main += time.thread_time() - before
        spent = time.perf_counter() - begin
    assert not module.failures, module.failures
    assert int(recorder.matrix.sum()) == sum(int(answers[group[0]][1].sum()) for group in order)
    of_image = 1e3 / images
    return {
        "rate": images / spent, "main": main * of_image, "recorder": module.stages["ledger"] * of_image,
        "backlog": module.stages["backlog"] * of_image,
    }  # fmt: skip


def _rank(pipe: Any, rounds: int, barrier: Any, *arguments: Any) -> None:
    for _ in range(rounds):
        for threaded in RECORDERS:
            pipe.send(work(*arguments, threaded, barrier))


def ranks_at_once(ranks: int, rounds: int, *arguments: Any) -> dict[bool, list[dict[str, float]]]:
    """Run ranks at the same time, the two recorders taking turns; return the means of the ranks, of each round."""
    context = rank_context()
    barrier = context.Barrier(ranks)
    started = []
    for _ in range(ranks):
        mine, other = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(other, rounds, barrier, *arguments))
        process.start()
        other.close()
        started.append((process, mine))
    times: dict[bool, list[dict[str, float]]] = {threaded: [] for threaded in RECORDERS}
    for _ in range(rounds):
        for threaded in RECORDERS:
            found = [mine.recv() for _, mine in started]
            times[threaded].append({name: statistics.mean(one[name] for one in found) for name in found[0]})
    for process, _ in started:
        process.join()
    return times


def evaluate_rank(pipe: Any, overrides: list[str], threaded: bool, place: dict[str, str], folder: Path) -> None:
    """Be one rank of an evaluation whose network is instantaneous; send its times through `pipe`.

    Args:
        pipe: gets images_per_second, and main, milliseconds of processor time of the main thread for an image.
        overrides: the evaluation's configuration.
        threaded: whether the recorder has a thread of its own.
        place: environment variables of the rank.
        folder: where it runs.
    """
    os.environ |= place
    os.chdir(folder)
    one_thread()
    import_lightning()
    from lightning.pytorch import Trainer

    from ade_harness.evaluation import module, recorder
    from ade_harness.evaluation.session import run_session
    from ade_harness.inference.network import NetworkPredictor

    composed = Composed.from_config(compose_config(overrides))
    dataset = open_ade20k(Path(str(composed.config.dataset.root)), "validation")
    plain = kernels.select("torch", "cpu")
    answers, counts = {}, {}
    for index, pair in enumerate(dataset.pairs):
        target = torch.from_numpy(dataset.load(index).target)
        labels = torch.where(target == 255, torch.zeros_like(target), target).roll(7, 1)  # some pixels wrong
        answers[pair.image_id] = labels
        counts[labels.data_ptr()] = plain.count(labels, target, len(dataset.classes))
    first: list[tuple[float, float]] = []
    done = [0]
    process, test = EvaluationModule.process, Trainer.test

    def processed(self: Any, batch: Any, *arguments: Any) -> int:
        if not first:
            first.append((time.thread_time(), time.perf_counter()))
        done[0] += len(batch)
        return process(self, batch, *arguments)

    def tested(self: Any, *arguments: Any, **options: Any) -> Any:
        found = test(self, *arguments, **options)
        (cpu, begin), images = first[0], done[0]
        spent = {"main": 1e3 * (time.thread_time() - cpu) / images, "rate": images / (time.perf_counter() - begin)}
        pipe.send(spent)
        return found

    def answer(_: Any, batch: Any, *rest: Any) -> list[Prediction]:
        return [Prediction(answers[prepared.image_id]) for prepared in batch]

    ready = SimpleNamespace(count=lambda labels, *_: counts[labels.data_ptr()])
    executor = recorder.ThreadPoolExecutor if threaded else lambda *_: MainThread()
    with ExitStack() as stack:
        for owner, name, instead in (
            (NetworkPredictor, "predict", answer), (EvaluationModule, "process", processed), (Trainer, "test", tested),
            (recorder, "ThreadPoolExecutor", executor), (module.kernels, "select", lambda *_: ready),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, instead))
        nowhere = stack.enter_context(Path(os.devnull).open("w"))
        run_session(composed, console=Console(file=nowhere))


def evaluations(
    ranks: int, rounds: int, root: Path, workers: int, label_maps: str
) -> dict[bool, list[dict[str, float]]]:
    """Evaluate with all ranks at the same time, the two recorders taking turns; return the means of the ranks."""
    context = rank_context()
    times: dict[bool, list[dict[str, float]]] = {threaded: [] for threaded in RECORDERS}
    for number in range(rounds):
        for threaded in RECORDERS:
            overrides = [
                "model=custom", "model._target_=peers.TrivialNetwork", "model.weights=random", "dataset=ade20k",
                f"dataset.root={root}", "inference=original_size", "tracking=none", "run.report=false",
                f"run.dir=run-{ranks}-{number}-{threaded}-{label_maps}", f"run.label_maps={label_maps}",
                "run.overlays=0", "metrics.resamples=0", "metrics.flops=false", f"runtime.devices={ranks}",
                f"runtime.workers={workers}", "runtime.accelerator=cpu",
            ]  # fmt: skip
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            started = []
            for rank in range(ranks):
                place = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | dict.fromkeys(
                    ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)
                )
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                mine, other = context.Pipe(duplex=False)
                process = context.Process(target=evaluate_rank, args=(other, overrides, threaded, place, root.parent))
                process.start()
                other.close()
                started.append((process, mine))
            found = [mine.recv() for _, mine in started]
            for process, _ in started:
                process.join()
                assert process.exitcode == 0, process.exitcode
            times[threaded].append({name: statistics.mean(one[name] for one in found) for name in found[0]})
    return times


def whole_evaluations(options: argparse.Namespace, folder: Path) -> Table:
    """Measure whole evaluations; return their table."""
    make_folder(folder, options.evaluated)
    table = Table(title="whole evaluations, medians", title_justify="left")
    for column in ("ranks", "label maps", "recorder", "main thread, CPU ms an image", "images/s per rank"):
        table.add_column(column, justify="left" if column in ("label maps", "recorder") else "right")
    for ranks in options.ranks:
        for label_maps in options.label_maps:
            found = evaluations(ranks, options.rounds, folder, options.workers, label_maps)
            for threaded, times in found.items():
                middle = {name: np.median([one[name] for one in times]) for name in times[0]}
                where = "own thread" if threaded else "main thread"
                table.add_row(str(ranks), label_maps, where, f"{middle['main']:.2f}", f"{middle['rate']:.0f}")
    return table


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400, help="of each rank")
    parser.add_argument("--files", type=int, default=16, help="different images")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each rank")
    parser.add_argument("--label-maps", nargs="+", default=["few", "all"], choices=["none", "few", "all"])
    parser.add_argument(
        "--evaluated", type=int, default=1200, help="images of the whole evaluations, of all ranks together"
    )
    options = parser.parse_args()
    table = Table(title="the host's work on an image, medians; ms", title_justify="left")
    for column in ("ranks", "label maps", "recorder", "images/s per rank", "main thread, CPU", "recorder", "backlog"):
        table.add_column(column, justify="left" if column in ("label maps", "recorder") else "right")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "ADEChallengeData2016"
        make_folder(folder, options.files)
        for ranks in options.ranks:
            for label_maps in options.label_maps:
                found = ranks_at_once(ranks, options.rounds, folder, options.images, options.workers, label_maps)
                for threaded, times in found.items():
                    middle = {name: np.median([one[name] for one in times]) for name in times[0]}
                    table.add_row(
                        str(ranks), label_maps, "own thread" if threaded else "main thread", f"{middle['rate']:.0f}",
                        *(f"{middle[name]:.2f}" for name in ("main", "recorder", "backlog")),
                    )  # fmt: skip
        Console(width=100).print(table)
        Console(width=100).print(whole_evaluations(options, folder.parent / "whole" / "ADEChallengeData2016"))
    print(machine_line())


if __name__ == "__main__":
    main()
