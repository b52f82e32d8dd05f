"""The final table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ade_harness.files.escapes import one_line
from ade_harness.runs.result import BESIDE, Result, per_class_rows
from ade_harness.runtime.balance import Balance
from ade_harness.runtime.console import percent, print_fact
from ade_harness.runtime.progress_bar import format_seconds

_ROWS = (
    ("mIoU", "mIoU"),
    ("pixel_accuracy", "pixel accuracy"),
    ("mean_accuracy", "mean accuracy"),
    ("fwIoU", "frequency-weighted IoU"),
    ("final_score", "final score"),
)
_CLASSES_SHOWN = 5


def print_result(console: Console, result: Result) -> None:
    """Print marks, scores beside the published one, worst and best classes, and where everything is."""
    for mark in result.marks:
        console.print(Text(f" {one_line(mark)} ", style="bold black on yellow"))
    title = f"{result.label} on {result.dataset}, {result.images:,} of {result.expected_images:,} images"
    console.print(
        Panel(Group(_scores(result), _remarks(result), "", _classes(result)), title=Text(title), expand=False)
    )
    for note in result.notes:
        console.print(Text(f"Note: {one_line(note)}.", style="yellow"))
    ranks = "1 rank" if result.world_size == 1 else f"{result.world_size} ranks"
    speed = f"{result.images_per_second:.1f} images/s while evaluating"
    if not result.images_per_second:
        speed = "all images were already evaluated"  # a run that was finished, and is resumed
    changed = result.origin.get("protocol_changes")
    lines = [
        *([("weights", found)] if (found := _weights(result.origin)) else []),
        *([("protocol", f"{result.origin['protocol']}, changed: {', '.join(changed)}")] if changed else []),
        ("time", f"{format_seconds(result.seconds)} on {ranks}; {speed}"),
        *([("balance", _balance(result.balance))] if result.world_size > 1 else []),
        *([("time breakdown", _stages(result.stage_shares))] if result.stage_shares else []),
        ("run directory", str(result.run_dir)),
    ]
    for name, value in lines:
        print_fact(console, name, value)


def _weights(origin: Mapping[str, Any]) -> str:
    """Say which file was evaluated, which part of it, and its hash; nothing where there are no weights."""
    digest = origin["checkpoint_sha256"]
    details = [origin["checkpoint_part"], f"sha256 {digest[:12]}..." if digest else None]
    written = ", ".join(str(detail) for detail in details if detail)
    return str(origin["checkpoint"] or "") + (f" ({written})" if written else "")


def _balance(balance: Balance) -> str:
    fastest = max(balance.shares, key=lambda share: share.done)
    slowest = min(balance.shares, key=lambda share: share.done)
    images = f"{fastest.done} image{'' if fastest.done == 1 else 's'}"
    did = f"rank {fastest.rank} did {images}, rank {slowest.rank} {slowest.done}"
    if fastest.done == slowest.done:
        did = f"each did {images}"
    return f"{balance.efficiency:.1%}, a rank was idle for {balance.idle_seconds:.1f} s on average; {did}"


def _stages(shares: Mapping[str, float]) -> str:
    shown = {name: f"{share:.0%}" for name, share in shares.items() if name not in BESIDE}
    own = ", ".join(f"{_SHOWN.get(name, name)} {share}" for name, share in shown.items() if share != "0%")
    return f"{own}; in parallel: loaders {shares.get('decode', 0):.0%}, recorder {shares.get('ledger', 0):.0%}"


_SHOWN = {
    "wait": "data loading", "copy": "host-to-device", "labels": "post-processing", "counts": "metric",
}  # fmt: skip
"""What stages are called, whose names in files are shorter."""


def _scores(result: Result) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("percent")
    table.add_column("measured", justify="right", style="bold")
    published, intervals = result.published, result.intervals
    level = next((i.level for i in intervals.values() if i), None)
    if level:
        table.add_column(f"{level:.0%} interval", justify="right")
    if published:
        table.add_column("published by others", justify="right", style="dim")
    values = result.scores.as_dict()
    for key, name in _ROWS:
        cells = [name, percent(values[key])]
        if level:
            interval = intervals[key]
            cells.append(f"{percent(interval.low)} to {percent(interval.high)}" if interval else "-")
        if published:
            cells.append(f"{published.mIoU:.2f}" if key == "mIoU" else "")
        table.add_row(*cells)
    return table


def _remarks(result: Result) -> Text:
    """Say what mIoU means here."""
    scores, published = result.scores, result.published
    lines = [f"{result.pixels:,} pixels; mIoU is the mean over classes in the ground truth or the prediction (mmseg)"]
    if len({scores.mIoU, scores.mIoU_csail, scores.mIoU_detectron2}) > 1:
        lines += [
            "some classes are absent from these images, so conventions differ:"
            f" CSAIL {percent(scores.mIoU_csail)} (absent = 0),"
            f" detectron2 {percent(scores.mIoU_detectron2)} (classes in the ground truth)"
        ]
    if any(result.intervals.values()):
        lines += ["interval: bootstrap over images"]
    if result.calibration:
        lines += [f"expected calibration error {percent(result.calibration.ece)}"]
    if published:
        lines += [f"published: {published.protocol}, on all 2,000 images ({published.source})"]
    if result.verdict:
        lines += [result.verdict.sentence]
    return Text("\n".join(lines), style="dim")


def _classes(result: Result) -> Table:
    rows = [r for r in per_class_rows(result.matrix, result.classes) if r["ground_truth_pixels"]]
    rows.sort(key=lambda r: (-r["IoU"], r["class"]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("best classes")
    table.add_column("IoU", justify="right")
    table.add_column("   worst classes")
    table.add_column("IoU", justify="right")
    for good, bad in zip(rows[:_CLASSES_SHOWN], rows[::-1][:_CLASSES_SHOWN], strict=True):
        table.add_row(good["name"], percent(good["IoU"]), f"   {bad['name']}", percent(bad["IoU"]))
    return table
