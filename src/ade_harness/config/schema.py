"""A whole configuration: every field with its type, its default and its range.

Every field can be set on the command line as ``group.field=value``; the YAML files in ``conf/`` are named choices of
these fields. A choice of several values is an Enum whose members are named as they are written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from ade_harness.config.dataset import DatasetConfig
from ade_harness.config.fields import MAX_SEED, MISSING, bounded, place, written
from ade_harness.config.inference import InferenceConfig
from ade_harness.config.model import ModelConfig
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.runtime import RuntimeConfig


class OnError(StrEnum):
    """What an image that fails costs."""

    fail = "fail"  # the score
    skip = "skip"  # itself: the score is partial, and marked so


class LabelMapsKept(StrEnum):
    """Which predicted label maps a run keeps as PNG."""

    none = "none"
    few = "few"  # the worst and best images
    all = "all"


class TrackingKind(StrEnum):
    """Where runs are logged."""

    wandb = "wandb"
    none = "none"


class TrackingMode(StrEnum):
    """As W&B's WANDB_MODE."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class RunConfig:
    """Where it is written."""

    dir: str | None = place()  # null: runs/<date-time>_<model>_<short id>
    root: str = place("runs")
    overlays: int = bounded(4, at_least=0, at_most=100_000)  # images drawn with truth, prediction and errors
    report: bool | None = None  # write report.html at the end; null: if the run is tracked, which takes it along
    label_maps: LabelMapsKept = LabelMapsKept.few
    on_error: OnError = OnError.fail
    allow_changed: bool = False  # continue though config, code, weights or data changed; marks the run as mixed


@dataclass
class MetricsConfig:
    """What is computed of the counts."""

    # of the bootstrap behind every interval; 0: no intervals
    resamples: int = bounded(10_000, at_least=1_000, at_most=1_000_000, also=0, meaning="no intervals")
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)  # of the bootstrap
    level: float = bounded(0.95, above=0, below=1)  # of the intervals
    flops: bool | None = None  # count the operations of one image; null: unless the images are synthetic
    calibration: bool = False  # count confidence and correctness of every pixel: one more pass over the scores


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    name: str = MISSING
    kind: TrackingKind = MISSING
    project: str | None = None  # null: WANDB_PROJECT, W&B's settings files, or ade20k
    entity: str | None = None
    group: str | None = None  # null: WANDB_RUN_GROUP, or the model's name
    tags: list[str] = field(default_factory=list)
    mode: TrackingMode | None = None  # null: online if a key is set, else offline
    live: bool = True  # online: the run is open while the evaluation works; false: it is uploaded at the end
    # an earlier run, of a training, that gets the score at its step; its project and entity as above
    run_id: str | None = written(
        r"[A-Za-z0-9_-]{1,128}", "the id of a W&B run, the last part of its page's address", is_place=True
    )
    step: int | None = bounded(None, at_least=0, at_most=2**63 - 1)
    timeout_s: float = bounded(60.0, above=0, unit="seconds")  # for the upload, after the result is on disk and shown


@dataclass
class Config:
    """The complete configuration."""

    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    inference: InferenceConfig = MISSING
    runtime: RuntimeConfig = MISSING
    tracking: TrackingConfig = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    probe: ProbeConfig | None = None  # of the command `probe` alone
