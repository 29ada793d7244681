"""A sweep's variants in MLflow: a child of the sweep's run each, to be compared and plotted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flagscale.tracking.step import step_run

VARIANT_TAG = "flagscale.variant"
WINNER_TAG = "flagscale.winner"
FAILED_TAG = "flagscale.failed"  # with the error


def log_variants(board: Mapping[str, Any]) -> None:
    """Add a finished child for each variant: what varies as parameters, its figures as metrics.

    Select them with `tags."flagscale.variant" != ""` for MLflow's table and parallel coordinates;
    the steps' runs, which have the curves, stay beside them.

    Args:
        board: the content of leaderboard.json.
    """
    for place, row in enumerate(board["rows"]):
        # A leaderboard that is tried again goes on in the same runs.
        training = f"leaderboard {row['digests']['evaluation']}"
        with step_run(row["name"], row["changes"], training) as run:
            run.set_tag(VARIANT_TAG, row["name"])
            if place == 0:
                run.set_tag(WINNER_TAG, "true")
            figures = {name: interval["value"] for name, interval in row["figures"].items()}
            sizes = {name: float(row[name]) for name in ("rank", "parameters", "tokens_per_second")}
            run.log_metrics(figures | sizes)
    for one in board.get("failed", ()):
        with step_run(one["name"], one["changes"], f"leaderboard {one['name']} failed") as run:
            run.set_tag(VARIANT_TAG, one["name"])
            run.set_tag(FAILED_TAG, one["error"])
