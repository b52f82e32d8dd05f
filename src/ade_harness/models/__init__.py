"""Networks: images [N, 3, H, W] to scores [N, C, h, w]; no knowledge of data sets or metrics."""
