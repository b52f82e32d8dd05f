"""Images on their way from loader processes."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ade_harness.evaluation.data import LoadedImage
from ade_harness.evaluation.packing import pack, receive, send, unpack
from ade_harness.inference.predictor import Prepared
from ade_harness.runtime.descriptors import Ticket, is_loader, open_descriptors, receive_descriptor, send_descriptor
from ade_harness.runtime.queue import NOTHING, ItemLoader, Numbered


def image(number: int, overlay: bool) -> LoadedImage:
    generator = torch.Generator().manual_seed(number)

    def noise(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    prepared = Prepared(f"i{number}", (noise(5, 7, 3), noise(11, 3, 3).transpose(0, 1)), (5, 7))
    return LoadedImage(f"i{number}", prepared, noise(5, 7), "a" * 32, "b", noise(5, 7, 3) if overlay else None, 0.25)


def tensors(found: LoadedImage) -> list[Tensor]:
    return [*found.prepared.pixels, found.target, *([] if found.overlay_image is None else [found.overlay_image])]


@pytest.mark.parametrize(
    "values",
    [[], [torch.zeros(0, 3)], [torch.tensor(7)], [torch.arange(5), torch.ones(3, 2).half(), torch.tensor([True])]],
)
def test_tensors_of_any_kind_come_back(values: list[Tensor]) -> None:
    buffer, layout = pack(values)
    assert buffer.is_shared()
    found = unpack(buffer, layout)
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in values]
    assert all(torch.equal(one, other) for one, other in zip(found, values, strict=True))


@pytest.mark.parametrize("overlay", [False, True])
def test_an_image_is_one_piece_of_memory(overlay: bool) -> None:
    before = image(1, overlay)
    found = pickle.loads(ForkingPickler.dumps(before))
    assert {t.untyped_storage().data_ptr() for t in tensors(found)} == {found.target.untyped_storage().data_ptr()}
    for one, other in zip(tensors(found), tensors(before), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
        assert one.is_contiguous()
    left_out = ("prepared", "target", "overlay_image")
    assert {k: v for k, v in vars(found).items() if k not in left_out} == {
        k: v for k, v in vars(before).items() if k not in left_out
    }
    assert (found.prepared.image_id, found.prepared.original_size) == ("i1", (5, 7))


class Images(Dataset[list[LoadedImage]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[LoadedImage]:
        return [image(index, index % 2 == 0), image(10 + index, False)]


def test_loader_processes_hand_over_what_they_made() -> None:
    loader = DataLoader(Images(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = [one for batch in loader for one in batch]
    expected = [one for index in range(6) for one in Images()[index]]
    assert [one.image_id for one in found] == [one.image_id for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


class Numbers(Dataset[Any]):
    """Batches with their numbers, as `Numbered` gives them."""

    def __getitem__(self, index: int) -> list[LoadedImage]:
        return Images()[index]


def test_the_loaders_of_a_rank_need_no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes a fifth of a millisecond of the thread that takes the items."""

    def connect(_: Any) -> Any:
        raise AssertionError("a connection to a loader was opened")

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(connect))
    order = [5, 0, NOTHING, 3, 1, 4, 2]
    before = len([*Path("/proc/self/fd").iterdir()])
    loader = ItemLoader(
        Numbered(Numbers()), batch_size=None, sampler=order, num_workers=2, multiprocessing_context="fork"
    )
    for _ in range(2):  # each time with new loaders
        found = list(loader)
        assert [number for number, _ in found] == [5, 0, 3, 1, 4, 2]
        for number, batch in found:
            for one, other in zip(batch, Images()[number], strict=True):
                assert one.image_id == other.image_id
                assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    del found, batch, one
    ends = time.monotonic() + 20  # under load the loaders' threads need a moment
    while len([*Path("/proc/self/fd").iterdir()]) > before + 2:  # of multiprocessing's own
        assert time.monotonic() < ends
        gc.collect()
        time.sleep(0.05)


class Crowds(Dataset[Any]):
    """Batches of so many images that their descriptors do not fit into a socket."""

    def __getitem__(self, index: int) -> list[LoadedImage]:
        return [image(index * 400 + number, False) for number in range(400)]


def test_more_descriptors_than_a_socket_holds_take_torchs_way() -> None:
    """Waiting for room would last for ever: the rank takes them once it has the whole item."""
    loader = ItemLoader(
        Numbered(Crowds()), batch_size=None, sampler=[0, 1], num_workers=1, multiprocessing_context="fork"
    )
    found = [(number, [one.image_id for one in batch], batch[399].target.clone()) for number, batch in loader]
    assert [(number, len(ids)) for number, ids, _ in found] == [(0, 400), (1, 400)]
    for number, ids, target in found:
        assert ids == [f"i{number * 400 + place}" for place in range(400)]
        assert torch.equal(target, image(number * 400 + 399, False).target)


def test_a_limit_of_open_files_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors on their way count against the user's; whether one may be sent changes from item to item."""
    sent = []

    def send_fds(*arguments: Any) -> int:
        sent.append(arguments)
        if len(sent) % 3 == 0:
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return original(*arguments)

    original = socket.send_fds
    monkeypatch.setattr(socket, "send_fds", send_fds)  # inherited by the loader
    loader = ItemLoader(
        Numbered(Numbers()), batch_size=None, sampler=range(6), num_workers=1, multiprocessing_context="fork"
    )
    for number, batch in loader:
        for one, other in zip(batch, Images()[number], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_a_loop_that_ends_early_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """The loaders end before their sockets are closed: what they still send would be an error of theirs."""
    order = list(range(6)) * 20
    loader = ItemLoader(
        Numbered(Numbers()), batch_size=None, sampler=order, num_workers=2, multiprocessing_context="fork"
    )
    for _ in range(3):
        for number, _batch in loader:
            assert number == 0
            break
    assert capfd.readouterr() == ("", "")
    assert multiprocessing.active_children() == []


def test_the_memory_of_another_image_is_refused() -> None:
    with open_descriptors(1) as descriptors, tempfile.TemporaryFile() as file:
        pid = os.fork()
        if pid == 0:
            descriptors.enter(0)
            for _ in range(2):
                send_descriptor(file.fileno())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(receive_descriptor(Ticket(descriptors.key, 0, 0)))
        with pytest.raises(RuntimeError, match="loader 0: descriptor 1 came in place of 7"):
            receive_descriptor(Ticket(descriptors.key, 0, 7))
    assert not is_loader()
    buffer, _ = pack([torch.arange(3)])
    assert send(buffer) is buffer
    assert receive(buffer) is buffer
