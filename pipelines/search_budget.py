"""What a search costs by the plan of its candidates, and whether that is within its budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flagscale.errors import UserError
from flagscale.recipe import Recipe
from flagscale.sizes.steps import StepPlan

_OF_EACH = ("convert-student",)


@dataclass(frozen=True)
class SearchCost:
    """All steps of a search, at most: the dearest candidates go on.

    Attributes:
        tokens: that are trained on.
        gpu_hours: of accelerators; None where there are none, or their speed is not known.
        slots: candidates of each rung.
    """

    tokens: int
    gpu_hours: float | None
    slots: tuple[int, ...]

    def __str__(self) -> str:
        hours = "" if self.gpu_hours is None else f", {self.gpu_hours:.2f} GPU hours"
        rungs = ", ".join(map(str, self.slots))
        return (
            f"search: rungs of {rungs} candidates at most, {self.tokens:,} tokens in all{hours}; a "
            "candidate's plan is that of its training to the end"
        )


def search_cost(recipe: Recipe, plans: Sequence[Sequence[StepPlan]]) -> SearchCost:
    """What a search costs at most.

    Args:
        recipe: with a search.
        plans: the steps of each of its candidates, as they are planned.
    """
    search, training = recipe.search, recipe.training
    assert search is not None, "who calls looks"
    slots = search.slots_of(search.count)
    steps = search.steps_of(search.count, training.train_iters)
    tokens = steps * training.global_batch_size * recipe.data.seq_length
    trainings, others = [], 0.0
    for number, plan in enumerate(plans):
        for step in plan:
            if step.gpu_hours is None or not step.machine.accelerators:
                return SearchCost(tokens, None, slots)
            if step.step == "distil-student":
                trainings.append(step.gpu_hours / training.train_iters)
            elif step.step in _OF_EACH or number == 0:
                others += step.gpu_hours
    dearest = sorted(trainings, reverse=True)
    hours, before = others, 0
    for count, rung in zip(slots, search.rungs, strict=True):
        hours += sum(dearest[:count]) * (rung.end - before)
        before = rung.end
    return SearchCost(tokens, hours + dearest[0] * (training.train_iters - before), slots)


def check_budget(recipe: Recipe, plans: Sequence[Sequence[StepPlan]]) -> None:
    """Refuse a search that its budget of GPU hours would not do for.

    Args:
        recipe: with a search or without.
        plans: the steps of each of its trainings, as they are planned.

    Raises:
        UserError: both numbers, or that there is no estimate to compare with.
    """
    if recipe.search is None or recipe.search.budget_gpu_hours is None:
        return
    budget, cost = recipe.search.budget_gpu_hours, search_cost(recipe, plans)
    if cost.gpu_hours is None:
        raise UserError(
            f"search.budget_gpu_hours={budget:g}: there are no accelerators here, or nothing is "
            "known of their speed; give search.budget_tokens instead"
        )
    if cost.gpu_hours > budget:
        raise UserError(
            f"search.budget_gpu_hours={budget:g}, but the plan is {cost.gpu_hours:.2f} GPU hours "
            f"for rungs of {list(cost.slots)} candidates; lower search.rungs' steps or keep, or "
            "have fewer candidates"
        )
