"""What a search costs by its candidates' plans, added up by hand."""

from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.recipe import load_recipe
from pipelines.planning import fitted, plans
from pipelines.platform import load_platform
from pipelines.search_budget import search_cost

RECIPE = Path(__file__).parents[2] / "recipes" / "search-smollm2.yaml"


def test_a_search_costs_its_rungs_and_the_winners_training() -> None:
    recipe, platform = load_recipe(RECIPE), load_platform("gke-h100")
    found = plans(recipe, platform)
    cost = search_cost(recipe, [plan.steps for plan in found])
    assert cost.slots == (8, 4, 2)
    assert cost.tokens == (8 * 8 + 4 * 8 + 2 * 14 + 30) * 256
    hours = {step.step: step.gpu_hours for step in found[0].steps}
    step = hours.pop("distil-student") / 60  # the candidates are of one size
    del hours["convert-student"]  # some are fitted, others are not
    made = [step for plan in found for step in plan.steps if step.step == "convert-student"]
    expected = (
        sum(hours.values())
        + sum(step.gpu_hours or 0.0 for step in made)
        + (8 * 8 + 4 * 8 + 2 * 14 + 30) * step
    )
    assert cost.gpu_hours == pytest.approx(expected)


def test_layers_are_measured_once_in_the_plan_as_in_the_run() -> None:
    """The step costs what candidates alone would spend on it, each criterion once."""
    recipe, platform = load_recipe(RECIPE), load_platform("gke-h100")
    found = plans(recipe, platform)
    once = {step.flops for plan in found for step in plan.steps if step.step == "measure-layers"}
    alone: dict[str, float] = {}
    for variant, plan in zip(recipe.variants, found, strict=True):
        (by_itself,) = plans(variant.recipe, platform)
        spent, spent_alone = (
            next(step.flops for step in one.steps if step.step == "convert-student")
            for one in (plan, by_itself)
        )
        student = variant.recipe.student
        assert (spent_alone > spent) == student.measures_layers
        if student.measures_layers:
            alone[student.layer_importance] = spent_alone - spent
    assert set(alone) == {"kl", "block_influence"}
    (flops,) = once
    assert flops == pytest.approx(sum(alone.values()))


def test_a_budget_that_does_not_do_is_refused_and_one_that_cannot_be_compared_too() -> None:
    gpus, cpus = load_platform("gke-h100"), load_platform("cpu-only")
    recipe = load_recipe(RECIPE)
    cost = search_cost(recipe, [plan.steps for plan in plans(recipe, gpus)]).gpu_hours
    assert cost is not None
    fitted(load_recipe(RECIPE, [f"search.budget_gpu_hours={cost * 1.01}"]), gpus)
    little = load_recipe(RECIPE, [f"search.budget_gpu_hours={cost * 0.5}"])
    with pytest.raises(UserError, match=r"but the plan is .* for rungs of \[8, 4, 2\] candidates"):
        fitted(little, gpus)
    with pytest.raises(UserError, match="no accelerators here"):
        fitted(little, cpus)
