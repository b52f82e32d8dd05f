"""A network for tests that takes as long as an environment variable says, on each rank or on one alone."""

SLOW_MODEL = """
import os
import time

import torch


class Net(torch.nn.Module):
    def forward(self, images):
        if os.environ.get("SLOW_MODEL_RANK", os.environ.get("RANK", "0")) == os.environ.get("RANK", "0"):
            time.sleep(float(os.environ.get("SLOW_MODEL_SECONDS", "0.2")))
        n, _, h, w = images.shape
        small = torch.nn.functional.avg_pool2d(images, 4, ceil_mode=True).sum(1, keepdim=True)
        return torch.sin(small * torch.arange(1, 151).view(1, 150, 1, 1))
"""
