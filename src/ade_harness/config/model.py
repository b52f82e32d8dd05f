"""The ``model`` group: which network, its weights, and what its outputs mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ade_harness.config.fields import MAX_SEED, MISSING, bounded, bounded_list, place, written

NO_CLASS_NAMES = ("background", "other", "others", "unlabeled", "unlabelled", "void", "ignore", "none", "no class")
"""What models call a channel for unlabelled pixels or background."""


class ChannelOrder(StrEnum):
    """The channel order that a network takes."""

    rgb = "rgb"
    bgr = "bgr"


class ImageFormat(StrEnum):
    """How an image is sent."""

    png = "png"
    jpeg = "jpeg"  # changes the pixels


class Returns(StrEnum):
    """What an endpoint answers with."""

    labels = "labels"  # label maps as PNG
    scores = "scores"  # .npy


class WeightSource(StrEnum):
    """Which of two public files."""

    official = "official"
    hub = "hub"


class BackboneSource(StrEnum):
    """Which public files of a frozen backbone."""

    official = "official"  # the authors' own, or the hub's
    timm = "timm"  # timm's, on the hub


class Weights(StrEnum):
    """Where a network's weights come from."""

    pretrained = "pretrained"
    random = "random"


class CheckpointWeights(StrEnum):
    """Which weights of a file that holds both those that were trained and their average."""

    ema = "ema"
    model = "model"


class Dtype(StrEnum):
    """Type of the weights in memory."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Encoding(StrEnum):
    """What the values of label files mean, and how files store them.

    `official`: 0 unlabelled, 1..C; `zero_based`: 0..C-1, 255 unlabelled. Both as 8-bit grey PNGs, or PNGs with a
    palette that is known to show labels by their value; the others say what else the files are.
    """

    official = "official"
    zero_based = "zero_based"
    palette_index = "palette_index"  # official values, the indices of a palette PNG
    palette_index_zero_based = "palette_index_zero_based"
    palette_colour = "palette_colour"  # official values, the grey levels of a palette's entries
    palette_colour_zero_based = "palette_colour_zero_based"
    colour = "colour"  # the data set's colours; black is unlabelled
    uint16 = "uint16"  # official values, 16-bit grey PNG
    uint16_zero_based = "uint16_zero_based"
    npy = "npy"  # official values, NumPy file of any integers
    npy_zero_based = "npy_zero_based"


@dataclass
class InputConfig:
    """What pixel values a network wants: ``(value - mean) / std`` on the 0..255 scale."""

    mean: list[float] = bounded_list([123.675, 116.28, 103.53], length=3)
    std: list[float] = bounded_list([58.395, 57.12, 57.375], length=3, above=0)
    channel_order: ChannelOrder = ChannelOrder.rgb  # mean and std are in this order
    # what a pixel of 255 is before mean and std: 255, or 1 for statistics on the 0..1 scale
    max_value: float = bounded(255.0, above=0)
    stride: int = bounded(1, at_least=1)  # of the coarsest features: no side of the network's input may be smaller


@dataclass
class CheckpointConfig:
    """A public weight file, on the hub or at an address."""

    hub_id: str | None = place()
    revision: str | None = None  # commit; null takes the newest and records which it was
    filename: str | None = place()
    url: str | None = place()  # the official file; takes precedence over the hub's unless model.source=hub
    sha256: str | None = None  # or its first 6 digits or more, as many files have them in their names
    license: str | None = None
    gated: bool = False  # asks for a registration


@dataclass
class BackboneConfig(CheckpointConfig):
    """The public weight file of a frozen backbone."""

    timm: str | None = None  # timm's name of the same weights, such as vit_7b_patch16_dinov3.lvd1689m
    source: BackboneSource = BackboneSource.official


@dataclass
class PublishedConfig:
    """The score that others published: shown beside ours, never as ours."""

    mIoU: float | None = None  # percent, as printed in the source, by the protocol that the model's YAML chooses
    ss: float | None = None  # single scale
    ms: float | None = None  # multi-scale with flip
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

    paper: str = place("")
    repository: str = place("")
    commit: str = ""  # or the release that was read
    config: str = place("")  # of the official code
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

    send: ImageFormat = ImageFormat.png
    jpeg_quality: int = bounded(95, at_least=1, at_most=100)
    returns: Returns = Returns.labels
    # of one try, from connecting to the last byte
    timeout_s: float = bounded(60.0, at_least=0.1, at_most=3600, unit="seconds")
    retries: int = bounded(4, at_least=0, at_most=20)  # after a lost connection, a timeout, 429 or 5xx
    concurrency: int = bounded(4, at_least=1, at_most=256)  # requests under way, of all ranks together
    # name of the environment variable that holds a bearer token
    token_env: str | None = written(
        r"[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable, such as MY_TOKEN, not the token", secret=True
    )


@dataclass
class ModelConfig:
    """Which network, its weights, and what its outputs mean."""

    name: str = MISSING
    kind: str = MISSING  # of ade_harness.config.kinds
    label: str = ""  # how tables call it
    _target_: str | None = None  # kind=custom: import path of an nn.Module class or a function that makes one
    kwargs: dict[str, Any] = field(default_factory=dict)  # its arguments
    path: str | None = place()  # kind=onnx, torchscript, predictions: file or folder
    output: str | None = place()  # kind=onnx: the output that is taken; null: the first of scores, else of labels
    id: str | None = place()  # kind=hf: hub id or local folder
    url: str | None = place()  # kind=http: address of the endpoint; images go to /predict below it
    http: HttpConfig = field(default_factory=HttpConfig)
    revision: str | None = None
    architecture: dict[str, Any] = field(default_factory=dict)
    protocols: ProtocolsConfig = field(default_factory=ProtocolsConfig)
    official: CheckpointConfig = field(default_factory=CheckpointConfig)  # the authors' file
    hub: CheckpointConfig = field(default_factory=CheckpointConfig)  # the hub's
    backbone: BackboneConfig = field(default_factory=BackboneConfig)  # if the other file holds the head alone
    source: WeightSource | None = None  # null takes the official file, if there is one
    missing: str | None = None  # what was never published, and what to do
    checkpoint: str | None = place()  # a weight file of your own, in place of the public one
    checkpoint_sha256: str | None = None
    checkpoint_prefix: str | None = None  # names of its weights begin so; null: found out where one alone fits
    checkpoint_weights: CheckpointWeights | None = None  # where it holds both; null: those its trainer would load
    backbone_checkpoint: str | None = place()  # likewise, if model.checkpoint holds the head alone
    delta: bool = False  # the file holds differences from the backbone's file, which is read too
    probe: str | None = None  # recipe of `probe` (conf/probe)
    weights: Weights = Weights.pretrained
    seed: int = bounded(0, at_least=0, at_most=MAX_SEED)  # of random weights
    dtype: Dtype = Dtype.fp32  # bf16 and fp16 need the same inference.precision
    # per output channel: its class, from 0, or null to leave it out
    class_map: list[int | None] | None = bounded_list(None, at_least=0, at_most=254)
    class_names: list[str] | None = None  # per output channel, if the file carries none
    encoding: Encoding = Encoding.official  # kind=predictions; kind=http: official or zero_based
    input: InputConfig = field(default_factory=InputConfig)
    allow_missing_keys: list[str] = field(default_factory=list)
    allow_unexpected_keys: list[str] = field(default_factory=list)
    published: PublishedConfig = field(default_factory=PublishedConfig)
    about: AboutConfig = field(default_factory=AboutConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
