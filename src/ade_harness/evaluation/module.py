"""One image from the loader to its ledger row: the LightningModule of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ade_harness import kernels
from ade_harness.config.schema import Config, OnError, TrackingKind
from ade_harness.data.dataset import SegmentationDataset
from ade_harness.errors import EveryImageError, HarnessError, ShortMemoryError
from ade_harness.evaluation.data import Failure, ImageItems, LoadedImage
from ade_harness.evaluation.job import Job
from ade_harness.evaluation.launching import Launched, launch, refuse_invalid
from ade_harness.evaluation.recorder import CountedImage, Recorder
from ade_harness.inference.predictor import Predictor
from ade_harness.metrics.counts import Row, label_hash, matrix_of
from ade_harness.runs.directory import LEDGER
from ade_harness.runs.label_maps import LabelMaps
from ade_harness.runs.ledger import LedgerError, LedgerWriter, read_rows
from ade_harness.runs.record import RunRecord
from ade_harness.runtime.cluster import host_name
from ade_harness.runtime.coordination import Coordinator
from ade_harness.runtime.gpu_errors import is_out_of_memory
from ade_harness.runtime.lifetime import directory_kept

_STEP_S = 0.05
"""How long a step goes on with further batches."""
_MAX_PENDING = 16
"""Images that may wait for the recorder: enough for its slow moments (a segment made durable), little memory."""
MAX_MOVED = 0.01
"""Share of an image's pixels that may get another class between two sessions: float32 sums in another order (another
processor, half a batch) move near-ties. Between two instruction sets of one processor, on 33 real images, at most
0.000006 in float32, and 0.0035 in bfloat16 on 32 of them."""
_FEW_PIXELS = 10
"""May differ in any case: of sparse annotations a hundredth may be less than a pixel."""
_MAX_FAILURES = 20
"""Failures of one rank: more than that is no single damaged file."""


class EvaluationModule(pl.LightningModule):
    """Predicts, counts, and writes the ledger, on one rank: the map of "map, then sum".

    On a GPU the results of a batch are read after the next one has been launched, so that neither waits, and a thread
    writes them (:class:`~ade_harness.evaluation.recorder.Recorder`). The sum is its int64 array on the host, not a
    ``torchmetrics.Metric``: counts come to the host for the ledger anyway, an image is added only when its row is
    written (a NaN or a full disk is found there), and ranks that the queue gave nothing have no batch in which a metric
    would synchronise.

    Args:
        predictor: images to labels.
        recorder: writes what was counted.
        coordinator: of the ranks.
        kernels_choice: ``runtime.kernels``.
        skip_failures: ``run.on_error=skip``: go on without images that fail.
        counted: rows of images that are in the ledger already. They keep their batch whole, and show whether the model
            is still the one that counted them.
        allow_changed: ``run.allow_changed``: go on where it is not.
    """

    def __init__(
        self, predictor: Predictor, recorder: Recorder, coordinator: Coordinator, kernels_choice: str = "auto",
        skip_failures: bool = False, counted: Mapping[str, Row] = MappingProxyType({}), allow_changed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network = predictor.network  # Lightning moves it to the device
        # and would broadcast all weights from rank 0, by way of the host: each rank has read them, and their hashes
        # were compared
        self._ddp_params_and_buffers_to_ignore = [name for name, _ in (*self.named_parameters(), *self.named_buffers())]
        self.predictor, self.recorder, self.coordinator = predictor, recorder, coordinator
        self.kernels_choice, self.skip_failures = kernels_choice, skip_failures
        self.counted, self.allow_changed = counted, allow_changed
        self.failures: list[Failure] = []
        self.stages: dict[str, float] = {}
        """Seconds of this rank: wait (for loaders), copy (and normalise), forward, labels, counts, backlog (waiting for
        the recorder); and beside them decode (and resize) of the loader processes, or part of wait if there are none,
        and ledger, the recorder's own time."""
        self.begin: Callable[[int], object] = lambda _number: None
        """Called with the number of a batch before it is evaluated; set by the rank's callback."""
        self.finish: Callable[[int, int], object] = lambda _number, _images: None
        """Called after it, also with how many of its images are new in the ledger, or soon will be."""
        self.remarks: list[str] = []
        """What was done otherwise than asked."""
        self.changes: list[str] = []
        """How this session's model differs from the one that counted before, where that is allowed."""
        self.on_change: Callable[[Sequence[str]], object] = lambda _: None
        """Called with all `changes` as soon as there is one."""
        self._launched: list[Launched] = []
        self._free_since = time.perf_counter()

    def setup(self, stage: str) -> None:
        """Compare a model without a network with the one that counted before: loaders, made next, ask servers too."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None and self.network is None:
            self.compare_with_before(data.control, torch.device("cpu"))

    def on_test_start(self) -> None:
        """Compare a network with the one that counted before, once Lightning has moved it to its device."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None and self.network is not None:
            self.compare_with_before(data.control, self.device)

    def compare_with_before(self, control: ImageItems, device: torch.device) -> None:
        """Predict once more what an earlier session has counted, before anything is added to its counts.

        Hashes of weights and of source see most of what a model is made of, but not a file that its forward reads, or
        what a server answers with. A failure here costs no image: it is predicted again when its turn comes.

        Args:
            control: batches with counted images, of which one must be comparable.
            device: where the network is.

        Raises:
            HarnessError: the labels are others, or nothing could be compared (unless ``run.allow_changed``).
        """
        reasons, compared = [], False
        for loaded in (control[number] for number in range(len(control))):
            failed = [item for item in loaded if isinstance(item, Failure)]
            try:
                if failed:
                    raise HarnessError(failed[0].message)
                batch = self._launch([item for item in loaded if isinstance(item, LoadedImage)], device)
                batch.wait()
            except HarnessError as error:
                reasons.append(str(error))
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reasons.append(str(error).splitlines()[0])
                continue
            self._compare_all(batch)
            compared = True
        if reasons and not compared:
            self._differs(
                f"no image that this run has counted could be predicted again ({reasons[0]}), so nothing shows whether"
                " the model is still the same"
            )

    def test_step(self, dataloader_iter: Iterator[tuple[Any, int, int]]) -> None:
        """Evaluate batches for a moment: one, or as many as a fast network makes; none after any rank has stopped.

        Lightning hands a step its loader where the argument has this name. Its own work for a step (hooks, the states
        that they look up) is 0.16 ms of the main thread in a loop that does nothing else, and about 0.3 ms between
        images: as much as all that this module does with one on a GPU beside launching.

        Args:
            dataloader_iter: yields ((number, batch), index, index of the loader); its end ends the test.
        """
        until = time.monotonic() + _STEP_S
        while time.monotonic() < until:
            (number, batch), *_ = next(dataloader_iter)
            if self.coordinator.may_begin():
                self.begin(number)
                self.finish(number, self.process(batch, self.device, self.global_rank))

    def cpu(self) -> EvaluationModule:
        """Leave the network where it is.

        Lightning's teardown moves modules to the CPU when a test ends: before the sum, on every rank, as private copies
        of weights that were shared pages, a second time 28 GB for each rank of a 7 B network.
        """
        return self

    def process(self, batch: list[LoadedImage | Failure], device: torch.device, rank: int) -> int:
        """Do one batch.

        A file that cannot be read costs its image, and in ``on_error="fail"`` the images of its batch, which must not
        be counted in another batch composition; what goes wrong in the model would go wrong again: it ends the work.

        Returns:
            How many images are new in the ledger, or soon will be.
        """
        self._spend("wait", time.perf_counter() - self._free_since)
        failed = [item for item in batch if isinstance(item, Failure)]
        images = [item for item in batch if isinstance(item, LoadedImage)]
        self._lose(failed)
        if any(failure.of_all for failure in failed):
            self.coordinator.stop()
        if failed and not self.skip_failures:
            images = []
            if len(self.failures) >= _MAX_FAILURES:
                self.coordinator.stop()
        try:
            if images:
                self._launch_as_fits(images, device, rank)
            while len(self._launched) > (1 if device.type == "cuda" else 0):
                self._finish(self._launched.pop(0), rank)
        finally:
            self._free_since = time.perf_counter()
        return sum(image.image_id not in self.counted for image in images)

    @contextmanager
    def _failing(self, ids: Sequence[str]) -> Iterator[None]:
        """Turn an error into failures of these images."""
        try:
            yield
        except HarnessError as error:
            self._fail(ids, error)

    def _fail(self, ids: Sequence[str], error: HarnessError) -> None:
        self._lose([Failure(image_id, str(error)) for image_id in ids])
        if not self.skip_failures or isinstance(error, LedgerError):
            self.coordinator.stop()

    def _lose(self, failures: Sequence[Failure]) -> None:
        """Note failures; where they are skipped, an image that was counted before stays counted."""
        skip = self.skip_failures
        self.failures += [f for f in failures if f.of_all or not (skip and f.image_id in self.counted)]

    def _launch_as_fits(self, images: list[LoadedImage], device: torch.device, rank: int) -> None:
        """Launch a batch; where memory is short, once more when nothing else is on the device, then in two halves.

        The forward deals with its own shortage by smaller batches (inference/forward.py). What fails at last is one
        image, and no other: with ``on_error="skip"`` a batch in which an image fails is halved too.
        """
        ids = [image.image_id for image in images]
        reason = ""
        for again in (False, True):
            if again:
                while self._launched:
                    self._finish(self._launched.pop(0), rank)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            try:
                self._launched.append(self._launch(images, device))
                return None
            except HarnessError as error:
                short = isinstance(error, ShortMemoryError)
                may_be_one = (self.skip_failures or short) and not isinstance(error, EveryImageError)
                if len(images) == 1 or not may_be_one:
                    return self._fail(ids, error)
                reason = str(error) if short else ""
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # outside of the except block, where the traceback would keep tensors
        if len(images) > 1:
            why = "memory was short beside the forward" if reason else "an image failed"
            advice = f"; inference.images={len(images) // 2} avoids it" if reason else ""
            self.remarks.append(
                f"{why}: its batch was redone in smaller ones, whose float sums may differ in the last bit{advice}"
            )
            for part in (images[: len(images) // 2], images[len(images) // 2 :]):
                self._launch_as_fits(part, device, rank)
            return None
        height, width = images[0].prepared.original_size
        text = (
            f"{ids[0]}: out of memory beside the forward, with {width}x{height} pixels (width x height; {reason})."
            " Use a device with more memory."
        )
        return self._fail(ids, HarnessError(text))

    def _launch(self, images: list[LoadedImage], device: torch.device) -> Launched:
        chosen = kernels.select(self.kernels_choice, device.type)
        with directory_kept():
            return launch(images, self.predictor, device, chosen, len(self.recorder.classes))

    def _finish(self, batch: Launched, rank: int) -> None:
        seconds = batch.wait()
        for stage, spent in seconds.items():
            self._spend(stage, spent)
        each = sum(seconds.values()) / len(batch.images)
        self._compare_all(batch)  # before any of it is counted
        for image, prediction, counts, confidence in zip(
            batch.images, batch.predictions, batch.counts, batch.calibrations, strict=True
        ):
            self._spend("decode", image.load_seconds)
            if image.image_id not in self.counted:
                with self._failing([image.image_id]):
                    refuse_invalid(image.image_id, prediction.invalid_share)
                    self.recorder.put(
                        CountedImage(image, prediction.labels, counts.numpy(), confidence.numpy(), each, rank)
                    )
        self._settle(_MAX_PENDING)

    def _compare_all(self, batch: Launched) -> None:
        """Compare those images of a batch that an earlier session has counted."""
        for image, prediction, counts in zip(batch.images, batch.predictions, batch.counts, strict=True):
            if image.image_id in self.counted:
                self._compare(self.counted[image.image_id], prediction.labels, counts.numpy())

    def _compare(self, before: Row, labels: Tensor, counts: npt.NDArray[np.int64]) -> None:
        """Compare an image with what an earlier session counted of it.

        Args:
            before: its row in the ledger.
            labels: uint8 [H, W], of now.
            counts: int64 [C, C + 1], of now.

        Raises:
            HarnessError: as :meth:`_differs`; more pixels differ than another machine explains.
        """
        if label_hash(labels) == before.label_hash:
            return
        moved = int(np.abs(counts - matrix_of([before], len(counts))).sum()) // 2
        found = (
            f"{before.image_id}, which this run counted on {before.host}, was predicted again on {host_name()} and got"
            f" other labels: at least {moved:,} of its {before.valid_pixels:,} labelled pixels differ"
        )
        # on one processor every session is bit-identical
        repeats = self.predictor.network is not None and before.host == host_name() and self.device.type == "cpu"
        if not repeats and moved <= max(MAX_MOVED * before.valid_pixels, _FEW_PIXELS):
            self.remarks.append(found)
        else:
            self._differs(found)

    def _differs(self, found: str) -> None:
        """End the session, or mark the run, where its model is not, or may not be, the one that it began with.

        Raises:
            HarnessError: unless ``run.allow_changed``.
        """
        if not self.allow_changed:
            raise HarnessError(
                f"{found}. The files of the model are those that the run began with: does it read another one while it"
                " predicts, draw random numbers, or ask a server that was changed? Nothing was added. Restore the"
                " model, or start a new run in another run.dir."
            )
        self.changes.append(f"labels: {found}")
        self.on_change(self.changes)  # now: this session may not come to its end

    def _settle(self, maximum: int) -> None:
        """Wait until at most `maximum` images are still to be written; take up the errors of those that were."""
        start, any_settled = time.perf_counter(), False
        for image_id, future in self.recorder.settled(maximum):
            any_settled = True
            with self._failing([image_id]):
                self._spend("ledger", future.result())
        if any_settled:
            self._spend("backlog", time.perf_counter() - start)

    def close(self, rank: int) -> None:
        """Read what is still on the device and make the last rows durable; a full disk is a failure like any other."""
        try:
            while self._launched:
                self._finish(self._launched.pop(0), rank)
        finally:  # after an error of the device too: rows that were written stay
            try:
                self._settle(0)
            finally:
                self.recorder.close()
                with self._failing([f"rank {rank}"]):
                    self.recorder.writer.flush()

    def _spend(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds


def check_unchanged(rows: Sequence[Row], dataset: SegmentationDataset, predictor: Predictor) -> None:
    """Refuse to add to counts that were made from other files than those that are there now.

    Raises:
        HarnessError: names the first image whose files changed.
    """
    index_of = {image_id: index for index, image_id in enumerate(dataset.ids)}
    for row in rows:
        if row.image_id not in index_of:
            raise HarnessError(
                f"{row.image_id}: this run has counted it, but it is no longer in the data set (or cannot be read)."
                " Put its files back, or start a new run."
            )
        now = dataset.content_hash(index_of[row.image_id]), predictor.source_hash(row.image_id)
        if now != (row.content_hash, row.source_hash):
            raise HarnessError(
                f"{row.image_id}: its files changed since it was counted, so the run cannot be continued."
                " Put the old files back, or start a new run."
            )


def counted_before(run_dir: Path, job: Job, say: Callable[[str], None]) -> list[Row]:
    """Return what an earlier part of this run has counted; raises as :func:`check_unchanged`."""
    before, damaged = read_rows(run_dir / LEDGER)
    if before or damaged:
        check_unchanged(before, job.dataset, job.predictor)
        say(f"continuing: {len(before)} images are done, {len(damaged)} ledger files are damaged")
    return before


def make_module(
    cfg: Config, job: Job, counted: Mapping[str, Row], coordinator: Coordinator, run_dir: Path, marks: Sequence[str],
    record: RunRecord | None = None,
) -> EvaluationModule:  # fmt: skip
    """Return the module of a rank: with its ledger's writer, and what it keeps of label maps."""
    run_dir = run_dir.absolute()  # the recorder's thread writes while the model predicts, which may change directories
    writer, label_maps = LedgerWriter(run_dir / LEDGER, marks), LabelMaps(run_dir, cfg.run.label_maps)
    recorder = Recorder(
        run_dir, job.dataset.classes, writer, label_maps, marks, cfg.tracking.kind == TrackingKind.wandb
    )
    module = EvaluationModule(
        job.predictor, recorder, coordinator, cfg.runtime.kernels, cfg.run.on_error == OnError.skip, counted,
        cfg.run.allow_changed,
    )  # fmt: skip
    if record is not None:
        module.on_change = record.add_changes
    return module
