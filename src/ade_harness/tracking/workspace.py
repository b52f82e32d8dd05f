"""A saved view in W&B with the columns and panels by which evaluations are compared."""

from __future__ import annotations

from typing import Any

from ade_harness.errors import HarnessError
from ade_harness.tracking.upload import has_key, limits

COLUMNS = (
    "summary:mIoU",
    "summary:pixel_accuracy",
    "summary:mean_accuracy",
    "summary:fwIoU",
    "summary:final_score",
    "config:model.value.name",
    "config:inference.value.name",
    "config:dataset.value.name",
    "summary:images",
    "summary:complete",
    "summary:marks",
    "summary:images_per_second",
    "summary:world_size",
    "config:inference.value.precision",
    "config:model.value.published.mIoU",
    "config:provenance.value.code.commit",
    "config:provenance.value.model.sha256",
)
"""In this order, left to right. W&B keeps a nested configuration under ``value`` of its first key."""


def save_view(entity: str, project: str, name: str) -> str:
    """Save a view of finished evaluations, best first; returns its address.

    Each call makes a new view: views that somebody has changed by hand stay as they are.

    Args:
        entity: user or team.
        project: of the runs.
        name: of the view.

    Raises:
        HarnessError: wandb-workspaces is not installed, there is no key, or W&B does not answer or refuses.
    """
    if not has_key():
        raise HarnessError("No key of W&B: set WANDB_API_KEY or run `wandb login`.")
    with limits():
        try:
            view = make_view(entity, project, name)
            view.save()
            return str(view.url)
        except HarnessError:
            raise
        except Exception as error:  # of several packages, without a common type
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise HarnessError(f"{entity}/{project}: W&B did not save the view ({reason}).") from error


def make_view(entity: str, project: str, name: str) -> Any:
    """Return the view, not yet saved.

    Raises:
        HarnessError: wandb-workspaces is not installed.
    """
    try:
        from wandb_workspaces import expr, workspaces
        from wandb_workspaces.reports import v2
    except ImportError as error:
        raise HarnessError("Saved views need wandb-workspaces: pip install 'ade-harness[wandb]'.") from error
    scores = [v2.BarPlot(title=score, metrics=[score], max_bars_to_show=30) for score in ("mIoU", "pixel_accuracy")]
    speed = v2.ScatterPlot(
        title="mIoU and speed", x=v2.SummaryMetric("images_per_second"), y=v2.SummaryMetric("mIoU"), log_x=True
    )
    sections = [
        workspaces.Section(name="Scores", panels=[*scores, speed], is_open=True, pinned=True),
        workspaces.Section(name="What differs", panels=[v2.RunComparer(diff_only="split")], is_open=True),
        workspaces.Section(
            name="Classes, images, confusion",
            panels=[
                v2.WeavePanelSummaryTable(table_name="per_class"),
                v2.WeavePanelSummaryTable(table_name="per_image"),
                v2.MediaBrowser(media_keys=["confusion_matrix"], num_columns=2),
            ],
        ),
    ]
    runs = workspaces.RunsetSettings(
        filters=[expr.Metric("JobType") == "evaluate"],
        order=[expr.Ordering(expr.Summary("mIoU"), ascending=False)],
        pinned_columns=list(COLUMNS),
    )
    return workspaces.Workspace(entity=entity, project=project, name=name, sections=sections, runset_settings=runs)
