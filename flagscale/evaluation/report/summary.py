"""The report in Markdown, for a pipeline's UI: the verdict and the headline figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flagscale.evaluation.figures import AFTER, DETAILS, LABELS, SHOWN
from flagscale.evaluation.pages.markdown import escaped, table
from flagscale.evaluation.report.data import ReportData
from flagscale.evaluation.report.verdict import verdict
from flagscale.evaluation.tasks.scores import TaskScores
from flagscale.evaluation.tasks.table import task_rows


def summary_markdown(data: ReportData, tasks: Sequence[TaskScores] = ()) -> str:
    """The verdict, the tasks and the figures with their intervals.

    Args:
        data: of the evaluation.
        tasks: what the models scored on tasks.
    """
    metrics = data.metrics
    found = metrics["models"]
    rows = [
        [shown.label, *(_cell(key, shown, found[model]) for model in LABELS)]
        for key, shown in {**SHOWN, **DETAILS}.items()
        if key in found[AFTER]
    ]
    parts = [f"**{escaped(verdict(data, tasks))}.**"]
    if tasks:
        asked = task_rows(tasks)
        models = [model for model in LABELS if any(model in row.reported for row in asked)]
        scores = [[row.name, *(row.text(model) for model in models)] for row in asked]
        parts.append(table(["Task", *(LABELS[model] for model in models)], scores))
    parts.append(table(["", *LABELS.values()], rows))
    parts.append(
        f"{metrics['documents']:,} held-out documents, {metrics['tokens']:,} tokens; "
        f"{100 * metrics['confidence']:g}% intervals, bootstrapped over documents."
    )
    return "\n\n".join(parts) + "\n"


def _cell(key: str, shown: Any, figures: Any) -> str:  # noqa: ANN401
    if key not in figures:
        return ""
    value, low, high = (shown.text(figures[key][x]) for x in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"
