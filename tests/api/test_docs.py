"""The examples of docs/python.md run, in their order."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from tests.api.networks import Colours
from tests.conftest import REPOSITORY


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Colours()

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.slow
def test_the_examples_of_python(tiny_ade: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/python.md").read_text(), re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tiny_ade.rename(tmp_path / "data/ADEChallengeData2016")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    Image.fromarray(picture).save("street.jpg")
    loader = torch.utils.data.DataLoader(torch.randn(4, 3, 16, 16), batch_size=2)
    names: dict[str, Any] = {"net": Colours(), "module": Module(), "loader": loader}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:
            exec(block, names)
    assert names["result"].images == 5
    assert names["labels"].shape == (40, 60)
    assert (tmp_path / "shown.png").exists()
    assert len(names["ade"].runs("runs")) == 2
    assert 0 <= float(names["trainer"].callback_metrics["ade20k/mIoU"]) <= 1
