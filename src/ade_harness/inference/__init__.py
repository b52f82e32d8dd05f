"""From an image to a label map, by a published protocol; no knowledge of metrics."""
