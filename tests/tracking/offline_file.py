"""Read the file of an offline W&B run."""

from __future__ import annotations

from pathlib import Path


def read_wandb(path: Path) -> list[object]:
    """Read the records of an offline W&B file: a 7-byte header, then LevelDB's log format in 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records
