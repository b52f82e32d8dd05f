"""Every field of a configuration, with its type and its default.

Every field can be set on the command line as ``group.field=value``; the YAML files in ``conf/`` are named choices of
these fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class InputConfig:
    """What pixel values a network wants: ``(value - mean) / std`` on the 0..255 scale."""

    mean: list[float] = field(default_factory=lambda: [123.675, 116.28, 103.53])
    std: list[float] = field(default_factory=lambda: [58.395, 57.12, 57.375])
    channel_order: str = "rgb"  # rgb or bgr; mean and std are in this order
    max_value: float = 255.0  # what a pixel of 255 is before mean and std: 255, or 1 for statistics on the 0..1 scale
    stride: int = 1  # of the coarsest features: no side of the network's input may be smaller


@dataclass
class CheckpointConfig:
    """A public weight file, on the hub or at an address."""

    hub_id: str | None = None
    revision: str | None = None  # commit; null takes the newest and records which it was
    filename: str | None = None
    url: str | None = None  # the official file; goes before the hub's unless model.source=hub
    sha256: str | None = None  # or its first 6 digits or more, as many files have them in their names
    license: str | None = None
    gated: bool = False  # asks for a registration


@dataclass
class PublishedConfig:
    """The score that others published: shown beside ours, never as ours."""

    mIoU: float | None = None  # percent, as printed in the source, by the protocol that the model's YAML chooses
    ss: float | None = None  # single scale
    ms: float | None = None  # multi-scale and mirrored
    protocol: str = ""
    source: str = ""


@dataclass
class ProtocolsConfig:
    """What inference=ss and inference=ms choose for this model."""

    ss: str | None = None
    ms: str | None = None


@dataclass
class AboutConfig:
    """Where the model comes from."""

    paper: str = ""
    repository: str = ""
    commit: str = ""  # or the release that was read
    config: str = ""  # of the official code
    parameters_m: float | None = None  # millions, as published or counted in the official code
    weights: str = ""  # public, gated, third party, never published, ...


@dataclass
class ParityConfig:
    """How the network was checked against another implementation."""

    against: str = ""
    error: float | None = None  # largest difference of scores over the largest score, float32


@dataclass
class HttpConfig:
    """kind=http: how an endpoint is asked (docs/endpoints.md)."""

    send: str = "png"  # or jpeg, which changes the pixels
    jpeg_quality: int = 95
    returns: str = "labels"  # label maps as PNG, or scores as .npy
    timeout_s: float = 60.0  # of one try, from connecting to the last byte
    retries: int = 4  # after a lost connection, a timeout, 429 or 5xx
    concurrency: int = 4  # requests under way, of all ranks together
    token_env: str | None = None  # name of the environment variable that holds a bearer token


@dataclass
class ModelConfig:
    """Which network, its weights, and what its outputs mean."""

    name: str = MISSING
    kind: str = MISSING  # key of ade_harness.models.loading.LOADERS
    label: str = ""  # how tables call it
    _target_: str | None = None  # kind=custom: import path of an nn.Module class or a function that makes one
    kwargs: dict[str, Any] = field(default_factory=dict)  # its arguments
    path: str | None = None  # kind=onnx, torchscript, predictions: file or folder
    id: str | None = None  # kind=hf: hub id or local folder
    url: str | None = None  # kind=http: address of the endpoint; images go to /predict below it
    http: HttpConfig = field(default_factory=HttpConfig)
    revision: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    protocols: ProtocolsConfig = field(default_factory=ProtocolsConfig)
    official: CheckpointConfig = field(default_factory=CheckpointConfig)  # the authors' file
    hub: CheckpointConfig = field(default_factory=CheckpointConfig)  # the hub's
    backbone: CheckpointConfig = field(default_factory=CheckpointConfig)  # if the other file holds the head alone
    source: str | None = None  # official or hub: which of two public files; null takes the official one
    missing: str | None = None  # what was never published, and what to do
    checkpoint: str | None = None  # a weight file of your own, in place of the public one
    checkpoint_sha256: str | None = None
    backbone_checkpoint: str | None = None  # likewise, if model.checkpoint holds the head alone
    delta: bool = False  # the file holds differences from the backbone's file, which is read too
    probe: str | None = None  # recipe of `probe` (conf/probe)
    weights: str = "pretrained"  # or random
    seed: int = 0  # of random weights
    dtype: str = "fp32"  # of the weights in memory; bf16 and fp16 need the same inference.precision
    class_map: list[int | None] | None = None  # per output channel: 0..149, or null to leave it out
    class_names: list[str] | None = None  # per output channel, if the file carries none
    encoding: str = "official"  # kind=predictions, http: official (0 none, 1..150) or zero_based (0..149, 255 none)
    input: InputConfig = field(default_factory=InputConfig)
    allow_missing_keys: list[str] = field(default_factory=list)
    allow_unexpected_keys: list[str] = field(default_factory=list)
    published: PublishedConfig = field(default_factory=PublishedConfig)
    about: AboutConfig = field(default_factory=AboutConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)


@dataclass
class DatasetConfig:
    """Which images."""

    name: str = MISSING
    kind: str = MISSING  # demo or ade20k
    root: str | None = None
    split: str = "validation"
    images: int = 200  # kind=demo: how many to make
    limit: int | None = None  # only the first N: marks the run as partial
    ids: list[str] | None = None  # only these: marks the run as partial
    check_headers: bool = True  # look at every file's header before the first forward


@dataclass
class ResizeConfig:
    """How the network's input is made from the image, in uint8."""

    rule: str = "none"  # none, exact, short_side, longest_side, cover, fit
    height: int | None = None  # exact; cover: at least this; fit (null: what the model takes, if only one size)
    width: int | None = None
    side: int | None = None  # short_side, longest_side
    max_side: int | None = None  # short_side: cap of the long side
    rounding: str = "mmseg"  # short_side: mmseg, detectron2 or dinov3: where the cap is applied, how sizes are rounded
    backend: str = "opencv"  # opencv (no antialias), pillow (antialias), torch
    antialias: bool = False  # torch only
    multiple_of: int = 1  # then resize both sides to a multiple of this
    multiple_rounding: str = "up"  # or nearest
    pad_to: list[int] | None = None  # then pad to exactly (height, width)
    pad_at_least: int | None = None  # or each side that is shorter, to this
    pad_multiple: int = 1  # or each side to a multiple of this
    pad_position: str = "corner"  # corner: padding is right and bottom; centre: on all sides
    pad_value: float | None = None  # 0..255 before normalisation; null pads zeros after it


@dataclass
class WindowConfig:
    """mode=slide and mode=long_side."""

    crop: int | None = None  # side of a window
    stride: int | None = None  # slide only
    shrink: str = "each"  # image smaller than the crop: each side alone (mmseg), or both to the shorter (dinov3)


@dataclass
class AugmentationConfig:
    """Test-time augmentation: the views of an image whose results are averaged."""

    scales: list[float] = field(default_factory=lambda: [1.0])
    sides: list[int] | None = None  # short sides in pixels, in place of scales
    source: str = "protocol"  # what scales multiply: protocol (its sides), image (its size), resized (the input's size)
    max_side: int | None = None  # cap of the long side for `sides`; null scales the protocol's
    min_side: int | None = None  # no scaled short side is below this, and there is no cap then (BEiT)
    round_up: int = 1  # scaled sides below the protocol's go up to a multiple of this (DINOv3)
    flip: bool = False  # each view also mirrored
    order: str = "scale_first"  # of summation: scale_first (each scale plain, mirrored) or flips_last
    average: str = "probabilities"  # softmax over classes of each view, or scores


@dataclass
class MaskConfig:
    """How mask classification becomes scores: class softmax without void times mask sigmoid, over all queries."""

    resolution: str = "input"  # where masks are upsampled to before the sigmoid: scores (nowhere), input, original
    einsum: str = "float32"  # or bfloat16 (DINOv3)


@dataclass
class OutputConfig:
    """How scores become labels of the original size."""

    upsample: str = "two_step"  # two_step: to the input's size, then to the original; one_step: straight
    first_step: str = "bilinear"  # or legacy_bilinear (TensorFlow 1: corner-aligned origin, no half pixel)
    labels: str = "original"  # argmax at the original size; or input: argmax there, then nearest resize of labels


@dataclass
class InferenceConfig:
    """The protocol."""

    name: str = MISSING
    source: str = ""  # paper or code that defines it
    exif: bool = True  # turn images as their EXIF orientation says
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    mode: str = "whole"  # or slide (windows), or long_side (windows along the long side, spread evenly)
    window: WindowConfig = field(default_factory=WindowConfig)
    tta: AugmentationConfig = field(default_factory=AugmentationConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    precision: str = "fp32"  # fp32, tf32, bf16, fp16: of the network's forward; everything after it is float32
    batch: int | None = None  # windows and mirrored views in one forward, halved when memory is short; null: 8, CPU 1
    images: int = 1  # images of equal size that may share a forward
    channels_last: bool = False
    compile: str | None = None  # torch.compile backend, such as inductor


@dataclass
class SlurmConfig:
    """What `-m hydra/launcher=slurm` asks SLURM for; null leaves a choice to the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_min: int = 240
    nodes: int = 1
    gpus_per_node: int | None = None  # null: none asked for
    cpus_per_node: int | None = None
    mem_gb: int | None = None  # of each node
    constraint: str | None = None
    container: str | None = None  # image for srun's --container-image (pyxis)
    container_mounts: str | None = None  # such as /data:/data
    python: str | None = None  # in the container; null: the one that submits
    setup: list[str] = field(default_factory=list)  # shell lines before the run, such as "module load cuda"
    extra: dict[str, Any] = field(default_factory=dict)  # any other sbatch option, as sbatch calls it
    signal_before_s: int = 120  # before the time limit: the run saves, is requeued and continues
    most_requeues: int = 20
    folder: str = "slurm-jobs"  # submitit's scripts and logs


@dataclass
class RuntimeConfig:
    """Where it runs."""

    accelerator: str = "auto"  # auto, cpu, cuda
    devices: Any = "auto"  # number of ranks on each node; auto: all GPUs, or one CPU rank
    num_nodes: Any = "auto"  # auto: as many as srun started this on, else one
    sharding: str = "queue"  # queue: from a shared counter, largest first; plan: fixed shares of equal cost
    max_restarts: int = 0  # how often all ranks are started again after one died
    dead_after_s: float = 30.0  # a rank without a sign for so long is lost (a killed one is noticed at once)
    requeue: bool = False  # in SLURM, after the signal before the time limit: scontrol requeue
    supervise: bool = True  # false: one rank, in this very process (debuggers, profilers)
    threads: int = 1  # of each rank on CPU; fixed, because the number of threads can change float results
    workers: int | None = None  # loader processes per rank; null chooses
    timeout_min: float = 10.0  # for ranks to find each other; nothing else has a time limit
    seed: int = 0
    deterministic: bool = True
    kernels: str = "auto"  # upsampling, argmax, counting: auto, torch, numba (CPU), triton (CUDA)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


@dataclass
class RunConfig:
    """Where it is written."""

    dir: str | None = None  # null: runs/<date-time>_<model>_<short id>
    root: str = "runs"
    overlays: int = 4  # images drawn with truth, prediction and errors
    report: bool | None = None  # write report.html at the end; null: if the run is tracked, which takes it along
    label_maps: str = "few"  # PNGs of the predicted labels that are kept: none, few (the worst and best images), all
    on_error: str = "fail"  # an image fails: fail (no score) or skip (a partial score, marked so)
    allow_changed: bool = False  # continue though config, code, weights or data changed; marks the run as mixed


@dataclass
class MetricsConfig:
    """What is computed of the counts."""

    resamples: int = 10_000  # of the bootstrap behind every interval; 0: no intervals
    seed: int = 0  # of the bootstrap
    level: float = 0.95  # of the intervals
    calibration: bool = False  # count how sure the network is, and how often right: one more pass over the scores


@dataclass
class TrackingConfig:
    """Weights & Biases."""

    name: str = MISSING
    kind: str = MISSING  # wandb or none
    project: str = "ade20k"
    entity: str | None = None
    group: str | None = None  # null: the model's name
    tags: list[str] = field(default_factory=list)
    mode: str | None = None  # null: online if a key is set, else offline
    timeout_s: float = 60.0  # for the upload, after the result is on disk and shown


@dataclass
class Config:
    """Everything."""

    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    inference: InferenceConfig = MISSING
    runtime: RuntimeConfig = MISSING
    tracking: TrackingConfig = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
