"""A network for tests that takes as long as an environment variable says, on one rank longer than on the others."""

SLOW_MODEL = """
import os
import time

import torch


class Net(torch.nn.Module):
    def forward(self, images):
        seconds = float(os.environ.get("SLOW_MODEL_SECONDS", "0.2"))
        if os.environ.get("SLOW_MODEL_RANK") == os.environ.get("RANK", "0"):
            seconds *= float(os.environ.get("SLOW_MODEL_FACTOR", "1.5"))
        time.sleep(seconds)
        n, _, h, w = images.shape
        small = torch.nn.functional.avg_pool2d(images, 4, ceil_mode=True).sum(1, keepdim=True)
        return torch.sin(small * torch.arange(1, 151).view(1, 150, 1, 1))
"""
