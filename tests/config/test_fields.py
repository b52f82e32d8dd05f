"""Ranges and forms of fields: what holds, and how a message says what was expected."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import omegaconf
import pytest

from ade_harness.config import fields as fields_module
from ade_harness.config.compose import compose_config, stored_config, stored_node
from ade_harness.config.dataset import ADE20K_CLASSES, DatasetKind
from ade_harness.config.fields import Range, bounded, bounded_list, check_ranges, place, place_keys, written
from ade_harness.config.runtime import RuntimeConfig, Sharding
from ade_harness.config.schema import Config, MetricsConfig
from ade_harness.config.validate import require_data, validate
from ade_harness.errors import HarnessError


@dataclass
class Inner:
    count: int = bounded(2, at_least=1, at_most=9, unit="ranks")
    pair: list[float] = bounded_list([0.5, 2.0], length=2, above=0, ascending=True)


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    level: float = bounded(0.95, above=0, below=1)
    resamples: int = bounded(10, at_least=10, at_most=1000, also=0, meaning="no intervals")
    devices: Any = bounded("auto", at_least=1, also="auto", whole=True)
    limit: int | None = bounded(None, at_least=1)
    kept: list[int | None] | None = bounded_list(None, at_least=0)
    name: str | None = written("[a-z]+", "a word of small letters")
    token: str | None = written("[A-Z_]+", "the name of a variable", secret=True, is_place=True)
    path: str | None = place()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": 1.0}, "level=1: expected more than 0 and less than 1."),
        ({"level": 0}, "level=0: expected more than 0 and less than 1."),
        ({"level": float("nan")}, "level=nan: expected more than 0 and less than 1."),
        ({"resamples": 9}, "resamples=9: expected 10 to 1,000, or 0 for no intervals."),
        ({"resamples": False}, "resamples=False: expected 10 to 1,000, or 0 for no intervals."),
        ({"devices": 0}, "devices=0: expected 1 or more, or auto."),
        ({"devices": 1.5}, "devices=1.5: expected 1 or more, or auto."),
        ({"devices": True}, "devices=True: expected 1 or more, or auto."),
        ({"devices": "AUTO"}, "devices=AUTO: expected 1 or more, or auto."),
        ({"limit": 0}, "limit=0: expected 1 or more."),
        ({"kept": []}, "kept=[]: expected one number or more, each 0 or more."),
        ({"kept": [3, None, -1]}, "kept[2]=-1: expected 0 or more."),
        ({"name": "Ab"}, "name=Ab: expected a word of small letters."),
        ({"name": "ab\n"}, "expected a word of small letters."),
        ({"token": "hunter2"}, "token: expected the name of a variable."),
        ({"inner": Inner(count=10)}, "inner.count=10: expected 1 to 9 ranks."),
        ({"inner": Inner(pair=[2.0, 1.0])}, "inner.pair=[2.0, 1.0]: expected 2 numbers, each more than 0, the smaller first."),
        ({"inner": Inner(pair=[1.0])}, "inner.pair=[1.0]: expected 2 numbers, each more than 0, the smaller first."),
        ({"inner": Inner(pair=[0.0, 1.0])}, "inner.pair[0]=0: expected more than 0."),
    ],
)  # fmt: skip
def test_what_lies_outside_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(HarnessError) as raised:
        check_ranges(Outer(**change))
    assert message in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {}, {"level": 0.5}, {"resamples": 0}, {"resamples": 1000}, {"devices": 3}, {"devices": "auto"}, {"kept": [0, None]},
        {"name": "ab"}, {"token": "MY_TOKEN"}, {"inner": Inner(9, [1.0, 1.0])}, {"path": "a b=c"},
    ],
)  # fmt: skip
def test_what_lies_inside_is_taken(change: dict[str, Any]) -> None:
    check_ranges(Outer(**change))


def test_a_list_is_a_new_one_for_each_configuration() -> None:
    first, second = Inner(), Inner()
    first.pair.append(3.0)
    assert second.pair == [0.5, 2.0]


def test_places_are_found_in_nested_fields_too() -> None:
    assert list(place_keys(Outer)) == ["token", "path"]
    assert {"model.path", "run.dir", "tracking.run_id", "runtime.slurm.folder"} <= set(place_keys(Config))


def test_missing_is_omegaconfs() -> None:
    assert fields_module.MISSING == omegaconf.MISSING


def test_numbers_without_a_range_are_finite() -> None:
    with pytest.raises(HarnessError, match=r"model\.input\.mean\[0\]=inf: expected a finite number\.$"):
        compose_config(["model.input.mean=[inf,0,0]"])


def test_a_range_without_ends_says_nothing() -> None:
    assert str(Range()) == ""
    assert Range(length=3).of_list() == "3 numbers"
    assert str(Range(at_least=1, above=0, unit="pixels")) == "1 or more and more than 0 pixels"


def numbers(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return every field of numbers of a configuration class, and of what is nested in it, by its dotted key."""
    found: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for one in fields(kind):
        hint = hints[one.name]
        nested = [k for k in (hint, *get_args(hint)) if is_dataclass(k)]
        if nested:
            found |= numbers(nested[0], f"{prefix}{one.name}.")
        elif {int, float} & {hint, *get_args(hint), *(a for k in (hint, *get_args(hint)) for a in get_args(k))}:
            found[prefix + one.name] = one
    return found


def test_every_number_has_a_range() -> None:
    described = ("model.published.", "model.about.", "model.parity.")  # what others measured: shown, never used
    without = [
        key for key, one in numbers(Config).items() if "range" not in one.metadata and not key.startswith(described)
    ]
    assert without == []


def test_the_numbers_of_classes_of_packaged_data_sets() -> None:
    assert DatasetKind.ade20k.num_classes == DatasetKind.demo.num_classes == ADE20K_CLASSES == 150
    assert DatasetKind.folder.num_classes is None
    validate(compose_config(["model.class_map=[null,149]"]))
    with pytest.raises(HarnessError, match=r"model.class_map\[1\]=150: expected 0..149, or null"):
        validate(compose_config(["model.class_map=[null,150]"]))


def test_older_names_of_choices_are_still_read() -> None:
    assert stored_node(RuntimeConfig, {"sharding": "plan"}).sharding is Sharding.static
    assert [*Sharding] == [Sharding.queue, Sharding.static]  # no help or message proposes it


def test_infinity_is_in_no_range() -> None:
    """A range without an upper end means numbers: an infinite deviation would make every pixel 0 without a word."""
    for overrides in (["tracking.timeout_s=inf"], ["model.input.std=[inf,inf,inf]"], ["model.input.mean=[nan,1,1]"]):
        with pytest.raises(HarnessError, match=r"(timeout_s|std|mean).*expected"):
            validate(compose_config(overrides))


def test_a_whole_number_beyond_any_float_is_no_value() -> None:
    """OmegaConf raises Python's own OverflowError, in each of its ways to set a value."""
    big = 10**400
    for overrides in ([f"metrics.level={big}"], [f"++metrics.level={big}"], [f"metrics={{level: {big}}}"]):
        with pytest.raises(HarnessError, match="metrics.*int too large"):
            compose_config(overrides)
    with pytest.raises(HarnessError, match=r"config\.yaml is damaged"):
        stored_config({"metrics": {"level": big}})
    with pytest.raises(HarnessError, match=r"config\.yaml is damaged"):
        stored_node(MetricsConfig, {"level": big})


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("model.path=/nope.onnx", "Add model=torchscript, exported, onnx or predictions"), ("model.id=foo/bar", "Add model=hf or smp"),
        ("model.url=http://127.0.0.1:9", "Add model=http"), ("model._target_=a.B", "Add model=custom"),
    ],
)  # fmt: skip
def test_a_place_that_the_model_does_not_read_is_refused(given: str, advice: str) -> None:
    """Without `model=` the demo's network would be evaluated."""
    with pytest.raises(HarnessError, match=f"would not be read, as the model is demo .*{re.escape(advice)}"):
        compose_config([given])


def test_classes_alone_are_enough_where_nothing_is_evaluated(tmp_path: Path) -> None:
    """What `predict` and `serve` read."""
    (tmp_path / "classes.yaml").write_text("names: [a, b]\n")
    cfg = compose_config(
        ["model=custom", "model._target_=a.B", "dataset=folder", f"dataset.classes={tmp_path}/classes.yaml"]
    )
    with pytest.raises(HarnessError, match="dataset.image_dir must be set"):
        require_data(cfg)
