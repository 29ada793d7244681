"""What was found of tasks and of generation as single figures, `<model>/<name>`, for UIs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from flagscale.evaluation.generation.speed import Speed
from flagscale.evaluation.tasks.scores import TaskScores, figure_names


def score_figures(
    found: Sequence[TaskScores], tasks: Collection[str] | None = None
) -> dict[str, float]:
    """lm-eval's own values.

    Args:
        found: the scores.
        tasks: only those of these tasks and groups; None: all.
    """
    return {
        f"{model}/{figure}": value
        for score, figure in zip(found, figure_names(found), strict=True)
        for model, (value, _) in score.reported.items()
        if tasks is None or score.task in tasks
    }


def speed_figures(speeds: Mapping[str, Sequence[Speed]]) -> dict[str, float]:
    """Of the last engine, which is the fastest; memory is the first one's, which takes no more."""
    figures: dict[str, float] = {}
    for model, row in speeds.items():
        figures |= {
            f"{model}/prefill_tokens_per_second": row[-1].prefill_tokens_per_second,
            f"{model}/decode_tokens_per_second": row[-1].decode_tokens_per_second,
            f"{model}/generation_peak_memory": float(row[0].peak_memory or 0),
        }
    return figures
