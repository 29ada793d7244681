"""record-many: `record_run` for a sweep or a search, whose students are shown as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flagscale import tracking
from flagscale.artifacts import open_artifact, read_manifest
from flagscale.evaluation import LEADERBOARD, SEARCH
from flagscale.execution.metrics_file import read_metrics
from flagscale.steps.record_run import record_run
from flagscale.tracking.candidates import log_candidates
from flagscale.tracking.variants import log_variants


class _Ranking(NamedTuple):
    """What ranks students.

    Attributes:
        step: that does.
        board: the file of its artifact that has them.
        log: shows them in MLflow.
    """

    step: str
    board: str
    log: Callable[[Mapping[str, Any]], None]


_RANKINGS = {
    "leaderboard": _Ranking("leaderboard", LEADERBOARD, log_variants),
    "search": _Ranking("rank-candidates", SEARCH, log_candidates),
}  # by the artifact's kind


def record_many(
    metrics: Mapping[str, Sequence[Path]], ranking_metrics: Path, ranking: Path
) -> None:
    """Show the cached steps in MLflow, and the students if their ranking is one of them.

    Args:
        metrics: see `record_run`; of all steps but the ranking.
        ranking_metrics: its file of figures.
        ranking: the `leaderboard` artifact, or the `search` artifact of the last rung.

    Raises:
        UserError: the ranking is damaged.
    """
    kind = read_manifest(ranking).kind
    step, board, log = _RANKINGS[kind]
    if read_metrics(ranking_metrics, step).kfp_run_id != tracking.own_kfp_run():
        open_artifact(ranking, kind)
        log(json.loads((ranking / board).read_text(encoding="utf-8")))
    record_run({**metrics, step: [ranking_metrics]})
