"""Weight files of the systems: official addresses, two files of one system, pickles of arrays, and what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ade_harness as ade
from ade_harness.config.compose import compose_config
from ade_harness.config.model import ModelConfig
from ade_harness.errors import HarnessError
from ade_harness.models.checkpoint.convert import convert
from ade_harness.models.checkpoint.parts import Choice
from ade_harness.models.checkpoint.public import hub_checkpoint, local_checkpoint
from ade_harness.models.loading import load_model
from ade_harness.models.systems.siglip2 import SIGLIP2
from tests.conftest import Done
from tests.files.test_fetch import Handler, Server
from tests.models.checkpoint.reading import read_state_dict
from tests.models.systems.test_dense_systems import official_weights

pytestmark = pytest.mark.slow  # the file takes more than a few seconds

SMALL = (
    "model.architecture.backbone.hidden_size=384", "model.architecture.backbone.num_hidden_layers=12",
    "model.architecture.backbone.num_attention_heads=6", "model.architecture.backbone.use_swiglu_ffn=false",
)  # fmt: skip


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server(("127.0.0.1", 0), Handler)
    served.requests = []
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADE_HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/checkpoints"


def model_cfg(*overrides: str) -> ModelConfig:
    return compose_config(list(overrides)).model


def save(path: Path, state: dict[str, torch.Tensor]) -> bytes:
    torch.save({"meta": {"CLASSES": ["wall"]}, "state_dict": OrderedDict(state)}, path)
    return path.read_bytes()


def test_an_official_file_is_fetched_once_resumed_and_checked(server: Server, tmp_path: Path, own_cache: Path) -> None:
    large = {"auxiliary_head.convs.9.weight": torch.zeros(1_000_000)}  # of training only
    server.content = save(tmp_path / "x.pth", official_weights("upernet_convnext") | large)
    server.break_after = 3_000_000
    digest = hashlib.sha256(server.content).hexdigest()
    overrides = (
        "model=upernet_convnext_xl", f"model.official.url=http://127.0.0.1:{server.server_port}/net.pth",
        f"model.official.sha256={digest[:8]}", "model.architecture.backbone.depths=[2,2,3,2]",
        "model.architecture.backbone.hidden_sizes=[16,32,64,128]", "model.architecture.head.channels=32",
    )  # fmt: skip
    model = load_model(model_cfg(*overrides))
    assert model.facts["sha256"] == digest
    assert model.facts["origin"].endswith("/net.pth")
    assert server.requests[0] is None
    assert server.requests[1] is not None  # only the rest
    load_model(model_cfg(*overrides))
    assert len(server.requests) == 2  # from the cache
    assert (own_cache / "net.pth").exists()
    with pytest.raises(HarnessError, match=r"the sha256 is .*, the configuration expects 12345678\."):
        load_model(model_cfg(*overrides, "model.official.sha256='12345678'"))


def test_two_addresses_of_one_name_are_two_files(server: Server, own_cache: Path) -> None:
    """Nothing but the address distinguishes them where no sha256 is expected."""
    from ade_harness.models.checkpoint.public import url_checkpoint

    found = []
    for place, content in (
        ("a/net.pth", b"first"),
        ("b/net.pth", b"second"),
        ("b/net.pth?v=2", b"third"),
        ("b/..", b"4"),
    ):
        server.content = content
        checkpoint = url_checkpoint(f"http://127.0.0.1:{server.server_port}/{place}", own_cache, None)
        assert checkpoint.path.read_bytes() == content
        assert own_cache in checkpoint.path.parents
        found.append(checkpoint.path)
    assert len(set(found)) == 4
    again = url_checkpoint(f"http://127.0.0.1:{server.server_port}/a/net.pth", own_cache, None)
    assert again.path.read_bytes() == b"first"


def test_an_address_that_is_gone(server: Server) -> None:
    server.status = 404
    with pytest.raises(HarnessError, match=r"net\.pth: the server answers 404"):
        load_model(model_cfg("model=beit_l", f"model.official.url=http://127.0.0.1:{server.server_port}/net.pth"))


def test_backbone_and_head_are_two_files(server: Server, tmp_path: Path) -> None:
    parts = official_weights("dinov2_vits14_linear")
    torch.save(parts["backbone"], tmp_path / "backbone.pth")
    server.content = save(tmp_path / "head.pth", parts["head"])
    head = f"model.official.url=http://127.0.0.1:{server.server_port}/head.pth"
    overrides = ("model=dinov2_g_linear", *SMALL, head, f"model.backbone_checkpoint={tmp_path}/backbone.pth")
    model = load_model(model_cfg(*overrides))
    assert model.facts["head_sha256"] == hashlib.sha256(server.content).hexdigest()
    assert model.facts["backbone_sha256"] == hashlib.sha256((tmp_path / "backbone.pth").read_bytes()).hexdigest()
    assert model.facts["sha256"] not in (model.facts["head_sha256"], model.facts["backbone_sha256"])
    with torch.inference_mode():
        assert model.module(torch.zeros(1, 3, 56, 70)).shape == (1, 150, 4, 5)
    # another head is another checkpoint: a run cannot go on with it
    server.content = save(tmp_path / "head.pth", parts["head"] | {"decode_head.conv_seg.bias": torch.ones(150)})
    other = f"model.official.url=http://127.0.0.1:{server.server_port}/other.pth"
    assert load_model(model_cfg(*overrides, other)).facts["sha256"] != model.facts["sha256"]


def test_one_file_may_hold_both(tmp_path: Path) -> None:
    parts = official_weights("dinov2_vits14_linear")
    torch.save({**parts["backbone"], **parts["head"]}, tmp_path / "both.pth")
    model = load_model(model_cfg("model=dinov2_g_linear", *SMALL, f"model.checkpoint={tmp_path}/both.pth"))
    assert "backbone_sha256" not in model.facts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("dinov3_7b_linear", "The linear head behind the published 55.9 was never released. Train it with"),
        ("siglip2_g", "No segmentation head for SigLIP 2 was ever released. Train one with"),
        ("mae_h", "no ADE20K model with MAE ViT-H was ever published; the 53.6"),
        ("mae_l", "MAE's authors never released an ADE20K checkpoint"),
    ],
)
def test_what_was_never_published_is_reported(call: Callable[..., Done], name: str, text: str) -> None:
    done = call(f"model={name}", "dataset=demo")
    assert done.code == 2
    assert f"error: model={name}: {text}" in done.err
    assert "model.checkpoint=PATH" in done.err
    assert "model.weights" not in done.err  # no advice that makes a score meaningless


def test_a_head_without_its_backbone(
    call: Callable[..., Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(official_weights("dinov2_vits14_linear")["head"], tmp_path / "head.pth")
    overrides = (
        "model=dinov2_g_linear",
        "model.checkpoint=head.pth",
        "model.backbone.url=null",
        "model.backbone.hub_id=null",
        "dataset=demo",
    )
    done = call(*overrides)
    assert done.code == 2
    assert (
        "error: head.pth: this file holds the head alone. Give the backbone's file as model.backbone_check" in done.err
    )
    done = call(*overrides, "model.backbone_checkpoint=nothing.pth")
    assert "model.backbone_checkpoint=nothing.pth: no such file" in done.err


def test_own_protocols(call: Callable[..., Done]) -> None:
    assert compose_config(["model=beit_l", "inference=ms"]).inference.name == "beit_slide_640_ms"
    assert compose_config(["inference=ss", "model=upernet_convnext_xl"]).inference.name == "mmseg_slide_640"
    assert compose_config(["model=upernet_convnext_xl"]).inference.name == "mmseg_whole_640_ms"
    done = call("model=dinov3_7b_linear", "inference=ms")
    assert done.code == 2
    assert (
        "inference=ms: no multi-scale protocol was published for model=dinov3_7b_linear. It has inference=ss"
        in done.err
    )
    done = call("model=demo", "inference=ss")
    assert "inference=ss: no single-scale protocol was published for model=demo. Choose one by name" in done.err


def test_a_source_that_a_model_does_not_have() -> None:
    with pytest.raises(HarnessError, match=r"model\.source=official: segformer_b0 has no such file"):
        load_model(model_cfg("model=segformer_b0", "model.source=official"))
    with pytest.raises(HarnessError, match=r"model\.source=mirror: .*(official|hub)"):
        load_model(model_cfg("model=segformer_b0", "model.source=mirror"))


class HubOfFiles(Server):
    files: dict[str, bytes]
    commit = "489d5cd81a0b59fab9b7ea758d3548ebe99677da"
    error: str | None = None


class HubHandler(BaseHTTPRequestHandler):
    server: HubOfFiles

    def _answer(self, body: bool) -> None:
        name = self.path.rpartition("/")[2]
        content = self.server.files.get(name) if self.server.error is None else None
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", self.server.error or "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("ETag", '"' + hashlib.sha256(content).hexdigest() + '"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.server.requests.append(name)
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubOfFiles]:
    served = HubOfFiles(("127.0.0.1", 0), HubHandler)
    served.requests, served.files = [], {}
    threading.Thread(target=served.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield served
    served.shutdown()
    served.server_close()


def test_a_model_in_shards(hub: HubOfFiles, tmp_path: Path) -> None:
    """As the hub keeps models of several gigabytes: DINOv3's 7 B, SigLIP 2's g."""
    first, second = {"a": torch.ones(3)}, {"b": torch.zeros(2, 2)}
    for number, part in enumerate((first, second), 1):
        save_file(part, tmp_path / "part")
        hub.files[f"model-0000{number}-of-00002.safetensors"] = (tmp_path / "part").read_bytes()
    where = {key: f"model-0000{n}-of-00002.safetensors" for n, key in ((1, "a"), (2, "b"))}
    hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    found = hub_checkpoint("a/b", "model.safetensors", None, None)
    assert found.origin == f"a/b@{hub.commit}/model.safetensors.index.json"
    state = read_state_dict(found.path)
    assert set(state) == {"a", "b"}
    assert torch.equal(state["a"], first["a"])
    before = found.sha256
    assert hub_checkpoint("a/b", "model.safetensors", None, before).sha256 == before
    with pytest.raises(HarnessError, match=r"model\.hub\.sha256 expects 000000"):
        hub_checkpoint("a/b", "model.safetensors", None, "000000")
    hub.commit = hub.commit[::-1]
    save_file({"b": torch.ones(2, 2)}, tmp_path / "part")
    hub.files["model-00002-of-00002.safetensors"] = (tmp_path / "part").read_bytes()
    assert hub_checkpoint("a/b", "model.safetensors", None, None).sha256 != before
    for name, content in hub.files.items():  # the same on this machine: a pin is of the weights, not of their index
        (tmp_path / name).write_bytes(content)
    index = tmp_path / "model.safetensors.index.json"
    pin = local_checkpoint(str(index), None).sha256
    assert pin == hub_checkpoint("a/b", "model.safetensors", None, None).sha256
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes((tmp_path / "part").read_bytes())
    with pytest.raises(HarnessError, match=r"model\.checkpoint_sha256 expects"):
        local_checkpoint(str(index), pin)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(HarnessError, match=r"index\.json: its shard model-00001-of-00002\.safetensors: no such file"):
        local_checkpoint(str(index), None)
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(
        HarnessError, match=r"x\.index\.json: not an index of weight files \(it names no files, or files els"
    ):
        read_state_dict(tmp_path / "x.index.json")


def test_an_older_file_will_do(hub: HubOfFiles, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "m.bin")
    hub.files["pytorch_model.bin"] = (tmp_path / "m.bin").read_bytes()
    found = hub_checkpoint("a/b", "model.safetensors", None, None)
    assert found.path.name == "pytorch_model.bin"
    assert torch.equal(read_state_dict(found.path)["a"], torch.ones(3))
    with pytest.raises(HarnessError, match=r"a/b/other\.bin: not found on the hub"):
        hub_checkpoint("a/b", "other.bin", None, None)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("RevisionNotFound", "this revision is no longer on the hub"),
        ("RepoNotFound", "not found on the hub"),
        ("GatedRepo", "this repository is gated. Accept its licence"),
    ],
)
def test_what_the_hub_refuses(hub: HubOfFiles, code: str, text: str) -> None:
    hub.error = code
    with pytest.raises(HarnessError, match=text):
        load_model(model_cfg("model=beit_l", "model.source=hub"))


def test_a_checkpoint_of_another_size_is_named(tmp_path: Path) -> None:
    parts = official_weights("dinov2_vits14_linear")
    torch.save({**parts["backbone"], **parts["head"]}, tmp_path / "small.pth")
    with pytest.raises(
        HarnessError, match=r"small\.pth: these weights do not fit the model\. .*of another shape: .*384"
    ):
        load_model(model_cfg("model=dinov2_g_linear", *SMALL[1:3], f"model.checkpoint={tmp_path}/small.pth"))


# detectron2's pickles, big_vision's archives


def test_pickles_of_arrays_are_read(tmp_path: Path) -> None:
    content = {"model": {"a.weight": np.ones((2, 3), np.float32), "b": np.float64(3.0)}, "__author__": "someone"}
    for protocol in (2, 4):
        (tmp_path / "m.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        state = read_state_dict(tmp_path / "m.pkl")
        assert torch.equal(state["a.weight"], torch.ones(2, 3))
        assert state["b"].item() == 3


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/pickle_was_run",)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (pickle.dumps({"model": Runs()}), r"this pickle names (posix|os)\.system; only numpy arrays are read"),
        (pickle.dumps({"model": {"a": torch.ones(1)}}), r"this pickle names torch\._utils\._rebuild_tensor_v2"),
        (pickle.dumps({"model": {"a": np.ones(9)}})[:-20], "not a whole pickle"),
        (pickle.dumps({"model": {"a": "text"}}), "holds no mapping from names to arrays"),
        (pickle.dumps([1, 2]), "holds no mapping from names to arrays"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "m.pkl").write_bytes(content)
    with pytest.raises(HarnessError, match=text):
        read_state_dict(tmp_path / "m.pkl")
    assert not Path("/tmp/pickle_was_run").exists()


def test_archives_of_arrays_are_read(tmp_path: Path) -> None:
    half = torch.tensor([1.5, -2.0, 3e38]).bfloat16()
    np.savez(tmp_path / "m.npz", plain=np.ones((2, 2), np.float32), half=half.view(torch.int16).numpy().view("V2"))
    state = read_state_dict(tmp_path / "m.npz")
    assert torch.equal(state["half"], half.float())
    assert torch.equal(state["plain"], torch.ones(2, 2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "m.npz").read_bytes()[:100])
    with pytest.raises(HarnessError, match=r"cut\.npz: not a whole \.npz of arrays"):
        read_state_dict(tmp_path / "cut.npz")
    np.savez(tmp_path / "objects.npz", a=np.array([Runs()], dtype=object))
    with pytest.raises(HarnessError, match=r"objects\.npz: not a whole \.npz of arrays"):
        read_state_dict(tmp_path / "objects.npz")


def test_names_do_not_decide_what_a_safetensors_file_is(tmp_path: Path) -> None:
    save_file({"params/t": torch.zeros(1)}, tmp_path / "m.safetensors")
    assert list(read_state_dict(tmp_path / "m.safetensors")) == ["params/t"]
    assert SIGLIP2.hub_names({"params/t": torch.zeros(1), "params/b": torch.zeros(1)}) == {}


def packed_again(source: Path, target: Path, compression: int) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


def test_a_torch_file_that_was_packed_again_is_itself_or_refused(tmp_path: Path) -> None:
    """Compressed noise is no shorter than noise: torch, which maps members into memory, would take it for the weights."""
    noise = torch.frombuffer(bytearray(np.random.default_rng(0).bytes(40_000)), dtype=torch.int32)
    torch.save({"w": noise}, tmp_path / "w.pth")
    plain = packed_again(tmp_path / "w.pth", tmp_path / "plain.pth", zipfile.ZIP_STORED)
    assert torch.equal(read_state_dict(plain)["w"], noise)
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        packed = packed_again(tmp_path / "w.pth", tmp_path / "packed.pth", method)
        with pytest.raises(HarnessError, match=r"packed\.pth: was packed again, with compression.*zip -0"):
            read_state_dict(packed)
        with pytest.raises(HarnessError, match=r"packed\.pth: was packed again"):
            convert(packed, tmp_path / "out.safetensors", Choice())


@pytest.mark.parametrize("kind", ["npz", "zip", "pt2"])
def test_an_archive_that_says_too_much_is_not_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ade_harness.files.archive._SMALL_BYTES", 1 << 20)
    path = tmp_path / f"w.{kind}"
    if kind == "npz":
        np.savez_compressed(path, w=np.zeros(1 << 20, np.float32))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pth", bytes(1 << 22))
    with pytest.raises(HarnessError, match=r"w\.\w+: says that it holds 4,194,\d+ bytes in [\d,]+, as no weights do"):
        if kind == "pt2":
            load_model(compose_config(["model=exported", f"model.path={path}", "dataset=demo"]).model)
        else:
            read_state_dict(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=segformer_b0", "model.checkpoint={}"],
        ["model=dinov3_7b_linear", "model.checkpoint={}", "model.backbone_checkpoint={}"],
        ["model=onnx", "model.path={}"], ["model=torchscript", "model.path={}"], ["model=exported", "model.path={}"],
        ["model=timm", "model.backbone=resnet18", "model.checkpoint={}"],
    ],
)  # fmt: skip
def test_pipes_and_folders_are_not_waited_for(overrides: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    for name in ("pipe.pth", "folder.pth"):
        cfg = compose_config([*(text.format(tmp_path / name) for text in overrides), "dataset=demo"]).model
        with pytest.raises(HarnessError, match=rf"{name}: is (not a regular file|a folder)"):
            load_model(cfg)


@pytest.mark.parametrize("kind", ["hf", "smp"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_pipes_in_a_folder_of_a_model_are_not_waited_for(kind: str, name: str, tmp_path: Path) -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="pip install 'ade-harness[smp]'")
    os.mkfifo(tmp_path / name)
    cfg = compose_config([f"model={kind}", f"model.id={tmp_path}", "dataset=demo"]).model
    with pytest.raises(HarnessError, match=rf"model.id={tmp_path}: {name}: is not a regular file"):
        load_model(cfg)
    with pytest.raises(HarnessError, match=f"{name}: is not a regular file"):
        ade.load_model(tmp_path)


@pytest.mark.parametrize(
    ("names", "advised"),
    [
        (("scheduler.bin", "optimizer.bin", "model.safetensors", "random_states_0.pkl"), "model.safetensors"),
        (("state.pt", "head.safetensors"), "head.safetensors"),
        (("iter_8000.pth", "iter_16000.pth"), "iter_16000.pth"),  # the newest
        (("optimizer.bin", "scheduler.pt"), None),
    ],
)  # fmt: skip
def test_of_a_trainers_folder_the_weights_are_advised(
    names: tuple[str, ...], advised: str | None, tmp_path: Path
) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (number, number))
    expected = f"such as {tmp_path / advised}" if advised else "Expected a file of weights."
    with pytest.raises(HarnessError, match=re.escape(expected)):
        local_checkpoint(str(tmp_path), None)
