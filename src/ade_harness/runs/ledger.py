"""The ledger: append-only Parquet segments, one writer per file.

A segment is written under a temporary name, synced, and renamed: a file that has its name is whole. Parquet's
page checksums catch damage after that. ``pandas.read_parquet(run / "ledger")`` reads all of it.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import replaced
from ade_harness.metrics.counts import Row
from ade_harness.runtime.uninterrupted import uninterrupted

SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("valid_pixels", pa.int64()),
        ("ignored_pixels", pa.int64()),
        ("ground_truth", pa.list_(pa.uint8())),
        ("prediction", pa.list_(pa.uint8())),
        ("pixels", pa.list_(pa.int64())),
        ("label_hash", pa.string()),
        ("content_hash", pa.string()),
        ("seconds", pa.float32()),
        ("rank", pa.int32()),
        ("host", pa.string()),
        ("calibration", pa.list_(pa.int64())),
    ],
    metadata={"ade_harness.ledger": "2"},
)


class LedgerError(HarnessError):
    """The ledger cannot be written: no image can be counted any more."""


_FLUSH_EVERY_S = 30.0
"""A slow model's images must not be lost either."""


class LedgerWriter:
    """Writes the rows of one process; every `flush_every` rows, or 30 seconds, become one durable segment.

    Args:
        folder: of the ledger; made when needed.
        marks: what the run's numbers are not; kept in each file's metadata.
        flush_every: rows of a segment.

    Raises:
        LedgerError: the folder cannot be written (no space, no permission). What is on disk stays valid.
    """

    def __init__(self, folder: Path, marks: Sequence[str] = (), flush_every: int = 32) -> None:
        self.folder = folder
        self._schema = SCHEMA.with_metadata({**SCHEMA.metadata, "ade_harness.marks": "; ".join(marks)})
        self.flush_every = flush_every
        self._rows: list[Row] = []
        self._lock = threading.RLock()  # the watchdog saves rows when the main thread hangs
        self._session = uuid.uuid4().hex[:8]
        self._segments = 0
        self._flushed = time.monotonic()

    def append(self, row: Row) -> None:
        """Add a row; it is durable after the next flush."""
        with self._lock:
            self._rows.append(row)
            if len(self._rows) >= self.flush_every or time.monotonic() - self._flushed >= _FLUSH_EVERY_S:
                self.flush()

    def flush(self) -> None:
        """Make all rows so far durable."""
        with uninterrupted(), self._lock:
            self._write()

    def _write(self) -> None:
        self._flushed = time.monotonic()
        if not self._rows:
            return
        rank = self._rows[0].rank
        name = f"rank{rank:05d}-{self._session}-{self._segments:06d}.parquet"
        hint = (
            f"{self._segments} segments of rank {rank} are safe: make room, then give the same command with"
            f" run.dir={self.folder.parent} to continue."
        )
        with replaced(self.folder / name, hint=hint, error=LedgerError) as temporary:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_table(temporary, self._rows, self._schema)
        self._segments += 1
        self._rows = []


def _write_table(path: Path, rows: Sequence[Row], schema: pa.Schema) -> None:
    table = pa.Table.from_pylist([asdict(r) for r in rows], schema=schema)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def write_ledger(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as one file, for somebody else to read.

    Raises:
        HarnessError: it cannot be written.
    """
    with replaced(path) as temporary:
        _write_table(temporary, rows, SCHEMA)


def read_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """Read all segments.

    Returns:
        The rows in the order of image ids, and the names of damaged segments, whose images must be redone.

    Raises:
        HarnessError: an image is recorded twice with different results, or a segment of another version.
    """
    rows: dict[str, Row] = {}
    damaged = []
    for path in sorted(folder.glob("*.parquet")):
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:  # read_table imports far more
                table = file.read()
        except (pa.ArrowException, OSError):
            damaged.append(path.name)
            continue
        if not table.schema.equals(SCHEMA):
            raise HarnessError(f"{path}: a ledger of another version of this package. Start a new run.")
        for record in table.to_pylist():
            row = _row_from(record)
            other = rows.setdefault(row.image_id, row)
            if other.label_hash != row.label_hash or other.content_hash != row.content_hash:
                raise HarnessError(
                    f"{path}: {row.image_id} is recorded twice with different results (label hashes"
                    f" {other.label_hash} and {row.label_hash}). Start a new run."
                )
    return [rows[i] for i in sorted(rows)], damaged


def _row_from(record: dict[str, object]) -> Row:
    values = {f.name: record[f.name] for f in fields(Row)}
    for name, dtype in (
        ("ground_truth", np.uint8),
        ("prediction", np.uint8),
        ("pixels", np.int64),
        ("calibration", np.int64),
    ):
        values[name] = np.array(values[name], dtype)
    return Row(**values)  # type: ignore[arg-type]
