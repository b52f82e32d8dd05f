"""Ranges and combinations of a composed configuration: everything that types cannot say."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from ade_harness.config.endpoint_checks import check_endpoint
from ade_harness.config.protocol_checks import check_protocol
from ade_harness.errors import did_you_mean, require


def _one_of(cfg: DictConfig, key: str, allowed: Sequence[str]) -> None:
    value = OmegaConf.select(cfg, key)
    require(
        value in allowed,
        f"{key}={value}: expected one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}",
    )


_MOST_DEMO_IMAGES = 20_000
_FEWEST_RESAMPLES = 1_000


def validate(cfg: DictConfig) -> None:
    """Check ranges and combinations; raises HarnessError naming the key."""
    _one_of(cfg, "model.weights", ("pretrained", "random"))
    _one_of(cfg, "model.encoding", ("official", "zero_based"))
    _one_of(cfg, "model.input.channel_order", ("rgb", "bgr"))
    _one_of(cfg, "dataset.kind", ("demo", "ade20k"))
    _one_of(cfg, "dataset.split", ("validation", "training"))
    _one_of(cfg, "runtime.accelerator", ("auto", "cpu", "cuda"))
    _one_of(cfg, "runtime.sharding", ("queue", "plan"))
    _one_of(cfg, "run.on_error", ("fail", "skip"))
    _one_of(cfg, "run.label_maps", ("none", "few", "all"))
    _one_of(cfg, "runtime.kernels", ("auto", "torch", "numba", "triton"))
    _one_of(cfg, "tracking.kind", ("wandb", "none"))
    if cfg.tracking.mode is not None:
        _one_of(cfg, "tracking.mode", ("online", "offline", "disabled"))
    require(cfg.tracking.timeout_s > 0, f"tracking.timeout_s={cfg.tracking.timeout_s:g}: expected more than 0 seconds.")
    for key in ("dataset.limit", "dataset.images", "runtime.threads", "runtime.slurm.nodes", "runtime.slurm.time_min"):
        value = OmegaConf.select(cfg, key)
        require(value is None or value >= 1, f"{key}={value}: expected 1 or more.")
    for key in ("runtime.workers", "run.overlays", "runtime.max_restarts"):
        value = OmegaConf.select(cfg, key)
        require(value is None or value >= 0, f"{key}={value}: expected 0 or more.")
    for key, what in (("devices", "ranks"), ("num_nodes", "nodes")):
        value = cfg.runtime[key]
        require(
            value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1),
            f"runtime.{key}={value}: expected a number of {what} from 1 up, or auto.",
        )
    for key, least in (("dead_after_s", 5), ("timeout_min", 0.1)):
        value = cfg.runtime[key]
        require(value >= least, f"runtime.{key}={value}: expected {least} or more.")
    require(
        cfg.runtime.supervise or cfg.runtime.max_restarts == 0,
        "runtime.max_restarts needs runtime.supervise=true: a process cannot restart itself after its death.",
    )
    metrics = cfg.metrics
    require(
        metrics.resamples == 0 or metrics.resamples >= _FEWEST_RESAMPLES,
        f"metrics.resamples={metrics.resamples}: expected {_FEWEST_RESAMPLES:,} or more, or 0 for no intervals.",
    )
    require(0 < metrics.level < 1, f"metrics.level={metrics.level}: expected a number between 0 and 1, such as 0.95.")
    require(metrics.seed >= 0, f"metrics.seed={metrics.seed}: expected 0 or more.")
    require(
        not metrics.calibration or cfg.model.kind not in ("predictions", "http"),
        f"metrics.calibration needs a network's scores, and model.kind={cfg.model.kind} gives label maps.",
    )
    check_protocol(cfg)
    require(
        cfg.dataset.images <= _MOST_DEMO_IMAGES,
        f"dataset.images={cfg.dataset.images}: expected at most {_MOST_DEMO_IMAGES:,} made-up images.",
    )
    for name in ("mean", "std"):
        values = cfg.model.input[name]
        require(len(values) == 3, f"model.input.{name}: expected three numbers, got {list(values)}.")
    require(all(v > 0 for v in cfg.model.input.std), "model.input.std: expected numbers over 0.")
    for name in ("max_value", "stride"):
        value = cfg.model.input[name]
        require(value > 0, f"model.input.{name}={value}: expected a number over 0.")
    _one_of(cfg, "model.dtype", ("fp32", "bf16", "fp16"))
    require(
        cfg.model.dtype in ("fp32", cfg.inference.precision),
        f"model.dtype={cfg.model.dtype} needs inference.precision={cfg.model.dtype} (it is {cfg.inference.precision}):"
        " what is added to such weights must be converted too.",
    )
    _check_class_map(cfg.model.class_map)
    _check_model(cfg)


def _check_class_map(class_map: Sequence[int | None] | None) -> None:
    for channel, value in enumerate(class_map or ()):
        require(
            value is None or 0 <= value < 150,
            f"model.class_map[{channel}]={value}: expected 0..149, or null for a channel that is left out.",
        )
    require(
        class_map is None or any(v is not None for v in class_map),
        "model.class_map: no channel has a class, so nothing could be predicted.",
    )


_NEEDED = {
    "onnx": ("path", "the .onnx file"),
    "torchscript": ("path", "the TorchScript file"),
    "predictions": ("path", "the folder of label PNGs"),
    "http": ("url", "the address of the endpoint, such as http://127.0.0.1:8000"),
    "hf": ("id", "a hub id or a local folder"),
    "custom": ("_target_", "the import path of your nn.Module, such as my_pkg.my_module.MyNet"),
}


def _check_model(cfg: DictConfig) -> None:
    key, what = _NEEDED.get(cfg.model.kind, (None, None))
    require(key is None or cfg.model[key] is not None, f"model.{key} must be set: {what}.")
    if cfg.model.kind == "http":
        check_endpoint(cfg.model)
    require(
        cfg.model.kind != "demo" or cfg.dataset.kind == "demo",
        "model=demo knows only the made-up demo images. Choose a model for this data set, such as"
        " model=segformer_b0: `python -m ade_harness models` lists them.",
    )
    require(
        cfg.dataset.kind != "ade20k" or bool(cfg.dataset.root),
        "dataset.root must be set: the folder or zip of ADEChallengeData2016 (or set ADE20K_ROOT)."
        " `python -m ade_harness data download` fetches it.",
    )
