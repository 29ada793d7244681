"""The gate: whether what a recipe's section `promote` asks of a student has been shown.

A condition is a sum of figures that must not be below 0. It is judged by the percentile interval
of that sum, every figure of which is computed on the same draws of documents, or of a task's
examples: a paired comparison. It holds only if the whole interval does. Where no condition is true,
the chance that all hold is no more than that of any one of them, so no correction for their number
is needed (the intersection-union test; Berger, Technometrics 24(4), 1982).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

from flagscale.errors import UserError
from flagscale.evaluation.bootstrap import Estimate
from flagscale.evaluation.fidelity import TEACHER, Fidelity
from flagscale.evaluation.figures import AFTER, estimates
from flagscale.evaluation.tasks.estimates import task_estimates
from flagscale.evaluation.tasks.scores import TaskScores, figure_names
from flagscale.recipe.conditions import Condition


@dataclass(frozen=True)
class Judgement:
    """What became of a condition.

    Attributes:
        condition: its text.
        holds: whether the whole interval of the margin does.
        margin: value, low, high of what must not be below 0: by how much the condition holds.
        confidence: mass of the intervals.
        figures: each figure in it -> value, low, high.
    """

    condition: str
    holds: bool
    margin: dict[str, float]
    confidence: float
    figures: dict[str, dict[str, float]]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def judge(
    conditions: Sequence[Condition],
    metrics: Mapping[str, Any],
    fidelity: Fidelity,
    tasks: Sequence[TaskScores] = (),
) -> list[Judgement]:
    """Judge each condition by what was measured.

    Args:
        conditions: of a recipe.
        metrics: of the evaluation (metrics.json): its resamples, seed and confidence.
        fidelity: its sums per document.
        tasks: what the models scored on tasks, if they were asked.

    Raises:
        UserError: a figure was not measured, or has no values to be resampled.
    """
    samples, seed = metrics["bootstrap_samples"], metrics["seed"]
    of_models = estimates(fidelity, samples, seed)
    found = {
        f"{model}/{figure}": estimate
        for model in (TEACHER, AFTER)
        for figure, estimate in of_models[model].items()
    }
    for figure, models in task_estimates(tasks, samples, seed).items():
        found |= {f"{model}/{figure}": estimate for model, estimate in models.items()}
    for condition in conditions:
        for figure in condition.factors:
            if figure not in found:
                raise _unknown(condition, figure, found, tasks)
    return [_judge(condition, found, metrics["confidence"]) for condition in conditions]


def _judge(condition: Condition, found: Mapping[str, Estimate], usual: float) -> Judgement:
    confidence = condition.confidence or usual
    terms = [found[name].times(factor) for name, factor in condition.factors.items()]
    margin = reduce(operator.add, terms).plus(condition.constant).interval(confidence)
    return Judgement(
        condition=condition.text,
        holds=margin.low > 0 or (margin.low == 0 and not condition.strict),
        margin=asdict(margin),
        confidence=confidence,
        figures={name: asdict(found[name].interval(confidence)) for name in condition.factors},
    )


def _unknown(
    condition: Condition,
    figure: str,
    found: Mapping[str, Estimate],
    tasks: Sequence[TaskScores],
) -> UserError:
    model, _, name = figure.partition("/")
    what = f"promote.conditions: {condition.text!r}: {figure}"
    if name in figure_names(tasks):
        return UserError(
            f"{what}: is one figure of all examples together, which has no interval to judge by; "
            "name another metric of the task"
        )
    known = sorted(key for key in found if key.startswith(f"{model}/"))
    return UserError(f"{what}: was not measured; measured were {', '.join(known) or 'others'}")


def markdown(judgements: Sequence[Judgement], outcome: str) -> str:
    """The judgements as a table, below what came of them.

    Args:
        judgements: of `judge`.
        outcome: a sentence.
    """
    lines = [
        f"**{outcome}**",
        "",
        "| condition | holds | margin | figures |",
        "|---|---|---|---|",
    ]
    for one in judgements:
        figures = "<br>".join(f"{name} {_text(each)}" for name, each in one.figures.items())
        held = "yes" if one.holds else "**no**"
        lines.append(f"| `{one.condition}` | {held} | {_text(one.margin)} | {figures} |")
    lines += [
        "",
        "The margin is the better side minus the other, with its paired interval: a condition "
        "holds if none of the interval is below 0.",
    ]
    return "\n".join(lines) + "\n"


def _text(interval: Mapping[str, float]) -> str:
    value, low, high = (f"{interval[key]:.4g}" for key in ("value", "low", "high"))
    return value if low == high else f"{value} [{low}, {high}]"
