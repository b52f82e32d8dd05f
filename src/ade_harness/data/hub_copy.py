"""The hub's copy of the 150-class set, in Parquet, written out in the official layout.

For when the official host is down. Its rows hold the files' own bytes, so what is written is checked against the
packaged list of names and sizes as the official archive is (:mod:`ade_harness.data.verify`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ade_harness.errors import HarnessError
from ade_harness.files.atomic import replaced
from ade_harness.files.hub import hub_explained

REPOSITORY = "zhoubolei/scene_parse_150"
"""The authors' own on the hub."""
_REVISIONS = ("main", "refs/convert/parquet")
"""Where a data set's Parquet files are: its own, or those that the hub made of it."""
_PREFIX = {"validation": "ADE_val", "training": "ADE_train"}
_WORD = {
    "validation": re.compile(r"(^|[/_-])val(idation)?[-_./]"),
    "training": re.compile(r"(^|[/_-])train(ing)?[-_./]"),
}
_COLUMNS = ("image", "annotation")
_ADVICE = "The official archive is the other source: `data download` without --source."


def write_copy(
    folder: Path,
    split: str = "validation",
    repository: str = REPOSITORY,
    on_pair: Callable[[int, int], None] | None = None,
) -> Path:
    """Fetch the hub's Parquet files of a split, and write their images and annotations.

    Files of the hub go to its cache, resumed after an interruption; pairs that are there already are not written again.

    Args:
        folder: ``ADEChallengeData2016`` is made in it.
        split: "validation" or "training".
        repository: of the hub.
        on_pair: called with (done, total).

    Returns:
        ``ADEChallengeData2016``.

    Raises:
        HarnessError: the hub cannot be reached, has no such files, or they hold something else.
    """
    import pyarrow
    import pyarrow.parquet

    root = folder / "ADEChallengeData2016"
    files = list(_fetched(repository, split))
    done = 0
    try:
        opened = [pyarrow.parquet.ParquetFile(file) for file in files]
        total = sum(file.metadata.num_rows for file in opened)
        for file, parquet in zip(files, opened, strict=True):
            missing = [name for name in _COLUMNS if name not in parquet.schema_arrow.names]
            if missing:
                raise HarnessError(
                    f"{repository}: {file.name} has no column {' or '.join(missing)}, only"
                    f" {', '.join(parquet.schema_arrow.names[:8])}. Expected the scene parsing set of 150"
                    f" classes. {_ADVICE}"
                )
            for batch in parquet.iter_batches(batch_size=16, columns=list(_COLUMNS)):
                for row in batch.to_pylist():
                    done += 1
                    _write(root, split, done, row, repository)
                    if on_pair is not None:
                        on_pair(done, total)
    except (pyarrow.ArrowException, OSError) as error:
        raise HarnessError(
            f"{repository}: its Parquet files cannot be read ({str(error).splitlines()[0]}). Delete them"
            " from the hub's cache and fetch them again."
        ) from error
    return root


def _write(root: Path, split: str, number: int, row: dict[str, Any], repository: str) -> None:
    """Write one pair under the name that its row carries, else by its number: the official files are in order."""
    carried = Path(str((row["image"] or {}).get("path") or "")).stem
    name = carried if re.fullmatch(rf"{_PREFIX[split]}_\d{{8}}", carried) else f"{_PREFIX[split]}_{number:08d}"
    for column, kind, suffix in (("image", "images", ".jpg"), ("annotation", "annotations", ".png")):
        content = (row[column] or {}).get("bytes")
        if not content:
            raise HarnessError(f"{repository}: row {number} has no bytes of its {column}. {_ADVICE}")
        path = root / kind / split / f"{name}{suffix}"
        if path.is_file() and path.stat().st_size == len(content):
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise HarnessError(f"{path.parent}: cannot be made ({error.strerror or error}).") from error
        with replaced(path, durable=False) as unfinished:
            unfinished.write_bytes(content)


def _fetched(repository: str, split: str) -> Iterator[Path]:
    """Fetch the Parquet files of a split, in order."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    found: list[str] = []
    seen: list[str] = []
    for revision in _REVISIONS:
        with hub_explained(repository, _ADVICE), suppress(RevisionNotFoundError):
            names = HfApi().list_repo_files(repository, revision=revision, repo_type="dataset")
            seen += names
            found = sorted(n for n in names if n.endswith(".parquet") and _WORD[split].search(n))
        if found:
            break
    for name in found:
        with hub_explained(f"{repository}/{name}", _ADVICE):
            yield Path(hf_hub_download(repository, name, revision=revision, repo_type="dataset"))
    if not found:
        shown = ", ".join(seen[:5]) or "no files"
        raise HarnessError(f"{repository}: has no Parquet files of the {split} split, only {shown}. {_ADVICE}")
