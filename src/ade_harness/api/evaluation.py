"""``ade_harness.evaluate``: a network in memory, a system by its name, a file or a function, to scores."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ade_harness.api.arguments import (
    Model,
    as_network,
    backbone_named,
    in_memory,
    is_tracked,
    model_overrides,
    option_overrides,
    place_of,
    plain,
    plain_name,
    refuse_twice,
    spelt_for_python,
    whole_number,
)
from ade_harness.api.predictors import FunctionPredictor, Segmenter, network_predictor
from ade_harness.api.result import Evaluation
from ade_harness.api.state import begin, callers_hydra, callers_network, callers_process, device_of
from ade_harness.config.compose import compose_config, protocol_changes
from ade_harness.config.composed import Composed
from ade_harness.config.overrides import as_override_value, overrides_of
from ade_harness.config.plain import as_dict
from ade_harness.config.schema import Config, TrackingKind
from ade_harness.config.validate import require_data
from ade_harness.data.labels import Classes
from ade_harness.errors import HarnessError, text_of
from ade_harness.evaluation.inline import Opened, conclude, count_here, open_here
from ade_harness.evaluation.job import attention_facts, describe_facts
from ade_harness.evaluation.recorder import keep_labels
from ade_harness.evaluation.session import warn_on_error
from ade_harness.files.reading import expanded
from ade_harness.inference.factory import open_predictor
from ade_harness.inference.forward import AUTOCAST
from ade_harness.inference.predictor import Predictor
from ade_harness.metrics.confusion import Matrix
from ade_harness.metrics.counts import Row
from ade_harness.models.ops.deformable import implementation_of
from ade_harness.runs.directory import LEDGER, MANIFEST
from ade_harness.runs.finished import load_run
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerWriter
from ade_harness.runs.live_status import LiveStatus
from ade_harness.runs.record import holding_lock, start_record
from ade_harness.runs.result import write_result
from ade_harness.runtime.console import make_console, print_line
from ade_harness.runtime.limits import usable_cores
from ade_harness.runtime.progress_bar import ProgressReporter
from ade_harness.runtime.ranks import arithmetic_as_set
from ade_harness.runtime.watchdog import Beat
from ade_harness.tracking.attaching import require_attachable
from ade_harness.tracking.lifecycle import tracked
from ade_harness.tracking.run import log_failure

Labels = npt.NDArray[np.uint8]


@spelt_for_python()
def evaluate(
    model: Model,
    *,
    root: str | Path | None = None,
    dataset: str = "ade20k",
    protocol: str | None = None,
    limit: int | None = None,
    checkpoint: str | Path | None = None,
    device: str | torch.device | None = None,
    devices: int = 1,
    workers: int | None = None,
    run_dir: str | Path | None = None,
    progress: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluate a model; the state of this process and of the model is restored.

    ::

        result = ade.evaluate(net, root="data/ADEChallengeData2016", protocol="mmseg_slide_512")
        result = ade.evaluate("segformer_b0", root="data/ADEChallengeData2016")
        result = ade.evaluate(lambda image: my_labels(image), root="data/ADEChallengeData2016")

    Args:
        model: an ``nn.Module`` (normalised images float32 [N, 3, H, W] to scores [N, C, h, w], or mask classification);
            the name of a system (``python -m ade_harness models``); a file (ONNX, TorchScript) or a folder of
            transformers; or a function from an image, uint8 [H, W, 3] RGB, to labels [H, W] of integers, 0..C-1, and
            255 for unlabelled.
        root: folder or zip of ADEChallengeData2016; None takes ADE20K_ROOT.
        dataset: ``ade20k``, ``demo`` (synthetic images), or ``folder`` with its ``options``.
        protocol: how the image is resized, windowed and mirrored (``conf/inference``); None takes the system's own, and
            for a network in memory the image as it is. A function sees the image as it is in any case.
        limit: only the first images; the result is marked as partial.
        checkpoint: weights of a system, in place of the public ones.
        device: such as ``"cuda:1"``; None: where the network is, or the first GPU, or the CPU.
        devices: ranks, each a process with its device. More than one needs a model with a name, a file, or a network
            that can be pickled and whose class can be imported.
        workers: threads that prepare images (of ranks: processes); None: as many as there are spare cores, at most 8.
        run_dir: also write a run directory here, for `report`, `compare`, `leaderboard` and W&B. With `devices` over 1
            it can be continued.
        progress: show a bar with rate and time left.
        options: any option of the command line by its dotted key: ``{"model.input.channel_order": "bgr"}``. Those of
            ``tracking`` log the run directory in W&B, which is not done otherwise.

    Returns:
        Scores with intervals, and the counts of each image.

    Raises:
        HarnessError: nothing was scored; the message names the file, key or image, and what to do.
    """
    whole_number("devices", devices, 1)
    if isinstance(model, Segmenter):  # as a function it would lose what is known of its weights
        raise HarnessError(
            f"model is a Segmenter: give what it was loaded from, such as evaluate({model.system!r}, ...) with the same"
            " checkpoint and options, so that the result says which weights and protocol it is of."
        )
    model = as_network(model)
    plain_name("dataset", dataset if dataset is not None else "")
    plain_name("protocol", protocol)
    if limit is not None:
        whole_number("limit", limit, 1)
    if workers is not None:
        whole_number("workers", workers, 0)
    if run_dir is not None:
        if not isinstance(run_dir, str | Path):
            raise HarnessError(f"run_dir={run_dir!r}: expected a path.")
        run_dir = expanded(run_dir)
    asked = None if device is None else place_of(device, here=devices == 1)
    if is_tracked(options) and run_dir is None:
        raise HarnessError("options: tracking logs a run directory. Give run_dir=PATH, or leave tracking out.")
    overrides = _overrides(
        model, root, dataset, protocol, limit, checkpoint, options, devices == 1, run_dir is not None
    )
    if devices > 1:
        return _in_ranks(model, overrides, devices, workers, run_dir, progress, asked)
    with callers_process():
        with callers_hydra():
            config = compose_config(overrides)
            config.runtime.threads = torch.get_num_threads()  # the caller's: what a run directory must say
            repeat = None if in_memory(model) else overrides_of(config)
            composed = Composed(config, repeat, protocol_changes(config))
        cfg = composed.config
        require_data(cfg)
        require_attachable(cfg.tracking)
        begin(str(cfg.inference.precision), cfg.runtime.seed)
        opened = open_here(cfg, lambda classes: _predictor(model, cfg, classes))
        place = asked or _device(opened.predictor)
        with callers_network(opened.predictor.network, place), backbone_named(model):
            return _evaluate(composed, opened, place, workers, run_dir, progress)


def _evaluate(
    composed: Composed, opened: Opened, device: torch.device, workers: int | None, run_dir: str | Path | None,
    progress: bool,
) -> Evaluation:  # fmt: skip
    threads = max(0, min(8, usable_cores() - 1)) if workers is None else workers
    choice = str(composed.config.runtime.kernels)
    numbers = list(range(len(opened.groups)))
    with _shown(progress, len(opened.dataset.ids)) as on_images:
        if run_dir is None:
            counted = count_here(opened, numbers, device, choice, threads, on_images)
            result, rows = conclude(composed, opened, [counted])
            return Evaluation.of_result(result, tuple(rows), None)
        cfg, path = composed.config, Path(run_dir).absolute()  # a model may change the working directory
        if (path / MANIFEST).exists():
            raise HarnessError(f"run_dir={run_dir}: holds a run already. Choose another folder, or read it: load_run.")
        cfg.run.dir = str(run_dir)
        network, of_model = opened.predictor.network, opened.predictor.facts()
        if network is not None:  # every variant that it needs is tried before the first image
            attention = implementation_of(network, device.type, AUTOCAST.get(cfg.inference.precision))
            of_model = {**of_model, **attention_facts(attention, device.type)}
        facts = describe_facts(
            opened.dataset, opened.dataset.ids_hash(), of_model, cfg, device.type, arithmetic_as_set()
        )
        facts["repeat"] = composed.repeat
        seeds = {"runtime.seed": cfg.runtime.seed, "model.seed": cfg.model.seed}
        record = start_record(as_dict(cfg), facts, opened.marks, seeds)
        console = make_console()
        with holding_lock(record), tracked(cfg, console) as tracking:
            tracking.begin(path, record.manifest)
            writer = LedgerWriter(path / LEDGER, opened.marks)
            maps = LabelMaps(path, str(cfg.run.label_maps))
            live = LiveStatus(path, record.lock, len(opened.dataset.ids), _nothing, _refuse)
            live.begin(0)

            def keep(row: Row, labels: npt.NDArray[np.uint8], counts: Matrix) -> None:
                keep_labels(maps, row, labels, counts)
                writer.append(row)

            def report(done: int) -> None:
                on_images(done)
                live.on_beats([Beat(0, done=done)])

            try:
                try:
                    counted = count_here(opened, numbers, device, choice, threads, report, keep=keep)
                finally:
                    writer.flush()
                    live.close()
                result, rows = conclude(composed, opened, [counted], path)
            except BaseException as error:  # Ctrl-C too: nothing runs any more
                why = text_of(error) or type(error).__name__
                record.leave("incomplete", {"evaluate": why})
                tracking.leave()
                if cfg.tracking.kind == TrackingKind.wandb and isinstance(error, Exception):
                    with warn_on_error(console, "W&B: not logged"):
                        log_failure(cfg.tracking, path, why)
                raise
            write_result(result)
            record.finish(rows, result.timings(), result.marks, {})
            if cfg.tracking.kind == TrackingKind.wandb:
                with warn_on_error(console, "W&B: not logged"):
                    tracking.finish(result, record.manifest)
    return Evaluation.of_result(result, tuple(rows), path)


def _nothing(text: str) -> None:
    """Say nothing of a rank that is slower than others: there is one."""


def _refuse(reason: str) -> None:
    """End an evaluation whose run directory somebody else has taken over."""
    raise HarnessError(reason)


def _overrides(
    model: Model, root: str | Path | None, dataset: str, protocol: str | None, limit: int | None,
    checkpoint: str | Path | None, options: Mapping[str, Any] | None, here: bool, runs: bool,
) -> list[str]:  # fmt: skip
    """Return the configuration that was asked for, as overrides of the command line."""
    overrides = [*model_overrides(model, checkpoint), f"dataset={dataset}"]
    if not is_tracked(options):
        overrides.append("tracking=none")
    if protocol is not None:
        overrides.append(f"inference={protocol}")
    given: dict[str, Any] = {"dataset.root": None if root is None else str(root), "dataset.limit": plain(limit)}
    overrides += [f"{key}={as_override_value(value)}" for key, value in given.items() if value is not None]
    refuse_twice({**given, "inference": protocol}, options)
    function = callable(model) and not isinstance(model, nn.Module)
    if function and protocol is not None:
        raise HarnessError(
            f"protocol={protocol!r}: has no effect: the model is a function, which gets each image as it is. Leave it"
            " out."
        )
    return overrides + option_overrides(options, in_memory(model), runs=runs, function=function, here=here)


def _predictor(model: Model, cfg: Config, classes: Classes) -> Predictor:
    if isinstance(model, nn.Module):
        return network_predictor(model, cfg, classes)
    if isinstance(model, str | Path):
        return open_predictor(cfg, classes)
    return FunctionPredictor(model, classes)


def _device(predictor: Predictor) -> torch.device:
    """Return where to compute."""
    network = predictor.network
    home = device_of(network) if network is not None else None
    mine = isinstance(predictor, FunctionPredictor) or getattr(getattr(predictor, "model", None), "of_caller", False)
    if home is not None and (mine or home.type != "cpu"):
        return home
    return torch.device("cuda" if torch.cuda.is_available() and network is not None and not mine else "cpu")


@contextmanager
def _shown(progress: bool, images: int) -> Iterator[Callable[[int], None]]:
    if not progress:
        yield lambda _: None
        return
    reporter = ProgressReporter(make_console(), images)
    reporter.start()
    try:
        yield reporter.update
    finally:
        reporter.close()


def _in_ranks(
    model: Model, overrides: Sequence[str], devices: int, workers: int | None, run_dir: str | Path | None,
    progress: bool, device: torch.device | None,
) -> Evaluation:  # fmt: skip
    """Evaluate by the command line's own ranks; a network in memory travels as a pickle."""
    with tempfile.TemporaryDirectory(prefix="ade-harness-") as folder:
        overrides = [*overrides, f"runtime.devices={devices}", "run.overlays=0"]
        overrides.append(f"run.dir={as_override_value(str(run_dir or Path(folder, 'run')))}")
        if workers is not None:
            overrides.append(f"runtime.workers={workers}")
        if device is not None:
            if ":" in str(device):
                raise HarnessError(f"device={device}: with devices={devices} each rank has its own; give cpu or cuda.")
            overrides.append(f"runtime.accelerator={device.type}")
        if in_memory(model):
            overrides += _pickled(model, Path(folder, "network.pt"), devices)
        command = [sys.executable, "-m", "ade_harness", "evaluate", *overrides]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path)}
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)  # of a training that this process is a rank of
        done = subprocess.run(
            command, env=environment, text=True, check=False, stdin=subprocess.DEVNULL,
            stdout=None if progress else subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        for line in (done.stdout or "").splitlines():
            if line.startswith(("W&B", "watch it:")):
                print_line(make_console(), line)
        if done.returncode:
            message = done.stderr.strip().removeprefix("error: ") or f"exit code {done.returncode}"
            # what is in the folder goes with it: the network of a memory, or a run that nobody asked to keep
            passing = run_dir is None or in_memory(model)
            raise HarnessError(_without_resume(message) if passing else message)
        found = Evaluation.of_run(load_run(Path(run_dir or Path(folder, "run")).absolute()))
    return (
        found
        if run_dir is not None
        else Evaluation(found.label, found.dataset, found.classes, found.metrics, found.rows)
    )


def _without_resume(message: str) -> str:
    """Return a message without its advice to continue a run that cannot be."""
    sentence = r"[^.\n]*\b(?:kept|saved)\b[^.]*?\s*`?python -m\s+ade_harness resume .*"
    return re.sub(sentence, "", message).strip()


def _pickled(model: Model, path: Path, devices: int) -> list[str]:
    """Write a network for ranks; returns the overrides with which they read it."""
    kind = type(model)
    parts = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    local = next((part for part in parts if part.__module__ == "__main__"), None)
    if not parts:
        raise HarnessError(f"devices={devices}: ranks are other processes, and a function runs in this one. devices=1.")
    if local is not None:
        raise HarnessError(
            f"devices={devices}: ranks are other processes, which cannot import this {local.__name__} of __main__. Put"
            " the class into a module, give the model by name, or use devices=1."
        )
    try:
        torch.save(model, path)
    except Exception as error:  # of anybody's __reduce__, and of torch's kinds that cannot be written so
        raise HarnessError(
            f"devices={devices}: ranks are other processes, and this {kind.__name__} cannot be pickled"
            f" ({' '.join(str(error).split())[:200]}). Give the model by name, or use devices=1."
        ) from error
    return ["model._target_=ade_harness.api.predictors.unpickled", f"model.kwargs.path={as_override_value(str(path))}"]
