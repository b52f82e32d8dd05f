"""Combinations of fields: what neither a field's type nor its range can say."""

from __future__ import annotations

from collections.abc import Sequence

from ade_harness.config.dataset import DatasetConfig, DatasetKind
from ade_harness.config.fields import check_lists, check_ranges
from ade_harness.config.files import default_data_roots
from ade_harness.config.inference import (
    FirstStep,
    InferenceConfig,
    LabelSize,
    MaskResolution,
    Mode,
    ResizeConfig,
    ResizeRule,
    Rounding,
    Upsample,
)
from ade_harness.config.kinds import KINDS, Gives, Kind, Source, kind_of, kinds_that_read
from ade_harness.config.model import Dtype, Encoding, ModelConfig, Returns, Weights
from ade_harness.config.probe import ProbeConfig
from ade_harness.config.schema import Config, TrackingKind
from ade_harness.errors import HarnessError, require
from ade_harness.files.address import check_url

_NEEDED_LENGTHS = {
    ResizeRule.exact: ("height", "width"),
    ResizeRule.cover: ("height", "width"),
    ResizeRule.short_side: ("side",),
    ResizeRule.longest_side: ("side",),
}
_READ_LENGTHS = {
    **_NEEDED_LENGTHS, ResizeRule.short_side: ("side", "max_side"), ResizeRule.fit: ("height", "width"),
}  # fmt: skip
_SECRET = (
    "It would be written into the run's record: put it into an environment variable, and name that as"
    " model.http.token_env."
)
_EXAMPLE_URL = "http://127.0.0.1:8000 or https://example.org/segmenter; images go to /predict below it"


def validate(config: Config) -> None:
    """Check ranges and combinations.

    Raises:
        HarnessError: names the key, what it is, and what was expected.
    """
    check_lists(config)
    check_ranges(config)
    _check_runtime(config)
    _check_metrics(config)
    _check_protocol(config)
    _check_model(config)
    _check_dataset(config)
    _check_tracking(config)
    if config.probe is not None:
        _check_probe(config.probe)


def _check_runtime(config: Config) -> None:
    require(
        config.runtime.supervise or config.runtime.max_restarts == 0,
        "runtime.max_restarts needs runtime.supervise=true: a process cannot restart itself after its death.",
    )


def _check_metrics(config: Config) -> None:
    metrics = config.metrics
    require(
        not metrics.calibration or kind_of(config.model.kind).gives is not Gives.labels,
        f"metrics.calibration needs a network's scores, and model.kind={config.model.kind} gives label maps.",
    )


def _check_protocol(config: Config) -> None:
    inference = config.inference
    _check_resize(inference.resize)
    _check_windows(inference)
    _check_views(inference)
    _check_output(inference)
    require(
        not kind_of(config.model.kind).as_exported
        or (inference.precision in ("fp32", "tf32") and inference.compile is None),
        f"inference.precision={inference.precision}, inference.compile={inference.compile}: a model of kind"
        f" {config.model.kind} runs as it was exported. Use fp32 and null.",
    )


def _check_resize(resize: ResizeConfig) -> None:
    for name in _NEEDED_LENGTHS.get(resize.rule, ()):
        value = getattr(resize, name)
        require(
            value is not None and value >= 1,
            f"inference.resize.{name}={value}: the rule {resize.rule} needs a length of 1 pixel or more.",
        )
    require(
        not resize.antialias or resize.backend == "torch",
        f"inference.resize.antialias=true: is for backend=torch; {resize.backend} always has"
        f" {'it' if resize.backend == 'pillow' else 'none'}.",
    )
    require(
        resize.rounding != Rounding.dinov3 or resize.max_side is None,
        f"inference.resize.max_side={resize.max_side}: the rounding dinov3 has no cap. Use null.",
    )


def _check_windows(inference: InferenceConfig) -> None:
    window = inference.window
    if inference.mode == Mode.whole:
        return
    require(
        window.crop is not None and window.crop >= 1,
        f"inference.window.crop={window.crop}: mode={inference.mode} needs the side of a window in pixels.",
    )
    if inference.mode == Mode.slide:
        require(
            window.stride is not None and window.stride >= 1,
            f"inference.window.stride={window.stride}: mode=slide needs a step of 1 pixel or more.",
        )
        require(
            (window.stride or 0) <= (window.crop or 0),
            f"inference.window.stride={window.stride}: is over inference.window.crop={window.crop}, so pixels between"
            " windows would have no scores. Choose a stride up to the crop.",
        )
    for key, holds in (
        ("output.labels", inference.output.labels == LabelSize.original),
        ("output.first_step", inference.output.first_step == FirstStep.bilinear),
        ("masks.resolution", inference.masks.resolution != MaskResolution.original),
    ):
        require(holds, f"inference.{key}: needs inference.mode=whole.")


def unread_lengths(inference: InferenceConfig) -> dict[str, str]:
    """Return the lengths of a protocol that its own rules do not read, each with the reason."""
    rule, window = inference.resize.rule, inference.window
    lengths = {
        name: f"resize.rule={rule} does not read it"
        for name in ("height", "width", "side", "max_side")
        if name not in _READ_LENGTHS.get(rule, ()) and getattr(inference.resize, name) is not None
    }
    unread = {f"resize.{name}": reason for name, reason in lengths.items()}
    if inference.mode == Mode.whole and window.crop is not None:
        unread["window.crop"] = "mode=whole has no windows"
    if inference.mode != Mode.slide and window.stride is not None:
        unread["window.stride"] = f"mode={inference.mode} has no stride"
    if inference.tta.sides is None and inference.tta.max_side is not None:
        unread["tta.max_side"] = "it caps tta.sides, which is null"
    return unread


def _check_views(inference: InferenceConfig) -> None:
    tta, resize = inference.tta, inference.resize
    require(
        tta.sides is None or resize.rule == ResizeRule.short_side,
        f"inference.tta.sides: are short sides, the protocol's rule is {resize.rule}. Use tta.scales.",
    )
    many = len(tta.scales if tta.sides is None else tta.sides) > 1 or tta.flip
    require(
        not (many and inference.output.labels == LabelSize.input),
        "inference.output.labels=input: labels cannot be averaged over views. Use original.",
    )
    require(
        not (many and resize.rule == ResizeRule.fit),
        "inference.resize.rule=fit: has one size only. Use another rule for test-time augmentation.",
    )
    one = "width" if resize.width is None else "height"
    require(
        resize.rule != ResizeRule.fit or (resize.height is None) == (resize.width is None),
        f"inference.resize.{one}=None: rule=fit needs height and width, or neither (the model's own input size).",
    )


def _check_output(inference: InferenceConfig) -> None:
    resize, output = inference.resize, inference.output
    padded = (
        resize.pad_to is not None
        or resize.pad_multiple > 1
        or resize.pad_at_least is not None
        or resize.rule == ResizeRule.fit
    )
    require(
        not (padded and output.upsample == Upsample.one_step),
        "inference.output.upsample=one_step does not go with padding: the padding is cut off at the input's size."
        " Use two_step.",
    )
    require(
        output.upsample == Upsample.two_step or inference.mode == Mode.whole,
        "inference.output.upsample=one_step: windows are put together at the input's size. Use two_step.",
    )


_PLACES = tuple(dict.fromkeys(field for kind in KINDS.values() for field in (kind.needs, kind.own_source) if field))
"""Fields that say where a model is."""


def _check_model(config: Config) -> None:
    model = config.model
    require(
        model.dtype == Dtype.fp32 or model.dtype == str(config.inference.precision),
        f"model.dtype={model.dtype} needs inference.precision={model.dtype} (it is {config.inference.precision}):"
        " what is added to such weights must be converted too.",
    )
    _check_class_map(model.class_map, config.dataset.kind.num_classes)
    kind = kind_of(model.kind)
    require(
        kind.needs is None or getattr(model, kind.needs) is not None, f"model.{kind.needs} must be set: {kind.what}."
    )
    unread = next(
        (n for n in _PLACES if getattr(model, n) is not None and n not in (kind.needs, kind.own_source)), None
    )
    if unread is not None:
        raise HarnessError(
            f"model.{unread}={getattr(model, unread)}: would not be read, as the model is {model.name}"
            f" (model.kind={model.kind}). Add model={kinds_that_read(unread)}, or leave it out."
        )
    _check_weight_fields(model, kind)
    pixels = model.input
    require(
        # 0 and 1: a network that normalises for itself
        pixels.max_value <= 1 or not any(pixels.mean) or max(map(abs, (*pixels.mean, *pixels.std))) > 1,
        f"model.input.mean={list(pixels.mean)} and std={list(pixels.std)} are on the scale 0..1, and pixels on that of"
        f" 0..{pixels.max_value:g}: set model.input.max_value=1, or give them times 255.",
    )
    if model.url is not None:
        _check_endpoint(model)


def _check_weight_fields(model: ModelConfig, kind: Kind) -> None:
    """Refuse fields of a weight file where no weight file is read: the run would say that they were taken."""
    fields = ("checkpoint", "checkpoint_prefix", "checkpoint_weights", "backbone_checkpoint")
    given = next((name for name in fields if getattr(model, name) is not None), None)
    own = kind.own_source or kind.needs
    instead = f"it is what model.{own} names" if own else "its weights are part of the package"
    reads = kind.source == Source.weights and not (kind.own_source and getattr(model, kind.own_source) is not None)
    require(
        given is None or reads,
        f"model.{given}: model.kind={model.kind} reads no weight file: {instead}. Leave it out.",
    )
    require(
        given is None or model.weights != Weights.random,
        f"model.{given}: would not be read, since model.weights asks for random ones. Leave one of the two out.",
    )
    require(
        model.weights != Weights.random or reads,
        f"model.weights: cannot be chosen for model.kind={model.kind}: {instead}. Leave it out.",
    )
    require(
        model.output is None or kind.several_outputs,
        f"model.output={model.output}: chooses an output of an ONNX file; the model is a {model.kind}. Leave it out.",
    )


def _check_class_map(class_map: Sequence[int | None] | None, classes: int | None) -> None:
    span = f"0..{classes - 1}" if classes is not None else ""
    for channel, value in enumerate(class_map or ()):
        require(
            value is None or classes is None or value < classes,
            f"model.class_map[{channel}]={value}: expected {span}, or null for a channel that is left out.",
        )
    require(
        class_map is None or any(v is not None for v in class_map),
        "model.class_map: no channel has a class, so nothing could be predicted.",
    )


def _check_endpoint(model: ModelConfig) -> None:
    """Check where an endpoint is, and that no secret is written where a run records it."""
    check_url(model.url or "", "model.url", _SECRET, _EXAMPLE_URL)
    require(
        model.encoding in (Encoding.official, Encoding.zero_based),
        f"model.encoding={model.encoding}: an endpoint sends 8-bit grey PNGs: official or zero_based.",
    )
    require(
        model.class_map is None or model.http.returns == Returns.scores,
        "model.class_map: applies to channels of scores. Set model.http.returns=scores, or leave model.class_map out.",
    )


def _check_dataset(config: Config) -> None:
    dataset = config.dataset
    require(
        not kind_of(config.model.kind).synthetic or dataset.kind == DatasetKind.demo,
        "model=demo works only on the synthetic demo images. Choose a model for this data set, such as"
        " model=segformer_b0: `python -m ade_harness models` lists them.",
    )
    if dataset.kind == DatasetKind.folder:
        _check_own_data(dataset)
        require(config.probe is None, "probe: trains on ADE20K's training images; dataset=folder has no such split.")


def _check_tracking(config: Config) -> None:
    """Check the fields about another run, which gets the score."""
    tracking = config.tracking
    if tracking.run_id is None:
        require(tracking.step is None, "tracking.step: is the step of the run tracking.run_id. Set both, or neither.")
        return
    require(tracking.kind == TrackingKind.wandb, "tracking.run_id: needs tracking=wandb.")
    require(
        tracking.mode in (None, "online"),
        f"tracking.run_id={tracking.run_id}: a score can be added to a run only online, and tracking.mode is"
        f" {tracking.mode}.",
    )
    require(
        config.probe is None,
        "tracking.run_id: adds the score of an evaluation to a run. `probe` has a run of its own: leave it out.",
    )


def refuse_recipe(config: Config) -> None:
    """Refuse a recipe of a training where nothing is trained.

    Raises:
        HarnessError: the configuration has one.
    """
    require(
        config.probe is None,
        "probe=...: is a recipe of the command `probe`, and has no effect on `evaluate`. Remove it.",
    )


def require_data(config: Config) -> None:
    """Refuse to begin without ADE20K: a configuration alone, to be shown or loaded, needs no data.

    Raises:
        HarnessError: says where it was looked for, and how to get it; or a folder is given to a data set that has none.
    """
    require(
        config.dataset.kind == DatasetKind.ade20k or not config.dataset.root,
        f"dataset.root={config.dataset.root}: would not be read, as the data set is {config.dataset.kind}. Add"
        " dataset=ade20k to evaluate it, or leave it out.",
    )
    for key, what in OWN_DATA.items():
        value, read = getattr(config.dataset, key), config.dataset.kind == DatasetKind.folder
        require(bool(value) or not read, f"dataset.{key} must be set: {what}.")
        require(
            not value or read,
            f"dataset.{key}={value}: would not be read, as the data set is {config.dataset.kind}. Add dataset=folder to"
            " evaluate your own data, or leave it out.",
        )
    require(
        config.dataset.kind != DatasetKind.ade20k or bool(config.dataset.root),
        "dataset.root must be set: the folder or zip of ADEChallengeData2016 (or set ADE20K_ROOT). It is not in"
        f" {', '.join(map(str, default_data_roots()))}. `python -m ade_harness data download --root data` fetches it;"
        " dataset=demo tries this command on synthetic images.",
    )


OWN_DATA = {
    "image_dir": "the folder of images",
    "label_dir": "the folder of label files",
    "classes": "a YAML file with the names of the classes (docs/dataset.md)",
}
"""Fields of ``dataset`` that your own data need, and no other data set reads."""


def _check_own_data(dataset: DatasetConfig) -> None:
    require(bool(dataset.classes), f"dataset.classes must be set: {OWN_DATA['classes']}.")
    require(
        dataset.name not in (DatasetKind.ade20k, DatasetKind.demo),
        f"dataset.name={dataset.name}: is the name of another data set. Give your data a name of its own.",
    )


def _check_probe(probe: ProbeConfig) -> None:
    require(
        probe.warmup < probe.iterations,
        f"probe.warmup={probe.warmup}: expected 0 to below probe.iterations ({probe.iterations}).",
    )
