"""What tables call a model whose file in ``conf/model`` stands for many: the packaged label, and which one it is."""

from __future__ import annotations

from pathlib import Path

from ade_harness.config.files import choices, read_choice
from ade_harness.config.kinds import kind_of
from ade_harness.config.model import ModelConfig
from ade_harness.config.plain import flatten
from ade_harness.files.reading import expanded

_LENGTH = 80


def distinct_label(model: ModelConfig) -> str:
    """Return a model's label: as the user has set it, or the packaged one with what tells it from others of its name.

    Twenty runs of ``model=hf``, or of twenty checkpoints of one system, are twenty rows of a table.
    """
    if model.name not in choices("model") or model.label != read_choice("model", model.name).get("label"):
        return model.label
    which = _which(model)
    if not which:
        return model.label
    text = f"{model.label}: {which}"
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."


def _which(model: ModelConfig) -> str:
    """Return where a model is, or what of its architecture tells it, and its checkpoint."""
    kind, architecture = kind_of(model.kind), flatten(model.architecture)
    field = kind.needs or kind.own_source
    where = getattr(model, field) if field is not None else None
    network = _place(where) if field in ("id", "path") else where
    named = "-".join(str(architecture[key]) for key in kind.named_by if key in architecture)
    return ", ".join(str(part) for part in (network or named, _place(model.checkpoint)) if part)


def _place(text: str | None) -> str | None:
    """Return a hub id as it is, or the last two names of a path: checkpoints are often called alike.

    Of a file in somebody's home directory only its own: a label is published with a score.
    """
    if not text:
        return None
    path = expanded(text)
    at_home = path.parent == Path.home() or path.parent.parent in (Path("/home"), Path("/Users"))
    return path.name if at_home else "/".join(path.parts[-2:]).lstrip("/")
