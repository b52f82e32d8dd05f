"""Images on their way from loader processes."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ade_harness.evaluation.data import LoadedImage
from ade_harness.evaluation.packing import pack, unpack
from ade_harness.inference.predictor import Prepared


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
