"""The kinds of models: one line for each, with what has to be known of it before anything is imported.

A new kind is one file and one line here. The file is that of a system (it has a
:class:`ade_harness.models.checkpoint.family.Family`), of a format (a function that returns a
:class:`ade_harness.models.loaded.LoadedModel`), or of a predictor (a function that returns a
:class:`ade_harness.inference.predictor.Predictor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from ade_harness.errors import HarnessError, did_you_mean


class Gives(Enum):
    """What the object behind a kind's line is."""

    family = auto()
    """A family of published systems: weights by key tables."""
    network = auto()
    """A function of (``model`` node, threads, classes of the data set): any other network."""
    labels = auto()
    """A function of a whole configuration: a predictor without a network of ours."""


class Source(Enum):
    """Where others can get what a run has read; see :mod:`ade_harness.leaderboard.submission.public_files`."""

    weights = auto()
    """Weight files: ``model.official``, ``.hub``, ``.checkpoint``, ``.backbone``."""
    repository = auto()
    """A repository of the hub: ``model.id``."""
    file = auto()
    """One file: ``model.path``."""
    server = auto()
    """An address that answers: ``model.url``."""
    nowhere = auto()
    """Only the submitter has it."""


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of model before it is imported."""

    where: str
    """``module:NAME`` of its object."""
    gives: Gives = Gives.family
    needs: str | None = None
    """Field of ``model`` that has to be set."""
    what: str = ""
    """That the field holds."""
    source: Source = Source.weights
    as_exported: bool = False
    """Whether it runs as its file says: no other precision, no compilation, no other type of weights."""
    synthetic: bool = False
    """Whether it knows nothing but the synthetic images."""
    is_code: bool = False
    """Whether it is code of the user's, which others need too."""
    probe: str | None = None
    """``module:NAME`` of the function of (``model`` node, classes) that loads it with a linear head to be trained."""
    own_source: str | None = None
    """Field of ``model`` that may name where the weights are, in place of a weight file."""
    saves_protocol: bool = False
    """Whether its folder may say how images are prepared (``inference=as_saved``)."""
    several_outputs: bool = False
    """Whether ``model.output`` chooses one of its outputs."""
    suffixes: tuple[str, ...] = ()
    """Endings of its files, by which a path given from Python is recognised."""
    named_by: tuple[str, ...] = ()
    """Dotted keys of ``model.architecture`` that tell one model of this kind from another."""
    trust: str | None = None
    """What somebody else's run of this kind would do, so that it is not repeated without --trust."""


_SYSTEMS = "ade_harness.models.systems"
_FORMATS = "ade_harness.models.formats"

KINDS: dict[str, Kind] = {
    "segformer": Kind(f"{_SYSTEMS}.segformer:SEGFORMER"),
    "upernet_swin": Kind(f"{_SYSTEMS}.upernet:SWIN"),
    "upernet_convnext": Kind(f"{_SYSTEMS}.upernet:CONVNEXT"),
    "beit": Kind(f"{_SYSTEMS}.beit:BEIT"),
    "dinov2_linear": Kind(f"{_SYSTEMS}.dinov2:DINOV2"),
    "dinov3_linear": Kind(f"{_SYSTEMS}.dinov3:DINOV3"),
    "siglip2_linear": Kind(f"{_SYSTEMS}.siglip2:SIGLIP2"),
    "mask2former_swin": Kind(f"{_SYSTEMS}.mask2former:MASK2FORMER_SWIN"),
    "mask2former_resnet": Kind(f"{_SYSTEMS}.mask2former:MASK2FORMER_RESNET"),
    "mask2former_fapn": Kind(f"{_SYSTEMS}.mask2former:MASK2FORMER_FAPN"),
    "maskformer": Kind(f"{_SYSTEMS}.maskformer:MASKFORMER"),
    "oneformer": Kind(f"{_SYSTEMS}.oneformer:ONEFORMER"),
    "eomt": Kind(f"{_SYSTEMS}.eomt:EOMT"),
    "eomt_dinov3": Kind(f"{_SYSTEMS}.eomt:EOMT_DINOV3"),
    "internimage": Kind(f"{_SYSTEMS}.internimage:INTERNIMAGE"),
    "vit_adapter_beit": Kind(f"{_SYSTEMS}.vit_adapter:VIT_ADAPTER_BEIT"),
    "vit_adapter_beit3": Kind(f"{_SYSTEMS}.vit_adapter:VIT_ADAPTER_BEIT3"),
    "vit_adapter_dinov2": Kind(f"{_SYSTEMS}.vit_adapter:VIT_ADAPTER_DINOV2"),
    "vit_adapter_dinov3": Kind(f"{_SYSTEMS}.vit_adapter:VIT_ADAPTER_DINOV3"),
    "demo": Kind(f"{_FORMATS}.demo:load", Gives.network, source=Source.nowhere, synthetic=True),
    "hf": Kind(
        f"{_FORMATS}.transformers:load", Gives.network, "id", "a hub id or a local folder", Source.repository,
        saves_protocol=True,
    ),
    "timm": Kind(
        f"{_FORMATS}.timm:load", Gives.network, probe=f"{_FORMATS}.timm:load_headless", named_by=("backbone.name",),
    ),
    "smp": Kind(f"{_FORMATS}.smp:load", Gives.network, own_source="id", named_by=("arch", "encoder_name")),
    "custom": Kind(
        f"{_FORMATS}.python:load", Gives.network, "_target_",
        "the import path of your nn.Module, such as my_pkg.my_module.MyNet", is_code=True,
        trust="would import and execute code of its own",
    ),
    "torchscript": Kind(
        f"{_FORMATS}.torchscript:load", Gives.network, "path", "the TorchScript file", Source.file, as_exported=True,
        suffixes=(".pt", ".ts", ".torchscript"), trust="would run a TorchScript file, which is a program",
    ),
    "exported": Kind(
        f"{_FORMATS}.exported:load", Gives.network, "path", "the .pt2 file of torch.export", Source.file,
        as_exported=True, suffixes=(".pt2",), trust="would run an exported program",
    ),
    "onnx": Kind(
        f"{_FORMATS}.onnx:load", Gives.network, "path", "the .onnx file", Source.file, as_exported=True,
        several_outputs=True, suffixes=(".onnx",),
    ),
    "predictions": Kind(
        "ade_harness.inference.folder:open_folder", Gives.labels, "path", "the folder of label PNGs", Source.nowhere,
    ),
    "http": Kind(
        "ade_harness.endpoint.predictor:open_endpoint", Gives.labels, "url",
        "the address of the endpoint, such as http://127.0.0.1:8000", Source.server,
    ),
}  # fmt: skip
"""``model.kind`` -> what is known of it."""


def kinds_that_read(field: str) -> str:
    """Return the kinds that read a field of ``model`` saying where a model is: ``onnx, exported or predictions``."""
    *others, last = (name for name, kind in KINDS.items() if field in (kind.needs, kind.own_source))
    return f"{', '.join(others)} or {last}" if others else last


def kind_of(name: str) -> Kind:
    """Return what is known of a ``model.kind``; raises HarnessError for one that is not there."""
    if name not in KINDS:
        raise HarnessError(f"model.kind={name}: unknown.{did_you_mean(name, KINDS)} Known: {', '.join(KINDS)}.")
    return KINDS[name]
