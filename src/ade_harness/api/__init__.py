"""The Python API: what ``import ade_harness`` offers."""

from ade_harness.api.evaluation import evaluate
from ade_harness.api.loading import load_model
from ade_harness.api.predictors import Segmenter
from ade_harness.api.result import Evaluation
from ade_harness.api.tables import compare, load_run

__all__ = ["Evaluation", "Segmenter", "compare", "evaluate", "load_model", "load_run"]
