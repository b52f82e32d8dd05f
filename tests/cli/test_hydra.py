"""The command line is an ordinary Hydra application: what Hydra's documentation promises works."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ade_harness.cli.sweep import Sweep, SweepJob
from ade_harness.config.arguments import prepare
from ade_harness.config.compose import compose_config, register_schemas
from ade_harness.config.files import conf_dir
from ade_harness.config.targets import require_target
from ade_harness.errors import HarnessError
from ade_harness.metrics.confusion import Scores
from tests.cli.test_cli import FAST, Call, one_message
from tests.conftest import Done
from tests.faster_hydra import as_released, faster, leave_out_modes, read_modes

Cli = Callable[..., Done]
QUICK = (*FAST, "metrics.resamples=0", "run.overlays=0", "runtime.workers=0")
HARD = "/data/épreuve/ep=99-step=8, v2 (1)/it's #1; {x} [y].ckpt"


@pytest.fixture(autouse=True)
def _modes_are_read() -> Iterator[None]:
    read_modes()
    yield
    leave_out_modes()


def test_the_packages_files_set_no_mode() -> None:
    """Which is why `tests/faster_hydra.py` may leave out to ask."""
    register_schemas()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        assert compose("config", return_hydra_config=True).hydra.mode is None


def composed(choose: Callable[[], None], overrides: Sequence[str], folder: Path) -> tuple[str, dict[Any, Any]]:
    """Compose with Hydra as it is or faster; return the text and the types, and change the tree."""
    choose()
    register_schemas()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        tree = compose("config", [*overrides, f"hydra.searchpath=[file://{folder}]"], return_hydra_config=True)
    found = OmegaConf.to_yaml(tree), {key: OmegaConf.get_type(tree[key]) for key in tree if key != "hydra"}
    assert OmegaConf.is_struct(tree)
    tree.run.root = "changed"
    tree.hydra.searchpath = []
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["dataset.limit=3"],
        ["model=beit3", "tracking=none"],
        ["+probe=dinov3_linear", "hydra/launcher=slurm"],
        ["model=custom", "model._target_=a.b", "dataset=ade20k", "runtime.seed=1"],
        ["inference.mode=slide", "inference.window.crop=7", "+model.kwargs.a={b: [1, 2]}", "model=custom"],
        ["model=own"],
    ],
)
def test_what_the_tests_leave_out_changes_nothing(overrides: list[str], tmp_path: Path) -> None:
    own = tmp_path / "model/own.yaml"
    own.parent.mkdir()
    own.write_text("name: own\nkind: onnx\npath: a\n")
    first = composed(as_released, overrides, tmp_path)
    for _ in range(2):  # the second from what was kept
        assert composed(faster, overrides, tmp_path) == first
    others = [*overrides, "run.root=other"]
    assert composed(faster, others, tmp_path) == composed(as_released, others, tmp_path) != first
    own.write_text("name: own\nkind: onnx\npath: another\n")
    assert composed(faster, overrides, tmp_path) == composed(as_released, overrides, tmp_path)
    assert (composed(faster, overrides, tmp_path) == first) is (overrides != ["model=own"])


def test_cfg_and_its_options(call: Call) -> None:
    assert yaml.safe_load(call("--cfg", "job", "--package", "inference.resize").out)["rule"] == "none"
    assert "hydra_plugins" in call("--cfg", "hydra").out
    done = call("--cfg", "job", "--resolve", "-p", "dataset", "dataset=ade20k", "model=segformer_b0", "dataset.root=x")
    assert yaml.safe_load(done.out)["root"] == "x"


def test_a_recipe_has_no_effect_on_an_evaluation(call: Call) -> None:
    one_message(call("+probe=dinov3_linear", "dataset.images=2"), "has no effect on `evaluate`")
    done = call("-m", "+probe=dinov3_linear", "dataset.images=2,3")
    one_message(done, "2 of 2 jobs cannot run, so none was started")
    assert "has no effect on `evaluate`" in done.err


def test_pickled_configurations_are_not_run(call: Call) -> None:
    one_message(call("--experimental-rerun", "config.pickle"), "would run code from a pickle. `resume RUN` continues")


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("defaults-tree", "inference: original_size"),
        ("searchpath", "conf"),
        ("plugins", "SlurmLauncher"),
        ("config", "kernels"),
    ],
)
def test_info(call: Call, what: str, text: str) -> None:
    done = call("--info", what)
    assert done.code == 0, done.err
    assert text in done.out


def test_a_primary_configuration_and_groups_of_ones_own(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "probe").mkdir(parents=True)
    (folder / "nightly.yaml").write_text("defaults: [config, _self_]\ndataset:\n  limit: 7\n")
    (folder / "probe" / "short.yaml").write_text(
        "defaults: [dinov3_linear, _self_]\nname: short\niterations: 3\nwarmup: 0\n"
    )
    done = call("--config-dir", folder, "-cn", "nightly", "--cfg", "job", "-p", "dataset")
    assert yaml.safe_load(done.out)["limit"] == 7
    done = call(
        "probe", "-cd", folder, "model=dinov3_7b_linear", "probe=short", "probe.lr=0.5", "--cfg", "job", "-p", "probe"
    )
    recipe = yaml.safe_load(done.out)
    assert (recipe["name"], recipe["iterations"], recipe["lr"], recipe["batch"]) == ("short", 3, 0.5, 16)


@pytest.mark.slow
def test_hydras_directory_is_the_runs(call: Call, tmp_path: Path) -> None:
    assert call(*QUICK, "dataset.images=2", "hydra.run.dir=here").code == 0
    assert (tmp_path / "here" / "metrics.json").exists()
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "here" / ".hydra").exists()


def test_hydras_own_log_lies_in_the_run_directory(cli: Call, tmp_path: Path) -> None:
    """As Hydra's documentation has it: in `hydra.run.dir`, before there is a run."""
    for _ in range(2):  # the second one finds a finished run
        done = cli(*QUICK, "dataset.images=2", "hydra/job_logging=default", "hydra.run.dir=here", "hydra.verbose=true")
        assert done.code == 0, done.err
    assert "DEBUG" in (tmp_path / "here/evaluate.log").read_text()
    for more in (["run.dir=there"], ["run.root=all"], ["-m", "dataset.limit=1", "hydra.sweep.dir=sweep"]):
        done = cli(*QUICK, "dataset.images=2", "hydra/job_logging=default", "hydra.verbose=true", *more)
        assert done.code == 0, done.err
    [named] = (tmp_path / "all").iterdir()
    for place in (tmp_path / "there", named, tmp_path / "sweep/0_demo"):
        assert "DEBUG" in (place / "evaluate.log").read_text()
        assert (place / "metrics.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"here", "there", "all", "sweep"}


@pytest.mark.slow
def test_verbose_shows_debug_messages(call: Call) -> None:
    done = call(*QUICK, "dataset.images=2", "run.dir=run", "hydra.verbose=true")
    assert done.code == 0
    assert "DEBUG" in done.err


LOGGING_MODEL = """
import logging, os, torch
class Net(torch.nn.Module):
    def forward(self, images):
        logging.getLogger("mine").debug("a forward")
        if os.environ.get("STOP"):
            raise RuntimeError("stopped")
        return torch.sin(images.sum(1, keepdim=True) * torch.arange(1, 151).view(1, 150, 1, 1))
"""


def test_verbose_shows_debug_messages_of_a_resumed_run_and_of_other_commands(
    cli: Cli, call: Call, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(LOGGING_MODEL)
    overrides = ("model=custom", "model._target_=mine.Net", "model.weights=random", "inference=original_size", "dataset=demo",
             "dataset.images=2", "run.dir=run")  # fmt: skip
    assert cli(*overrides, STOP="1").code != 0
    quiet = cli("resume", "run", STOP="1")
    assert "stopped" in quiet.err
    assert "[mine][DEBUG]" not in quiet.err
    done = cli("resume", "run", "--verbose")
    assert done.code == 0, done.err
    assert "[mine][DEBUG] - a forward" in done.err
    done = cli("data", "download", "--root", "data", "--url", "http://127.0.0.1:9/a.zip", "--verbose")
    assert done.code != 0
    assert "[urllib3.connectionpool][DEBUG] - Starting new HTTP connection" in done.err
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    assert call("models", "demo", "--verbose").code == 0
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def test_quiet_and_json(cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "dataset.images=2", "run.dir=a", "--quiet")
    assert [line.split(":")[0] for line in done.out.splitlines()] == ["mIoU", "run directory"]
    done = cli(*QUICK, "dataset.images=2", "run.dir=b", "--json")
    found = json.loads(done.out)
    assert found["mIoU"] == json.loads((tmp_path / "a" / "metrics.json").read_text())["mIoU"]
    assert found["run"] == "b"
    assert "best classes" in done.err
    done = cli(*QUICK, "dataset.images=2", "run.dir=c", "--json", "-q")
    assert json.loads(done.out) == {**found, "run": "c"}
    assert done.err == ""
    assert json.loads(cli("status", "b", "--json").out)["saved"] == 2
    assert len(json.loads(cli("models", "--json").out)["models"]) > 30
    assert json.loads(cli("compare", "a", "b", "--resamples", "100", "--json").out)["pairs"][0]["difference"] == 0


@pytest.mark.slow
def test_a_sweep_goes_on_and_ends_with_one_table(cli: Cli, tmp_path: Path) -> None:
    """Hydra's own sweeper; a job that fails does not keep the next from running."""
    (tmp_path / "net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self, fail=False):\n        super().__init__()\n"
        "        self.fail = fail\n    def forward(self, x):\n        assert not self.fail, 'as asked'\n"
        "        return torch.zeros(len(x), 150, 4, 4)\n"
    )
    overrides = ["model=custom", "model._target_=net.Net", "dataset.images=2", "inference=original_size"]
    done = cli(
        "-m",
        *QUICK,
        *overrides,
        "model.kwargs.fail=true,false",
        "hydra.sweep.dir=all",
        "hydra.sweep.subdir=${hydra.job.num}",
        "--json",
    )
    assert done.code == 2, done.err
    rows = json.loads((tmp_path / "all" / "sweep.json").read_text())
    assert [row["state"] for row in rows] == ["failed (2)", "finished"]
    assert rows[1]["mIoU"] is not None
    assert rows[1]["run"] == "all/1"
    assert [row["state"] for row in csv.DictReader((tmp_path / "all" / "sweep.csv").open())] == [
        r["state"] for r in rows
    ]
    assert "runs of this sweep" in done.err
    assert json.loads(done.out) == {"sweep": ["all"], "runs": rows}


def test_jobs_take_hydras_own_options_along(cli: Cli, tmp_path: Path) -> None:
    """Those of a job; where the sweep goes and what launches it are the sweep's."""
    done = cli(
        "-m", *QUICK, "dataset.images=2", "dataset.limit=1,2", "hydra.sweep.dir=all", "hydra.sweep.subdir=${hydra.job.num}",
        "+hydra.job.env_set.ADE20K_ROOT=nowhere", "hydra.verbose=true", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "DEBUG" in done.err
    found = json.loads(done.out)
    assert found["runs"] == json.loads((tmp_path / "all/sweep.json").read_text())
    assert [row["images"] for row in found["runs"]] == [1, 2]
    assert "[1 of 2] " in done.err


def test_a_sweep_of_more_values_keeps_what_it_has(cli: Cli, tmp_path: Path) -> None:
    """Values before and between the old ones shift the numbers by which directories are named."""
    overrides = ("-m", *QUICK, "dataset.images=3", "hydra.sweep.dir=all", "--json")
    first = cli(*overrides, "dataset.limit=2,1")
    assert first.code == 0, first.err
    before = {p: p.read_bytes() for p in sorted((tmp_path / "all").rglob("ledger/*"))}
    done = cli(*overrides, "dataset.limit=1,3,2")
    assert done.code == 0, done.err
    rows = {row["overrides"].split("dataset.limit=")[1]: row for row in json.loads(done.out)["runs"]}
    assert [rows[n]["images"] for n in "123"] == [1, 2, 3]
    assert rows["1"]["run"] == json.loads(first.out)["runs"][1]["run"]
    assert len({row["run"] for row in rows.values()}) == 3
    assert {p: p.read_bytes() for p in before} == before
    assert done.err.count("continuing: ") == 2  # what was finished


def test_json_of_lists_and_single_jobs(cli: Cli, tmp_path: Path) -> None:
    done = cli("-m", "--list", "dataset.limit=1,2", "--json")
    assert json.loads(done.out) == {"jobs": [["dataset.limit=1"], ["dataset.limit=2"]]}
    done = cli("-m", "--job", "1", *QUICK, "dataset.images=2", "dataset.limit=1,2", "run.dir=one", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["images"] == 2


@pytest.mark.slow
def test_groups_of_ones_own(call: Call, tmp_path: Path) -> None:
    """Hydra's documented pattern of experiments, with --config-dir; its search path is refused with the reason."""
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/small.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /inference: mmseg_whole_512\ndataset:\n  limit: 2\n"
    )
    done = call("--config-dir", tmp_path / "mine", "+experiment=small", *QUICK, "dataset.images=3", "run.dir=run")
    assert done.code == 0, done.err
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["dataset"]["limit"], config["inference"]["name"]) == (2, "mmseg_whole_512")
    for overrides, message in (
        (("--config-dir", tmp_path / "mine", "+experiment=large"), "experiment"),
        (("+experiment=small",), "experiment: no such option"),
        ((f"hydra.searchpath=[file://{tmp_path}/mine]",), "hydra.searchpath: choices are looked for in"),
    ):
        done = call(*overrides)
        assert done.code == 2
        assert message in done.err
        assert "Traceback" not in done.err


@pytest.mark.slow
def test_jobs_of_a_sweep(call: Call) -> None:
    done = call("-m", "--list", "model=glob(segformer_b*,exclude=segformer_b[2-5])", "inference=ss,ms")
    assert done.code == 2  # brackets are not in Hydra's grammar without quotes
    done = call(
        "-m",
        "--list",
        "model=glob('segformer_b*',exclude='segformer_b[2-5]')",
        "inference=ss,ms",
        "dataset.limit=range(1,3)",
    )
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 8
    assert done.out.splitlines()[-1] == "7: model=segformer_b1 inference=ms dataset.limit=2"


@pytest.mark.slow
def test_every_job_is_checked_before_the_first_starts(call: Call, tmp_path: Path) -> None:
    done = call(
        "-m",
        *QUICK,
        "dataset=demo",
        "model=segformer_b0,demo",
        "model.checkpoint=no.pt",
        "dataset.limit=0,1",
        "run.root=none",
    )
    assert done.code == 2
    assert "of 4 jobs cannot run, so none was started" in done.err
    assert "job 1 (" in done.err
    assert "model.checkpoint=no.pt: no such file" in done.err
    assert "dataset.limit=0: expected 1 or more" in done.err
    assert not [path for path in (tmp_path / "none").rglob("*") if path.name == "manifest.json"]


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model.checkpoint", "model.path", "model.id", "dataset.root", "run.dir", "run.root"])
def test_paths_are_taken_as_they_are_typed(key: str) -> None:
    model = {"model.path": "model=onnx", "model.id": "model=hf"}.get(key, "model=segformer_b0")
    for value in (
        HARD,
        "a'b",
        "~/x=y",
        "a,b",
        "{x}",
        "[x]",
        "x y",
        "with\\'both",
        "a${b}",
        "${x",
        "${b}/c}",
        "end\\",
        "two\\\\",
        "'a",
        "'",
        'a"',
        "\\'",
    ):
        config = compose_config([f"{key}={value}", model])
        group, _, name = key.partition(".")
        assert getattr(getattr(config, group), name) == value
    config = compose_config([f"{key}=${{oc.env:HOME}}/x", model])
    assert getattr(getattr(config, group), name) == f"{os.environ['HOME']}/x"
    assert prepare([f"{key}=null"]) == [f"{key}=null"]
    assert prepare([f"{key}='a b'"]) == [f"{key}='a b'"]


def test_a_run_in_a_hard_place_is_made_continued_and_shown(call: Call, tmp_path: Path) -> None:
    place = "épreuve/ep=99-step=8, v2 (1)"
    assert call(*QUICK, "dataset.images=2", f"run.dir={place}").code == 0
    assert (tmp_path / place / "metrics.json").exists()
    done = call("resume", place)
    assert done.code == 0, done.err
    assert "finished" in call("status", place).out
    reported = json.loads(call("status", place, "--json").out)
    metrics = json.loads((tmp_path / place / "metrics.json").read_text())
    assert (reported["state"], reported["mIoU"], reported["marks"]) == ("finished", metrics["mIoU"], metrics["marks"])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_installed(call: Call, shell: str) -> None:
    done = call("-sc", f"install={shell}")
    assert done.code == 0, done.err
    assert {"bash": "complete", "zsh": "complete", "fish": "complete"}[shell] in done.out


SHELLS = {
    "bash": ["bash", "--norc", "-c"],
    "fish": ["fish", "--no-config", "-c"],
    "zsh": ["zsh", "-f", "-c"],
}
COMPLETE = {
    "bash": """
        eval "$(ade-harness -sc install=bash)"
        COMP_LINE="ade-harness @LINE@"; COMP_POINT=${#COMP_LINE}; COMP_WORDS=(ade-harness @LINE@); COMP_CWORD=1
        hydra_bash_completion
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "fish": """
        ade-harness -sc install=fish | source
        complete -C "ade-harness @LINE@"
    """,
    # its completions exist only where somebody types: on a terminal
    "zsh": """
        zmodload zsh/zpty
        zpty shell zsh -f -i
        zpty -w shell 'autoload -Uz compinit bashcompinit; compinit -u -D; bashcompinit'
        zpty -w shell 'eval "$(ade-harness -sc install=zsh)"; print rea''dy'
        zpty -r -m shell seen '*ready*'
        zpty -w -n shell $'ade-harness @LINE@\\t\\t'
        for i in {1..300}; do
            sleep 0.1
            while zpty -r -t shell part; do print -rn -- "$part"; seen+=$part; done
            [[ $seen == *@EXPECTED@* ]] && exit 0
        done
    """,
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("line", "expected"),
    [("model=segformer_b", "model=segformer_b5"), ("inference.tt", "inference.tta"), ("dataset=", "dataset=folder")],
)
def test_shells_complete_groups_and_keys(tmp_path: Path, shell: str, line: str, expected: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}: apt install {shell}")
    script = COMPLETE[shell].replace("@LINE@", line).replace("@EXPECTED@", expected)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # the installed command
    done = subprocess.run(
        [*SHELLS[shell], script], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120,
        env={**os.environ, "PATH": path, "HOME": str(tmp_path), "TERM": "dumb"},
    )  # fmt: skip
    assert expected in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ade-harness evaluate model=segformer_b", "model=segformer_b0 model=segformer_b1"),
        ("python -m ade_harness --quiet model=segformer_b", "model=segformer_b0"),
        ("ade-harness resu", "resume"),
        ("ade-harness probe probe=", "probe=dinov2_linear"),
        ("ade-harness --config-dir own model=mi", "model=mine"),
        ("ade-harness status ru", "runs/"),
        ("ade-harness report runs/a", "runs/a.txt"),
        ("ade-harness --co", "--config-dir"),
        ("ade-harness runs --so", "--sort"),
        ("ade-harness inference=s", "inference=ss"),
        ("ade-harness model=zzz inference=((", ""),  # a mistake in the line proposes nothing, and says nothing
        ("ade-harness --config-dir o", "own/"),
        ("ade-harness --config-dir own/m", "own/model/"),
        ("ade-harness data ", "download"),
        ("ade-harness data ver", "verify"),
        ("ade-harness data download --source ", "archive hub"),
        ("ade-harness models segformer_b", "segformer_b0 segformer_b1"),
        ("ade-harness model=segformer_b0 model.checkpoint=ru", "model.checkpoint=runs/"),
        ("ade-harness predict model=demo run", "runs/"),
        ("ade-harness compare runs/a --resamples 10 ru", "runs/"),
    ],
)
def test_lines_with_commands_and_options_are_completed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/a.txt").touch()
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/model/mine.yaml").write_text("defaults: [demo]\n")
    monkeypatch.setenv("COMP_LINE", line)
    done = call("-sc", "query=bash")
    assert (done.code, done.err) == (0, "")
    assert done.out.strip().startswith(expected)
    assert expected or not done.out.strip()
    assert "schema" not in done.out
    assert os.environ["COMP_LINE"] == line


def test_what_is_not_hydras_grammar_is_one_message_with_the_quoted_form() -> None:
    with pytest.raises(HarnessError, match=r"not in Hydra's grammar .* Quote the value: \"?model\.label='a: b \('"):
        prepare(["model.label=a: b ("])


@pytest.mark.parametrize(
    "given",
    [
        ("-m", "hydra.sweeper.params={dataset.images:1}"), ("-m", "hydra.launcher=3"), ("hydra.job_logging={root:3}",),
        ("hydra.verbose={a:1}",), ("hydra.run=3",), ("-m", "hydra.sweeper=[1]"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_hydras_own_options_of_a_wrong_type_are_one_message(call: Call, given: tuple[str, ...]) -> None:
    done = call(*given, *QUICK, "dataset.images=1")
    assert done.code == 2
    assert "The configuration is not valid" in done.err or f"{given[-1]}: expected keys and values." in done.err
    assert given[-1] in done.err
    assert "Traceback" not in done.err


def test_a_primary_configuration_that_jobs_would_not_see_is_refused(call: Call) -> None:
    for flag in (["-cn", "nightly"], ["-cp", "elsewhere"]):
        done = call("-m", *flag, "dataset.limit=1,2")
        assert done.code == 2
        assert "these would have no effect" in done.err


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("model.id=./mine,../theirs", "model.id=./mine: no such folder"),
        ("dataset.ids=[ADE_val_00001000],[ADE_val_00009999]", "'ADE_val_00009999' is not in"),
        ("runtime.devices=1,4000", "runtime.devices=4000"),
        ("model.checkpoint=folder,nowhere.pth", "model.checkpoint=folder: is not a regular file"),
    ],
)
def test_a_sweep_looks_at_files_images_and_this_machine_first(
    call: Call, tiny_ade: Path, tmp_path: Path, swept: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    model = ["model=hf", "inference=original_size"] if "model.id" in swept else ["model=segformer_b0"]
    model += [] if "model.id" in swept or "checkpoint" in swept else ["model.weights=random"]
    done = call("-m", *QUICK, *model, f"dataset.root={tiny_ade}", "dataset=ade20k", swept, "hydra.sweep.dir=all")
    assert done.code == 2
    assert "so none was started" in done.err
    assert message in done.err
    assert not (tmp_path / "all").exists()


@pytest.mark.slow
def test_a_sweep_that_runs_nothing_leaves_nothing(call: Call, tmp_path: Path) -> None:
    sweep = ("-m", *QUICK, "hydra.sweep.dir=all")
    assert call(*sweep, "dataset.images=2,3", "--list").out.splitlines()[1].startswith("1: ")
    for more in (["--list"], ["--job=0"], []):
        one_message(call(*sweep[:-1], "model=glob(nope*)", *more), "the sweep has no jobs")
        for left in list(tmp_path.rglob("multirun.yaml")) if more == ["--job=0"] else ():
            shutil.rmtree(left.parent)  # other jobs of an array may use the folder
    assert call(*sweep, "dataset.images=2,0").code == 2
    assert list(tmp_path.rglob("multirun.yaml")) == []
    (tmp_path / "all").mkdir()
    assert call(*sweep, "dataset.images=2,0").code == 2
    assert (tmp_path / "all").is_dir()  # it was there


def test_a_job_that_fails_is_a_message_in_a_sweep_too(cli: Call, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nclass Bad(torch.nn.Module):\n    def forward(self, images):\n        raise ValueError('no luck')\n"
    )
    custom = ("model=custom", "model._target_=nets.Bad", "inference=original_size")
    done = cli("-m", *QUICK, *custom, "dataset.images=1,2", "run.root=runs")
    assert done.code == 2
    assert done.err.count("no luck") == 2
    assert "Traceback" not in done.err
    done = cli("-m", *QUICK, *custom, "dataset.images=1,2", "run.root=runs", HYDRA_FULL_ERROR="1")
    assert done.err.count("Traceback (most recent call last)") >= 2


@pytest.mark.slow
def test_jobs_of_another_launcher_are_checked_and_become_a_table(call: Call, tmp_path: Path) -> None:
    basic = ("-m", "hydra/launcher=basic", *QUICK, "hydra.sweep.dir=all", "dataset.images=2,3")
    done = call(*basic, "model.checkpoint=null,nowhere.pth")
    assert done.code == 2
    assert "2 of 4 jobs cannot run, so none was started" in done.err
    assert not (tmp_path / "all").exists()  # Hydra's sweeper has made it
    done = call(*basic, "metrics.level=0.9", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["runs"]
    assert [(row["state"], row["images"]) for row in rows] == [("finished", 2), ("finished", 3)]
    assert [row["overrides"].split()[-2:] for row in rows] == [
        [f"dataset.images={n}", "metrics.level=0.9"] for n in (2, 3)
    ]
    assert json.loads((tmp_path / "all/sweep.json").read_text()) == rows
    assert [float(row["mIoU"]) for row in csv.DictReader((tmp_path / "all/sweep.csv").open())] == [
        json.loads((tmp_path / row["run"] / "metrics.json").read_text())["mIoU"] for row in rows
    ]


@pytest.mark.parametrize(
    "given",
    [
        ("status", "~nobody_here"), ("report", "~nobody_here/run"), ("runs", "~nobody_here"), ("compare", "~nobody_here/a", "b"),
        ("data", "verify", "~nobody_here/x"), ("convert", "~nobody_here/x.pth", "x.safetensors"),
        ("run.dir=~nobody_here/r",), ("model=onnx", "model.path=~nobody_here/x.onnx", "dataset=demo"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.slow
def test_a_home_that_nobody_has_is_one_message(call: Call, given: tuple[str, ...]) -> None:
    done = call(*given, *(QUICK if "=" in given[0] else ()))
    assert done.code == 2
    assert "no home directory is known for ~nobody_here" in done.err
    assert "Write ./~nobody_here" in done.err
    assert "Traceback" not in done.err


def test_a_name_that_begins_like_a_home_is_one_after_a_dot(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for root in ("./~nobody_here", "./~"):
        assert call(*QUICK, "dataset.images=2", f"run.root={root}").code == 0
        assert call("runs", root).code == 0
        run = next((tmp_path / root).iterdir())
        for command in ("status", "resume"):
            done = call(command, f"{root}/{run.name}")
            assert done.code == 0, done.err
    assert not (tmp_path / "home").exists()


def test_hydras_own_help(call: Call) -> None:
    done = call("--hydra-help")
    assert done.code == 0, done.err
    assert "Use '--cfg hydra' to Show" in done.out


@pytest.mark.slow
def test_folders_of_ones_own_have_any_name(call: Call, tmp_path: Path) -> None:
    (tmp_path / "cd, v=2 (1)/model").mkdir(parents=True)
    (tmp_path / "cd, v=2 (1)/model/mine.yaml").write_text("defaults: [demo, _self_]\nname: mine\n")
    done = call(
        "-m", "-cd", "cd, v=2 (1)", "model=mine", "dataset.images=1,2", "hydra/launcher=basic", *QUICK, "--json"
    )
    assert done.code == 0, done.err
    assert [row["state"] for row in json.loads(done.out)["runs"]] == ["finished"] * 2


def test_a_sweep_of_more_jobs_than_anybody_means_is_refused(call: Call) -> None:
    for given in ("runtime.seed=range(0,100000000)", "runtime.seed=range(0,5000)"):
        done = call("-m", "model=demo", given, "metrics.seed=1,2,3", *QUICK)
        assert done.code == 2
        assert f"{given}: a sweep of" in done.err
    assert call("-m", "runtime.seed=range(0,3)", "metrics.seed=1,2", "--list").code == 0


def test_a_files_sweep_of_more_jobs_than_anybody_means_is_refused(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/large.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        '      runtime.seed: "range(0,6000)"\n      metrics.seed: "1,2"\n'
    )
    done = call("-cd", "mine", "+experiment=large", *QUICK)
    assert done.code == 2
    assert "a sweep of 12,000 jobs" in done.err


@pytest.mark.parametrize("mode", ["hydra.mode=MULTIRUN", "+hydra.mode=MULTIRUN", "++hydra.mode='MULTIRUN'"])
def test_a_sweep_is_one_however_it_is_asked_for(call: Call, tmp_path: Path, mode: str) -> None:
    done = call(mode, "dataset.images=1,2", "model.checkpoint=a,b", "--list", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["jobs"]) == 4  # a path may be swept, too
    assert "a sweep of" in call(mode, "runtime.seed=range(0,20000)", *QUICK).err
    assert "-r and hydra.mode=MULTIRUN are mutually exclusive" in call("-r", mode, *QUICK).err
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/two.yaml").write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n")
    done = call("-cd", "mine", "+experiment=two", "model.checkpoint=a,b", "--list", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["jobs"]) == 2
    done = call("-cd", "mine", "+experiment=two", "hydra.mode=RUN", "dataset.images=1", "--list")
    assert "--job and --list need a sweep" in done.err


def test_what_names_a_folder_of_the_other_kind_is_refused(call: Call) -> None:
    sweep = ("-m", "dataset.images=1,2")
    for given in ([*sweep, "hydra.run.dir=x"], [*sweep, "--job", "0", "+hydra.run.dir=x"],
                  ["hydra.sweep.dir=x"], ["hydra.sweep.subdir=x"]):  # fmt: skip
        done = call(*given, *QUICK)
        assert done.code == 2
        assert f"{given[-1]}: has no effect here" in done.err
    assert "Give only one" in call(*sweep, "--job", "0", "--list").err
    assert "-m and hydra.mode=RUN are mutually exclusive" in call(*sweep, "hydra.mode=RUN").err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.limit=abc", "dataset.limit=abc: expected an integer."),
        ("dataset.images=2.5", "dataset.images=2.5: expected an integer."),
        ("model.input.mean=[1,b,3]", "model.input.mean[1]=b: expected a number."),
        ("inference.resize.side={}", "inference.resize.side={}: expected an integer."),
        ("model.class_map={a:1}", "model.class_map={a:1}: expected a list."),
        ("inference.exif=maybe", "inference.exif=maybe: expected true or false."),
        ("model.kwargs=3", "model.kwargs=3: expected keys and values."),
    ],
)
def test_a_value_of_another_type_is_one_sentence(call: Call, override: str, message: str) -> None:
    assert call(override).err == f"error: {message}\n"


def test_a_message_holds_a_long_value_in_part(call: Call) -> None:
    done = call("+dataset.split=" + "a" * 100_000)
    assert done.code == 2
    assert len(done.err) < 4_000
    assert "(98," in done.err or "(99," in done.err  # and how many characters are left out


def test_a_plugins_resolver_holds_in_a_path(call: Call) -> None:
    OmegaConf.register_new_resolver("thrice", lambda text: text * 3)
    try:
        done = call("run.dir=runs/${thrice:ab}", "--cfg", "job", "--resolve", "-p", "run")
    finally:
        OmegaConf.clear_resolver("thrice")
    assert done.code == 0, done.err
    assert "dir: runs/ababab" in done.out
    done = call("run.root=${nothing:of}/${its kind}", "--cfg", "job", "-p", "run")  # a name, as any other
    assert done.code == 0, done.err
    assert "${nothing:of}/${its kind}" in done.out.replace("\\", "")


@pytest.mark.parametrize("launcher", ["process", "basic", "slurm"])
def test_jobs_of_one_directory_are_refused(call: Call, launcher: str, tmp_path: Path) -> None:
    for place in ("run.dir=same", "hydra.sweep.subdir=same"):
        if launcher == "slurm" and place.startswith("hydra."):
            continue  # is refused of SLURM's jobs
        of_sweep = () if launcher == "slurm" else ("hydra.sweep.dir=all",)
        done = call("-m", f"hydra/launcher={launcher}", *of_sweep, "metrics.seed=1,2", place, *QUICK)
        assert done.code == 2
        assert "jobs 0 and 1 of the sweep write the same directory" in done.err
    assert not (tmp_path / "same").exists()


def test_a_sweep_over_what_slurm_gives_an_array_is_refused(call: Call) -> None:
    pytest.importorskip("submitit", reason="pip install submitit to test the SLURM launcher")
    for key, values in (("mem_gb", "10,20"), ("partition", "a,b")):
        done = call("-m", "hydra/launcher=slurm", f"runtime.slurm.{key}={values}", *QUICK)
        assert done.code == 2
        first, _, second = values.partition(",")
        assert f"runtime.slurm.{key} is {first} of one job and {second} of another" in done.err
        assert f"or one to all: hydra.launcher.{key}=..." in done.err


def test_lists_and_single_jobs_pass_over_the_launchers_options(call: Call) -> None:
    of_slurm = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu")
    done = call("-m", "dataset.images=1,2", "--list", *of_slurm, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["jobs"] == [["dataset.images=1"], ["dataset.images=2"]]
    assert "-m --job N" in call("-m", "dataset.images=1,2", "hydra/launcher=one_job").err


def test_information_is_of_the_configuration_that_would_run(call: Call) -> None:
    done = call("--info", "config", "model=timm", "model.backbone=resnet50", "run.dir=/data/v2 (1)/x")
    assert done.code == 0, done.err
    assert "resnet50" in done.out
    done = call("--info", "defaults-tree", "model=segformer_b0", "inference=ss")
    assert "mmseg_whole_512_align32" in done.out
    assert "has no effect on `evaluate`" in call("probe.iterations=3").err


def test_a_configuration_in_place_of_the_packaged_one(call: Call, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(conf_dir(), own)
    (own / "model/mine.yaml").write_text("defaults: [demo, _self_]\nname: mine\nlabel: My own\n")
    (own / "model/beit3.yaml").unlink()
    for flag in (["-cp", "own"], ["--config-path", str(own)]):  # from here, as the shell completes it
        done = call(*flag, "model=mine", "dataset.images=3", "--cfg", "job", "--package", "model.label")
        assert done.code == 0, done.err
        assert "My own" in done.out
    done = call("-cp", "own", "model=beit3", "--cfg", "job")
    assert done.code == 2
    assert "model=beit3: unknown value" in done.err
    assert "--config-path: nowhere is not a folder" in call("-cp", "nowhere", "model=mine").err
    assert "Give only one" in call("-cp", "own", "--config-dir", "own", "model=mine").err
    done = call("-cp", "own", "model=mine", *QUICK, "dataset.images=3", "--json")
    assert json.loads(done.out)["model"] == "mine"


@pytest.mark.slow
def test_the_own_protocol_of_a_model_that_a_file_chooses(call: Call, tmp_path: Path) -> None:
    (tmp_path / "own/model").mkdir(parents=True)
    (tmp_path / "own/nightly.yaml").write_text("defaults: [config, {override model: small}, _self_]\n")
    (tmp_path / "own/model/small.yaml").write_text(
        "defaults: [demo, _self_]\nname: small\nprotocols: {ss: mmseg_whole_512_align32}\n"
    )
    base = ("--config-dir", "own", "-cn", "nightly")
    done = call(*base, "inference=ss", "inference.batch=2", "dataset.images=1", *QUICK, "--json")
    assert done.code == 0, done.err
    assert {key: json.loads(done.out)[key] for key in ("model", "protocol")} == {
        "model": "small", "protocol": "mmseg_whole_512_align32",
    }  # fmt: skip
    sweep = ("-m", "--config-dir", "own", "hydra/launcher=basic", "model=small", "metrics.seed=1,2", "dataset.images=1")
    done = call(*sweep, "inference=ss", *QUICK, "--json")
    assert done.code == 0, done.err
    assert [row["state"] for row in json.loads(done.out)["runs"]] == ["finished"] * 2
    done = call(*base, "inference=ms", "dataset.images=1", *QUICK)
    assert done.code == 2
    assert "no multi-scale protocol was published for model=small. It has inference=ss" in done.err


@pytest.mark.slow
def test_a_group_of_ones_own_chooses_the_model(call: Call, tmp_path: Path) -> None:
    """Hydra's pattern of experiments: the model's own protocol and recipe are known once all is composed."""
    (tmp_path / "own/model/lab").mkdir(parents=True)
    (tmp_path / "own/experiment").mkdir()
    (tmp_path / "own/model/lab/small.yaml").write_text(
        "defaults: [/model/demo@_here_, _self_]\nname: small\nprotocols: {ss: mmseg_whole_512_align32}\nprobe: dinov3_linear\n"
    )
    (tmp_path / "own/experiment/nightly.yaml").write_text(
        "# @package _global_\ndefaults: [{override /model: lab/small}]\nrun: {overlays: 0}\n"
    )
    base = ("--config-dir", "own", "+experiment=nightly")
    for chosen in (base, ("--config-dir", "own", "model=lab/small")):
        done = call(*chosen, "inference=ss", "dataset.images=1", *QUICK, "--json")
        assert done.code == 0, done.err
        assert {key: json.loads(done.out)[key] for key in ("model", "protocol")} == {
            "model": "small", "protocol": "mmseg_whole_512_align32",
        }  # fmt: skip
    found = compose_config(["+experiment=nightly", "inference=ss"], tmp_path / "own")
    assert (found.model.name, found.inference.name) == ("small", "mmseg_whole_512_align32")
    done = call(*base, "inference=ms", "dataset.images=1", *QUICK)
    assert "no multi-scale protocol was published for model=small. It has inference=ss" in done.err
    done = call("probe", *base, "dataset=demo", *QUICK)
    assert "model.architecture.backbone" in done.err or "frozen backbone" in done.err, done.err  # its recipe was found
    done = call("predict", *base, "nowhere.jpg")
    assert "nowhere.jpg" in done.err
    assert "name a model" not in done.err
    done = call("--config-dir", "own", "model=lab/smal")
    assert "model=lab/smal: unknown value. Nearest: lab/small" in done.err


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module.Net", "there is no module 'no_such_module'"),
        ("mine.Nett", "mine.py defines no 'Nett'"),
        ("packed.lost.Net", "packed/__init__.py defines no 'lost'"),
        ("mine.Net", None),
        ("packed.inner.Net", None),
        ("starred.Net", None),  # who knows
        ("torch.nn.Identity", None),
        ("rich.table.Table", None),  # a folder of the same name is here
        ("lazy.Net", None),
        ("builtins.print", None),  # no network: the run says so
    ],
)
def test_targets_of_a_sweep_are_found_without_running_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, reason: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed").mkdir()
    for name in ("mine", "starred", "packed/__init__", "packed/inner"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('is not to be run')\nclass Net: ...\n")
    (tmp_path / "starred.py").write_text("from mine import *\n")
    (tmp_path / "lazy.py").write_text("__getattr__, __dir__, __all__ = attach(__name__)\n")
    (tmp_path / "rich").mkdir()
    monkeypatch.delitem(sys.modules, "rich", raising=False)
    if reason is None:
        require_target(target)
    else:
        with pytest.raises(HarnessError, match=re.escape(f"model._target_={target}: ")) as error:
            require_target(target)
        assert reason in str(error.value)


def test_options_of_every_command_may_come_first(call: Call, tmp_path: Path) -> None:
    assert call("--quiet", *QUICK, "dataset.images=1", "run.dir=run").code == 0
    done = call("--json", "status", "run")
    assert json.loads(done.out)["images"] == 1
    assert call("-v", "--quiet", "nothing").code == 2


@pytest.mark.slow
def test_a_glob_finds_choices_only_and_a_job_of_an_array_looks_at_itself(call: Call) -> None:
    for found in ("inference=glob('[se]*')", "dataset=glob(*)"):  # the schema of a group is no choice of it
        done = call("-m", "--list", found)
        assert done.code == 0
        assert "schema" not in done.out
        assert len(done.out.splitlines()) > 1
    sweep = ("-m", *QUICK, "dataset.images=1,2", "model.checkpoint=null,nowhere.pth", "--job")
    done = call(*sweep, "3")
    assert done.code == 2
    assert "1 of 1 jobs cannot run, so none was started.\njob 3 (" in done.err
    assert call(*sweep, "4").err.startswith("error: --job 4: expected 0 to 3, as this sweep has 4 combinations.")
    assert call(*sweep, "0").code == 0


def test_an_option_of_hydras_without_effect_is_refused(call: Call) -> None:
    one_message(call("hydra.job.chdir=true", *QUICK), "hydra.job.chdir=true: has no effect")
    one_message(call("hydra.output_subdir=.hydra", *QUICK), "a run directory holds the configuration already")
    assert call("hydra.job.chdir=false", "hydra.output_subdir=null", "--cfg", "job").code == 0


@pytest.mark.parametrize("how", ["--verbose", "-v", "HYDRA_FULL_ERROR"])
def test_the_traceback_behind_an_error_can_be_had(call: Call, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "HYDRA_FULL_ERROR":
        monkeypatch.setenv(how, "1")
    for command in (["status", "nowhere"], ["dataset.limit=zero"], ["compare", "a", "b"]):
        assert "Traceback" not in (call(*command).err if how.startswith("-") else "")
        done = call(*command, *([how] if how.startswith("-") else []))
        assert done.code == 2
        assert "Traceback (most recent call last)" in done.err
        assert done.err.splitlines()[-1].startswith("error: ")
        if how.startswith("-"):
            assert "Traceback" not in call(*command).err  # the next command is as usual


def test_a_home_in_hydras_directories_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prepare(["hydra.run.dir=~/x, y", "hydra.sweep.dir=~/z"]) == [
        f"hydra.run.dir='{tmp_path}/x, y'", f"hydra.sweep.dir='{tmp_path}/z'",
    ]  # fmt: skip


def test_a_sweeper_that_launches_in_batches_gets_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, config = Sweep(tmp_path), compose_config([])
    for suffix in ("csv", "json"):  # of an earlier sweep into the same folder
        (tmp_path / f"sweep.{suffix}").write_text("")
    sweep.show()  # as when it is stopped in its first job
    assert "written" not in "".join(capsys.readouterr())
    scores = dict.fromkeys((field.name for field in fields(Scores)), 0.5)
    metrics = {**scores, "intervals": {}, "other_intervals": {}, "convention": "", "notes": []}
    for number, score in enumerate((0.25, None, 0.5)):
        run = tmp_path / f"{number}_demo"
        run.mkdir()
        if score is not None:
            (run / "metrics.json").write_text(json.dumps({**metrics, "mIoU": score, "images": 3, "marks": ["DEMO"]}))
        job = SweepJob(number, (f"metrics.seed={number}",), run, config)
        [row] = sweep.add([job], [0 if score is not None else 2])
        assert row.mIoU == score
    sweep.show()
    with (tmp_path / "sweep.csv").open() as file:
        assert [(r["job"], r["mIoU"], r["state"]) for r in csv.DictReader(file)] == [
            ("0", "0.25", "finished"), ("1", "", "failed (2)"), ("2", "0.5", "finished"),
        ]  # fmt: skip
    assert len(json.loads((tmp_path / "sweep.json").read_text())) == 3
    shown = capsys.readouterr().out
    assert shown.count("runs of this sweep") == 1
    assert "metrics.seed=0" in shown
    assert "metrics.seed=2" in shown


@pytest.mark.parametrize("fault", ["x = = 1", "raise ValueError('mutable default')"])
def test_a_plugin_that_cannot_be_imported_is_named(cold_cli: Cli, tmp_path: Path, fault: str) -> None:
    (tmp_path / "more" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "more" / "hydra_plugins" / "of_others.py").write_text(fault)
    done = cold_cli("--cfg", "job", PYTHONPATH=os.pathsep.join(["more", os.environ.get("PYTHONPATH", "")]))
    assert done.code == 2
    assert "a Hydra plugin that is installed cannot be imported (" in done.err
    assert "of_others.py" in done.err
    assert "Traceback" not in done.err


FAULTY = {
    "latin": (b"defaults: [custom, _self_]\nlabel: \xe9preuve\n", "latin.yaml, line 2: is not UTF-8"),
    "utf16": ("name: mine".encode("utf-16"), "utf16.yaml, line 1: is not UTF-8"),
    "tab": (
        b"name: mine\ninput:\n\tmean: [0, 0, 0]\n",
        "tab.yaml, line 3, column 1: is not plain YAML (found",
    ),
    "tag": (b"name: !!python/object/apply:os.getcwd []\n", "tag.yaml, line 1, column 7: is not plain YAML"),
    "nul": (b"name: a\0b\n", "nul.yaml: is not plain YAML"),
    "open": (b"name: [a, b\n", "open.yaml, line 2, column 1: is not plain YAML"),
    "deep": (b"kwargs: " + b"[" * 2000 + b"]" * 2000, "deep.yaml: is nested too deeply"),
    "digits": (b"label: " + b"9" * 6000 + b"\n", "digits.yaml: holds a value that cannot be read (Exceeds the limit"),
    "bomb": (
        b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + b"".join(
            b"%s: &%s [%s]\n" % (b, b, b",".join([b"*" + a] * 10))
            for a, b in zip(b"a b c d e f".split(), b"b c d e f g".split(), strict=True)
        ),
        "bomb.yaml: its aliases (*) stand for more than 100,000 values",
    ),
    "cycle": (b"defaults: [cycle, _self_]\nname: a\n", "its defaults are circular"),
    "twice": (b"name: a\nname: b\n", "found duplicate key name"),
    "listed": (b"- a\n", "list is not a subclass of ModelConfig"),
    "text": (b"only text\n", "'only text' not in 'ModelConfig'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTY)
def test_a_configuration_of_the_users_that_cannot_be_read_is_one_message(
    tmp_path: Path, call: Callable[..., Done], name: str
) -> None:
    content, message = FAULTY[name]
    folder = tmp_path / "mine/model"
    folder.mkdir(parents=True)
    (folder / f"{name}.yaml").write_bytes(content)
    (folder / "another.yaml").write_bytes(b"\xff")  # not asked for
    with pytest.raises(HarnessError) as raised:
        compose_config([f"model={name}"], tmp_path / "mine")
    assert message in str(raised.value)
    assert len(str(raised.value)) < 500
    for overrides in ([f"model={name}"], [f"model={name}", "inference=ss"], ["-m", f"model={name},demo"]):
        done = call("--config-dir", "mine", *overrides, "tracking=none")
        assert (done.code, "Traceback" in done.err) == (2, False), done.err
        assert done.err.count("error: ") == 1


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/windows.yaml").write_bytes(b"\xef\xbb\xbfdefaults: [demo, _self_]\r\nlabel: mine\r\n")
    config = compose_config(["model=windows", "inference=original_size"], tmp_path)
    assert config.model.label == "mine"


@pytest.mark.parametrize("key", ["inference.tta", "model.input", "runtime.slurm", "model.class_map", "tracking.tags"])
@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${runtime.seed}", "${model.kwargs}"])
def test_an_interpolation_in_place_of_a_node_or_a_list_is_refused(key: str, value: str) -> None:
    with pytest.raises(
        HarnessError, match=f"^{key}=.* where (fields are expected: {key}.NAME=VALUE|a list is expected)"
    ):
        compose_config([f"{key}={value}"])


@pytest.mark.slow
def test_a_file_that_makes_everything_a_sweep_makes_no_sweep_of_its_jobs(
    cli: Callable[..., Done], tmp_path: Path
) -> None:
    """Hydra's own pattern for experiments; each job is composed with the same file."""
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/sw.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      dataset.limit: 1,2\n"
    )
    done = cli("-cd", "mine", "+experiment=sw", *FAST, "dataset.images=2", "hydra.sweep.dir=swept", timeout=100)
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "swept/sweep.json").read_text())
    assert [row["state"] for row in rows] == ["finished", "finished"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.mode=MULTIRUN", "-cd", "mine", "-cn", "nightly"], "the jobs of a sweep are composed from the packaged"),
        (["-cd", "mine", "-cn", "all"], "the jobs of a sweep are composed from the packaged"),
        (["-m", "model=glob(nope*)"], "the sweep has no jobs"),
        (["-m", "dataset.limit=1,2", "hydra.sweeper.max_batch_size=1"], "hydra.sweeper.max_batch_size: jobs of a batch are"),
        (["-m", "dataset.limit=1,2", "--job=0", "hydra.sweep.dir=x"], "hydra.sweep.dir=x: has no effect: each job of a cluster"),
        (["-m", "dataset.limit=1,2", "hydra/launcher=slurm", "hydra.sweep.subdir=x"], "hydra.sweep.subdir=x: has no effect"),
        (["-r", "-m", "dataset.limit=1,2"], "-r and -m are mutually exclusive"),
        (["probe=dinov3_linear"], "probe=dinov3_linear: is a recipe of the command `probe`"),
        (["inference=ms"], "no multi-scale protocol was published for model=demo, which is the default: add model=NAME"),
        (["serve", "model=demo", "runtime.devices=2"], "runtime.devices=2: has no effect on serve"),
        (["hydra/launcher=slurm"], "hydra/launcher=slurm: starts the jobs of a sweep: add -m"),
        (["hydra/launcher=list"], "hydra/launcher=list: starts the jobs of a sweep: add -m"),
        (["-p", "inference"], "--package: says which part --cfg prints"),
        (["--cfg", "job", "-p", "nope"], "--package nope: no such node. `--cfg job` prints the whole configuration."),
        (["--json", "--cfg", "job"], "--json cannot be combined with --cfg, which prints Hydra's own text"),
        (["hydra.run.dir=a", "run.dir=b"], "both name the run's directory"),
        (["model.label=${nope.x}"], "nope"),
        (["model.label=${foo:1}"], "foo"),
        (["model.label=${oc.env:UNSET_OF_MINE}"], "UNSET_OF_MINE"),
        (["hydra.job.env_copy=[UNSET_OF_MINE]"], "UNSET_OF_MINE"),
        (["probe", "hydra.mode=MULTIRUN", "model=timm", "model.backbone=test_vit", "probe=dinov3_linear"],
         "probe: cannot be swept"),
        (["inference.resize.rule=exact", "inference.resize.height=100000"], "inference.resize.height=100000: expected 1 to"),
        (["inference.resize.rule=cover", "inference.resize.width=16385"], "inference.resize.width=16385: expected 1 to"),
        (["inference.resize.pad_to=[1000000000,1]"], "inference.resize.pad_to[0]=1000000000: expected 1 to 16,384"),
        (["inference.window.stride=100000"], "inference.window.stride=100000: expected 1 to 16,384"),
        (["inference.resize.multiple_of=1000000000"], "inference.resize.multiple_of=1000000000: expected 1 to 16,384"),
        (["inference.resize.pad_value=nan"], "inference.resize.pad_value=nan: expected 0 to 255"),
        (["inference.resize.rule=exact", "inference.resize.height=16000", "inference.resize.width=16000"],
         "over 134,217,728 pixels"),
        (["inference.resize.height=300"], "inference.resize.height: has no effect: resize.rule=none does not read it"),
        (["inference.window.crop=300"], "inference.window.crop: has no effect: mode=whole has no windows"),
        (["inference.mode=long_side", "inference.window.crop=64", "inference.window.stride=32"],
         "inference.window.stride: has no effect: mode=long_side has no stride"),
        (["inference.tta.max_side=300"], "inference.tta.max_side: has no effect: it caps tta.sides, which is null"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_or_no_end_is_refused(
    call: Call, tmp_path: Path, overrides: list[str], message: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/nightly.yaml").write_text("defaults: [config, _self_]\ndataset:\n  limit: 2\n")
    (tmp_path / "mine/all.yaml").write_text("defaults: [config, _self_]\nhydra:\n  mode: MULTIRUN\n")
    more = [] if overrides[0].startswith("-") and "-cd" not in overrides else ["tracking=none", "dataset.images=2"]
    one_message(call(*overrides, *more), message)
    assert not list(tmp_path.glob("**/metrics.json"))


@pytest.mark.slow
def test_a_directory_of_hydras_in_a_file_is_the_runs(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine/where").mkdir(parents=True)
    (tmp_path / "mine/where/there.yaml").write_text("# @package _global_\nhydra:\n  run:\n    dir: from_file\n")
    assert call("-r", "-cd", "mine", "+where=there", *FAST, "dataset.images=2").code == 0
    assert (tmp_path / "from_file/metrics.json").exists()
    for word in ("hydra.verbose=true", "run.dir=other"):
        one_message(call("resume", "from_file", word), word)


@pytest.mark.slow
def test_help_of_one_command(call: Call) -> None:
    assert "--trust" in call("help", "resume").out
    assert "data download" in call("data", "--help").out
    assert "data verify" in call("data", "--help").out
    one_message(call("data"), "data: expected data ")
    one_message(call("help", "nope"), "'nope' is neither a command nor a key=value override")
    assert "hydra" in call("probe", "--hydra-help").out.lower()


def test_the_quoted_form_of_a_glob_is_one(call: Call) -> None:
    done = call("-m", "model=glob([a-c]*,exclude=b*)", "--list")
    assert done.code == 2
    assert "Quote the value: \"model=glob('[a-c]*',exclude='b*')\"" in done.err
    assert call("-m", "model=glob('[a-c]*',exclude='b*')", "--list").code == 0
