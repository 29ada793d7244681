"""Section `promote`: what a student must have shown before it becomes the champion.

A step of its own judges the conditions when everything is measured, and moves an alias of MLflow's
model registry where all of them hold.
"""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import AfterValidator, Field

from flagscale.recipe.conditions import Condition, parse_condition
from flagscale.recipe.results import EvaluationRecipe
from flagscale.recipe.section import Line, Section
from flagscale.recipe.tasks import HELDOUT_TASKS, TasksRecipe

CANDIDATE = "candidate"  # the alias that every exported student gets
TEACHER, STUDENT, DISTILLED = "teacher", "student", "distilled"
# What every evaluation has of every model; a test compares this with `flagscale.evaluation`.
FIGURES = (
    "kl",
    "top1_agreement",
    "lm_loss",
    "perplexity",
    "accuracy",
    "reverse_kl",
    "js_divergence",
    "top5_agreement",
)
_FEWEST_BEYOND = 5  # resamples on each side of an interval: fewer say nothing of where it ends


def _condition(text: str) -> str:
    parse_condition(text)
    return text


def _alias(name: str) -> str:
    """MLflow's own rules, and ours."""
    if name.lower() == "latest" or re.fullmatch(r"[vV]\d+", name):
        raise ValueError("is reserved by MLflow, for versions; choose another, e.g. champion")
    if name == CANDIDATE:
        raise ValueError("is the alias of whatever is exported; choose another, e.g. champion")
    return name


ConditionText = Annotated[Line, AfterValidator(_condition)]
Alias = Annotated[
    str,
    Field(pattern=r"^[A-Za-z0-9_-]+$", max_length=255, examples=["champion"]),
    AfterValidator(_alias),
]


class PromoteRecipe(Section):
    """What a student must have shown to be promoted."""

    conditions: Annotated[tuple[ConditionText, ...], Field(min_length=1, max_length=32)] = Field(
        description="Each like 'distilled/accuracy >= 0.97 * teacher/accuracy at 95%': it holds if "
        "the whole confidence interval does; all must hold"
    )
    alias: Alias = Field(
        "champion", description="Of MLflow's model registry: moved to the student that passes"
    )

    @property
    def parsed(self) -> tuple[Condition, ...]:
        """The conditions as data."""
        return tuple(parse_condition(text) for text in self.conditions)


def check_promotion(
    promote: PromoteRecipe, evaluation: EvaluationRecipe, tasks: TasksRecipe
) -> None:
    """Refuse conditions on figures that a run will not have, and intervals that it cannot tell.

    Args:
        promote: the recipe's section.
        evaluation: how many resamples there will be.
        tasks: what the student will be asked.

    Raises:
        ValueError: which condition, and the remedy.
    """
    for condition in promote.parsed:
        for figure in condition.factors:
            try:
                _check_figure(figure, tasks)
            except ValueError as error:
                raise ValueError(f"promote.conditions: {condition.text!r}: {error}") from None
        confidence = condition.confidence or evaluation.confidence
        needed = math.ceil(round(2 * _FEWEST_BEYOND / (1 - confidence), 6))
        if evaluation.bootstrap_samples < needed:
            raise ValueError(
                f"promote.conditions: {condition.text!r}: evaluation.bootstrap_samples="
                f"{evaluation.bootstrap_samples} are too few for intervals of "
                f"{100 * confidence:g}%; set it to {needed:,} or more"
            )


def _check_figure(figure: str, tasks: TasksRecipe) -> None:
    model, _, name = figure.partition("/")
    if model == STUDENT:
        raise ValueError(
            f"{figure}: student is the one before distillation; for what is shipped say "
            f"{DISTILLED}/{name}"
        )
    if model not in (TEACHER, DISTILLED):
        raise ValueError(f"{figure}: no model {model!r}; say {DISTILLED}/{name} or {TEACHER}/...")
    if name in FIGURES:
        return
    task, _, metric = name.partition(":")
    if not _is_asked(task, tasks):
        known = f"figures of an evaluation are {', '.join(FIGURES)}"
        asked = (
            f"tasks are {', '.join(tasks.all_names)}" if tasks.is_asked else "no tasks are named"
        )
        raise ValueError(f"{figure}: will not be measured: {known}; {asked}")
    metrics = HELDOUT_TASKS.get(task, ())
    if metrics and metric and metric not in metrics:
        raise ValueError(f"{figure}: no metric {metric!r} of {task}; it has {', '.join(metrics)}")


def _is_asked(task: str, tasks: TasksRecipe) -> bool:
    """Whether it is named, or may be one of a group's or a tag's, which lm-eval names after it."""
    return any(
        task == name or (name not in HELDOUT_TASKS and task.startswith(f"{name}_"))
        for name in tasks.all_names
    )
