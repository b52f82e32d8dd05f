"""Read the file of an offline W&B run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def read_wandb(path: Path, seconds: float = 60) -> list[Any]:
    """Read the records of an offline W&B run that was finished.

    W&B's service is a process of its own that may still be writing: waits until the last record is there.
    """
    end = time.monotonic() + seconds
    while True:
        records = _records(path.read_bytes())
        if any(record.HasField("exit") for record in records):
            return records
        if time.monotonic() > end:
            raise AssertionError(f"{path} ({path.stat().st_size} bytes, {len(records)} records) has no end")
        time.sleep(0.1)


def _records(data: bytes) -> list[Any]:
    """Decode a 7-byte header, then LevelDB's log format in 32 KiB blocks, up to the last complete record."""
    from wandb.proto import wandb_internal_pb2

    position, parts, records = 7, b"", []
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        part = data[position + 7 : position + 7 + length]
        if len(part) < length:
            break
        parts += part
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records
