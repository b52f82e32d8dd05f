"""The end of a sweep: one table of all its runs, on the terminal and as CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from ade_harness.cli.work import score_of
from ade_harness.config.arguments import literal
from ade_harness.errors import HarnessError
from ade_harness.files.atomic import write_json, write_text
from ade_harness.files.documents import read_json
from ade_harness.runtime.console import make_console, print_fact

if TYPE_CHECKING:
    from ade_harness.config.schema import Config

command: ContextVar[str] = ContextVar("command", default="evaluate")
"""Which command Hydra runs now."""
NO_OTHER_PRIMARY = (
    "--config-name and --config-path: the jobs of a sweep are composed from the packaged primary configuration, so"
    " these would have no effect. Give their values as overrides, or as a group of --config-dir."
)
TABLE = "sweep"
"""Name of the table's files, without their endings."""
_JOBS = "jobs.json"


@dataclass(frozen=True)
class SweepJob:
    """One combination of a sweep."""

    number: int
    """From 0."""
    overrides: tuple[str, ...]
    run_dir: Path
    config: Config

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command that runs it."""
        kept = [override for override in self.overrides if not override.startswith("run.dir=")]
        return ["evaluate", *kept, f"run.dir={literal(str(self.run_dir))}"]


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep."""

    job: int
    overrides: str
    state: str
    """finished, or failed with its exit code."""
    mIoU: float | None
    """0..1."""
    low: float | None
    high: float | None
    """Ends of its interval."""
    images: int | None
    warnings: str
    """What the score is not: demo, partial, random weights."""
    run: str
    """Its directory."""


@dataclass
class Sweep:
    """What a sweep has run so far: a sweeper that optimises launches its jobs in batches."""

    folder: Path
    rows: list[SweepRow] = field(default_factory=list)

    def add(self, jobs: Sequence[SweepJob], codes: Sequence[int]) -> list[SweepRow]:
        """Add jobs that have ended, and write sweep.csv and sweep.json; returns their rows.

        Args:
            jobs: in their order.
            codes: exit code of each.

        Raises:
            HarnessError: the files cannot be written.
        """
        added = [_row(job, code) for job, code in zip(jobs, codes, strict=True)]
        self.rows += added
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HarnessError(f"{self.folder}: cannot be written ({error.strerror or error}).") from error
        text = io.StringIO()
        writer = csv.DictWriter(text, [column.name for column in fields(SweepRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        write_text(self.folder / f"{TABLE}.csv", text.getvalue())
        write_json(self.folder / f"{TABLE}.json", [asdict(row) for row in self.rows])
        return added

    def show(self) -> None:
        """Print the table of all."""
        console = make_console()
        console.print(_table(self.rows))
        if self.rows:  # none of a sweep that was stopped in its first job; a file may be an earlier sweep's
            print_fact(console, "written", f"{self.folder / TABLE}.csv, {TABLE}.json")


sweeps: list[Sweep] = []
"""Sweeps of this process, the newest last: a launcher begins one, and the command shows it when its sweeper ends."""


def placed(jobs: Sequence[SweepJob], folder: Path) -> list[SweepJob]:
    """Give each job the directory that it had when this sweep's folder was used before, and new ones their own.

    Directories are named by numbers, which another list of values shifts: a job is known by its overrides. Writes
    ``jobs.json``, the overrides of each directory, before the first job starts.

    Raises:
        HarnessError: the file is damaged, or cannot be written.
    """
    path = folder / _JOBS
    earlier = read_json(path, {"*": [str]}) if path.exists() else {}
    known = {tuple(overrides): directory for directory, overrides in earlier.items()}
    found, taken = [], set(earlier)
    for job in jobs:
        if any(override.startswith("run.dir=") for override in job.overrides):  # where the user says
            found.append(job)
            continue
        directory = known.get(job.overrides, str(job.run_dir))
        number = len(taken)
        while job.overrides not in known and directory in taken:
            directory, number = str(job.run_dir.with_name(str(number))), number + 1
        taken.add(directory)
        known[job.overrides] = directory
        found.append(replace(job, run_dir=Path(directory)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HarnessError(f"{folder}: cannot be written ({error.strerror or error}).") from error
    write_json(path, {**earlier, **{place: list(overrides) for overrides, place in known.items()}})
    return found


listed: list[list[str]] = []
"""The overrides of each job that ``--list`` has shown."""
submitted: list[dict[str, Any]] = []
"""What SLURM has been given: the number of each job, its overrides, its log."""


def _row(job: SweepJob, code: int) -> SweepRow:
    found: dict[str, Any] = {}
    try:
        if code == 0:
            found = score_of(job.run_dir) or {}
    except HarnessError:
        code = 1
    code = code if found or code else 1
    interval = (found.get("intervals") or {}).get("mIoU") or {}
    return SweepRow(
        job=job.number,
        overrides=" ".join(job.overrides),
        state="finished" if found else f"failed ({code})",
        mIoU=found.get("mIoU"),
        low=interval.get("low"),
        high=interval.get("high"),
        images=found.get("images"),
        warnings="; ".join(found.get("marks", ())),
        run=str(job.run_dir),
    )


def _table(rows: Sequence[SweepRow]) -> Table:
    table = Table(title="runs of this sweep", box=HORIZONTALS, pad_edge=False, title_justify="left")
    for name in ("job", "overrides", "mIoU", "interval", "images", "state"):
        table.add_column(name, justify="right" if name in ("job", "mIoU", "images") else "left", overflow="fold")
    for row in rows:
        interval = "" if row.low is None or row.high is None else f"{100 * row.low:.2f} to {100 * row.high:.2f}"
        score = "-" if row.mIoU is None else f"{100 * row.mIoU:.2f}"
        images = "" if row.images is None else f"{row.images:,}"
        table.add_row(str(row.job), Text(row.overrides), score, interval, images, Text(row.state))
    return table
