"""record-search: `record_run` for a search, whose candidates are shown as well."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from flagscale import tracking
from flagscale.artifacts import open_artifact
from flagscale.evaluation import SEARCH
from flagscale.execution.metrics_file import read_metrics
from flagscale.steps.record_run import record_run
from flagscale.tracking.candidates import log_candidates


def record_search(metrics: Mapping[str, Sequence[Path]], search: Path) -> None:
    """Show the cached steps in MLflow, and the candidates if the last ranking is one of them.

    Args:
        metrics: see `record_run`.
        search: the `search` artifact of the last rung.

    Raises:
        UserError: it is damaged.
    """
    (ranked,) = metrics["rank-candidates"]
    if read_metrics(ranked, "rank-candidates").kfp_run_id != tracking.own_kfp_run():
        open_artifact(search, "search")
        log_candidates(json.loads((search / SEARCH).read_text(encoding="utf-8")))
    record_run(metrics)
