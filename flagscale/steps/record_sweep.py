"""record-sweep: `record_run` for a sweep, whose variants are shown as well."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flagscale import tracking
from flagscale.artifacts import open_artifact
from flagscale.evaluation import LEADERBOARD
from flagscale.execution.metrics_file import read_metrics
from flagscale.steps.record_run import record_run
from flagscale.tracking.variants import log_variants


def record_sweep(metrics: Mapping[str, Sequence[Path]], leaderboard: Path) -> None:
    """Show the cached steps in MLflow, and the variants if the leaderboard is one of them.

    Args:
        metrics: see `record_run`.
        leaderboard: the `leaderboard` artifact.

    Raises:
        UserError: the leaderboard is damaged.
    """
    (ranked,) = metrics["leaderboard"]
    if read_metrics(ranked, "leaderboard").kfp_run_id != tracking.own_kfp_run():
        open_artifact(leaderboard, "leaderboard")
        log_variants(json.loads((leaderboard / LEADERBOARD).read_text(encoding="utf-8")))
    record_run(metrics)
