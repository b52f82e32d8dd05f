"""The predictor that a configuration names."""

from __future__ import annotations

from ade_harness.config.kinds import Gives, kind_of
from ade_harness.config.schema import Config
from ade_harness.data.labels import Classes
from ade_harness.errors import require
from ade_harness.inference.network import NetworkPredictor
from ade_harness.inference.predictor import Predictor
from ade_harness.models.loading import load_model
from ade_harness.models.registry import imported


def open_predictor(cfg: Config, classes: Classes) -> Predictor:
    """Load the network of a configuration, or open whatever gives label maps in place of one.

    Args:
        cfg: the whole configuration.
        classes: that are to be predicted.

    Raises:
        HarnessError: see :mod:`ade_harness.models.loading`, and the predictors.
    """
    kind = kind_of(cfg.model.kind)
    if kind.gives is Gives.labels:
        predictor: Predictor = imported(kind)(cfg, classes)
        return predictor
    return open_network(cfg, classes)


def open_network(cfg: Config, classes: Classes) -> NetworkPredictor:
    """Load the network of a configuration.

    Raises:
        HarnessError: see :mod:`ade_harness.models.loading`; or the model gives label maps and has no network.
    """
    require(
        kind_of(cfg.model.kind).gives is not Gives.labels,
        f"model={cfg.model.name}: gives label maps of a data set and has no network. Choose a model with one.",
    )
    model = load_model(cfg.model, cfg.runtime.threads, classes)
    return NetworkPredictor(model, cfg.inference, cfg.model, cfg.runtime.kernels, cfg.metrics.calibration, classes)
