"""record-run: the figures of all steps -> MLflow's runs of those that KFP's cache served."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from flagscale import tracking
from flagscale.execution.metrics_file import read_metrics

logger = logging.getLogger(__name__)

_DECIDES = ("leaderboard", "evaluate")  # whose figures pipeline runs are compared by


def record_run(metrics: Mapping[str, Sequence[Path]]) -> None:
    """Show the cached steps in MLflow, and end the KFP run's parent there.

    A step that ran has told MLflow itself. One whose figures another KFP run made gets a finished
    run with the parameters and figures of the original, and says which that is.

    Args:
        metrics: name of a step -> its files of figures, in a sweep one for each variant.
    """
    reports = [read_metrics(path, step) for step, paths in metrics.items() for path in paths]
    for report in reports:
        if not report.figures:
            logger.warning("%s: its figures are gone from the object store", report.step)
    deciding = next((r for step in _DECIDES for r in reports if r.step == step), None)
    tracking.record_run(reports, deciding.figures if deciding else {})
