"""What the files of a run directory hold, as far as anything is read from them.

Shapes of :mod:`ade_harness.files.documents`: whoever adds a field to a file, and reads it, adds it here.
"""

from __future__ import annotations

from ade_harness.files.documents import Between, Moment, OrNull

_TEXT_OR_NULL = (str, type(None))
_SCORES = ("mIoU", "mIoU_csail", "mIoU_detectron2", "pixel_accuracy", "mean_accuracy", "fwIoU", "final_score")
_COUNT = Between(0, 2**63)
_INTERVAL = {"low": float, "high": float, "level": float}

MANIFEST = {
    "schema": int,
    "status?": str,
    "kind?": str,
    "started?": str,
    "finished?": (str, bool),
    "command?": [str],
    "marks?": [str],
    "code?": {
        "version?": str, "commit?": str, "dirty?": bool, "built?": bool, "origin?": str, "diff_sha256?": str,
        "tree?": str, "src?": str,
    },
    "seeds?": {"*": int},
    "environment?": {
        "python?": str, "platform?": str, "cpu?": str, "gpus?": [str], "cuda?": str, "driver?": str,
        "packages?": {"*": _TEXT_OR_NULL}, "distributions?": {"*": {"version?": str, "sha256?": str}},
    },
    "device?": str,
    "kernels?": str,
    "kernels_reason?": str,
    "arithmetic?": {"*": (str, bool, int, float, type(None))},
    "model?": {
        "name?": str, "weights?": str, "origin?": (str, dict), "sha256?": str, "state_sha256?": str, "source?": str,
        "part?": str, "files?": {"*": str}, "random_keys?": [str], "unused_keys?": [str],
        "other_backbone?": str, "parameters?": int,
    },
    "dataset?": {
        "name?": str, "root?": str, "images?": int, "expected_images?": int, "ids_hash?": str, "content_hash?": str,
        "classes?": {"names": [str], "colors": [[int]]},
    },
    "repeat?": OrNull([str]),
    "identity": dict,
    "config_sha256?": str,
    "directory?": str,
    "signature?": str,
    "result_signature?": str,
    "ledger?": {"images?": int, "sha256?": str},
    "timings?": {
        "seconds?": float, "images_per_second?": float, "world_size?": int, "stages?": {"*": float},
        "balance?": float, "idle_seconds?": float,
        "ranks?": [{"rank": int, "host": str, "done": int, "busy_seconds": float, "active_seconds": float}],
    },
    "failures?": {"*": str},
    "changes?": [str],
    "earlier?": [dict],
}  # fmt: skip
FINISHED = {
    "started": Moment,
    "finished": Moment,
    "marks": list,
    "device": str,
    "kernels": str,
    "environment": {"python": str, "cpu": _TEXT_OR_NULL, "gpus": [str], "packages": dict},
    "seeds": dict,
    "command": list,
    "code": {"version": str, "commit": _TEXT_OR_NULL, "dirty": (bool, type(None))},
    "model": {"name": str},
    "dataset": {"name": str, "root": str, "expected_images": _COUNT, "images": _COUNT},
    "timings": {
        "seconds": float,
        "images_per_second": float,
        "world_size": int,
        "stages": dict,
        "ranks": list,
        "balance": float,
        "idle_seconds": float,
    },
}
"""What a manifest has besides once the run is finished."""
METRICS = {
    "model?": str, "dataset?": str, "protocol?": str, "protocol_changes?": [str], "precision?": str,
    "commit?": str,
    **dict.fromkeys(("checkpoint?", "checkpoint_part?", "checkpoint_sha256?"), _TEXT_OR_NULL),
    **dict.fromkeys(_SCORES, Between(0.0, 1.0)),
    "images?": _COUNT, "pixels?": _COUNT, "complete?": bool, "mean_dice?": OrNull(Between(0.0, 1.0)),
    "parameters?": OrNull(int), "flops?": OrNull(int), "flops_image?": OrNull([int]), "gpu_peak_bytes?": OrNull(int),
    "intervals": {"*": (dict, type(None)), **{f"{name}?": OrNull(_INTERVAL) for name in _SCORES}},
    "other_intervals": {"*": {f"{name}?": OrNull(_INTERVAL) for name in _SCORES}},
    "convention": str, "notes": [str],
    "published?": OrNull({"mIoU": float, "protocol": str, "source": str}),
    "reproduced?": OrNull({"sentence": str}),
}  # fmt: skip
CONFIG = {
    "model": {
        "name": str, "label": _TEXT_OR_NULL, "kind": str, "http?": dict,
        **{f"{key}?": _TEXT_OR_NULL for key in ("_target_", "path", "id", "url", "checkpoint", "backbone_checkpoint")},
    },
    "dataset": {"kind?": str, "split?": str, "root?": str},
    "inference": {"name": str, "precision?": str, "source?": str, "exif": bool},
    "metrics": {
        "resamples": Between(0, 1_000_000), "seed": Between(0, 2**63 - 1), "level": Between(0.0, 1.0),
        "calibration?": bool,
    },
    "run?": dict,
    "runtime?": dict,
    "tracking?": dict,
}  # fmt: skip
PROGRESS = {
    "done": int, "images": int, "images_per_second": float, "seconds_left?": float, "updated": str, "warnings": [str],
    "ranks": [{"rank": int, "host": str, "done": int, "images_per_second": float, "item": str}],
}  # fmt: skip
