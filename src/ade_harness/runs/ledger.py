"""The ledger: append-only Parquet segments, one writer per file.

A segment is written under a temporary name, synced, and renamed: a file that has its name is whole. Parquet's
page checksums catch damage after that. ``pandas.read_parquet(run / "ledger")`` reads all of it.
"""

from __future__ import annotations

import stat
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
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
        ("source_hash", pa.string()),
    ],
    metadata={"ade_harness.ledger": "3"},
)
_SCHEMA_2 = pa.schema([field for field in SCHEMA if field.name != "source_hash"])
"""Earlier versions: the hash of a prediction's file follows that of the data set's in one column."""
_CONTENT_HASH_DIGITS = 32


class LedgerError(HarnessError):
    """The ledger cannot be written: no image can be counted any more."""


_FLUSH_EVERY_S = 30.0
"""A slow model's images must not be lost either."""


_MAX_ROWS = 2**18
"""Images of a ledger."""
_MAX_VALUES = 2**26
"""Values of a ledger: six hundred for each of a hundred thousand images."""
_MAX_TEXT_BYTES = 2**28
"""Bytes of one column of texts, unpacked: a few bytes can stand for a million equal ones."""
_TEXTS = ("image_id", "label_hash", "content_hash", "host", "source_hash")
_MAX_BYTES = 2**31
"""Bytes of one segment, unpacked."""


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
    columns = [_column([getattr(row, field.name) for row in rows], field.type) for field in schema]
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    """Lay out a column as Arrow keeps it. ``pa.array`` would import pandas first, in every rank: half a second."""
    if pa.types.is_list(kind):
        ends = np.cumsum([0, *map(len, values)], dtype=np.int32)
        entries = _column(np.concatenate(values), kind.value_type)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(ends)], children=[entries])
    if pa.types.is_string(kind):
        texts = [text.encode() for text in values]
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int32)
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))])
    numbers = np.ascontiguousarray(values, dtype=kind.to_pandas_dtype())  # NumPy's, in spite of the name
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


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
    damaged: list[str] = []
    values = 0
    for path in sorted(folder.glob("*.parquet")):
        try:
            records = _read_segment(path)
            found = [_row_from(record) for record in records]
        except (pa.ArrowException, OSError, ValueError, TypeError, OverflowError):
            damaged.append(path.name)
            continue
        values += sum(len(row.pixels) for row in found)
        if len(rows) + len(found) > _MAX_ROWS or values > _MAX_VALUES:
            raise HarnessError(f"{folder}: holds more images or counts than any data set has. Not a ledger.")
        for row in found:
            other = rows.setdefault(row.image_id, row)
            if other.label_hash != row.label_hash or other.all_files != row.all_files:
                raise HarnessError(
                    f"{path}: {row.image_id} is recorded twice with different results (label hashes"
                    f" {other.label_hash} and {row.label_hash}). Start a new run."
                )
    return [rows[i] for i in sorted(rows)], damaged


def _read_segment(path: Path) -> list[dict[str, Any]]:
    """Return a segment's records, once its metadata say that they fit into memory.

    Raises:
        HarnessError: of another version, or no segment: a few bytes can stand for billions of equal values.
        ArrowException, OSError: damaged.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise HarnessError(f"{path}: is not a regular file.")
    with pq.ParquetFile(path) as file:  # read_table imports far more
        texts = [name for name in _TEXTS if name in file.schema_arrow.names]
        if not (file.schema_arrow.equals(SCHEMA) or file.schema_arrow.equals(_SCHEMA_2)):
            raise HarnessError(f"{path}: a ledger of another version of this package. Start a new run.")
        groups = [file.metadata.row_group(index) for index in range(min(file.metadata.num_row_groups, _MAX_ROWS))]
        values = sum(g.column(c).num_values for g in groups for c in range(g.num_columns))
        size = sum(g.total_byte_size for g in groups)
        if file.metadata.num_rows > _MAX_ROWS or values > _MAX_VALUES or size > _MAX_BYTES:
            raise HarnessError(f"{path}: declares {values:,} values, more than any ledger can hold.")
    # texts that repeat stay dictionaries, whatever length they have
    with pq.ParquetFile(path, page_checksum_verification=True, read_dictionary=texts) as file:
        table = file.read()
    for name in texts:
        words = table.column(name).combine_chunks().dictionary
        longest = max((len(word.as_buffer()) for word in words if word.is_valid), default=0)
        if longest * table.num_rows > _MAX_TEXT_BYTES:
            raise HarnessError(
                f"{path}: {name} has {table.num_rows:,} strings of up to {longest:,} bytes. Not a ledger."
            )
    columns = {name: _values(table.column(name).combine_chunks()) for name in table.column_names}
    return [dict(zip(columns, record, strict=True)) for record in zip(*columns.values(), strict=True)]


def _values(column: pa.Array) -> list[Any]:
    """Return a column's values; lists as arrays, which take a twentieth of the memory of lists of Python's numbers."""
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    numbers, ends = column.flatten(), _numbers(column.offsets)
    if column.null_count or numbers.null_count:
        raise ValueError("a value is missing")
    flat = _numbers(numbers)
    return [flat[start - ends[0] : end - ends[0]] for start, end in pairwise(ends)]


def _numbers(array: pa.Array) -> npt.NDArray[Any]:
    """Return an array's numbers without a copy; `Array.to_numpy` would import pandas."""
    kind = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.zeros(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def _row_from(record: dict[str, Any]) -> Row:
    """Return a row; raises ValueError or TypeError if its parts do not fit each other."""
    if "source_hash" not in record:
        both = record["content_hash"]
        record |= {"content_hash": both[:_CONTENT_HASH_DIGITS], "source_hash": both[_CONTENT_HASH_DIGITS:]}
    values = {f.name: record[f.name] for f in fields(Row)}
    for name, dtype in (
        ("ground_truth", np.uint8),
        ("prediction", np.uint8),
        ("pixels", np.int64),
        ("calibration", np.int64),
    ):
        values[name] = np.array(values[name], dtype)
    row = Row(**values)
    if not len(row.ground_truth) == len(row.prediction) == len(row.pixels):
        raise ValueError("columns of different lengths")
    smallest = min(row.height, row.width, row.pixels.min(initial=0))
    if any(value is None for value in values.values()) or smallest < 0:
        raise ValueError("a value is missing or negative")
    return row
