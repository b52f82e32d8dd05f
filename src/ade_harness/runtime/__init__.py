"""Where the work is done: ranks, devices, loaders. It knows a list of items with costs, and nothing of images."""
