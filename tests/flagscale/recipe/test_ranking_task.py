"""A task that ranks the candidates of a search."""

from __future__ import annotations

from pathlib import Path

import pytest

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from flagscale.recipe.search import ranking_metrics, ranking_tasks
from flagscale.recipe.tasks import TasksRecipe

OWN = "{task: mine, dataset_path: json, output_type: multiple_choice}"


def searched(*changes: str) -> Recipe:
    return load_recipe(Path("recipes/tiny-search.yaml"), [*changes])


def test_a_loss_asks_nothing() -> None:
    recipe = searched("tasks.names=[heldout_cloze]")
    assert recipe.search is not None
    assert recipe.search.task is None
    assert ranking_metrics(recipe.search) == ("distillation_loss", "lm_loss")
    assert ranking_tasks(recipe.search, recipe.tasks) == TasksRecipe()


def test_the_task_that_ranks_is_asked_as_the_recipe_asks_it_and_no_other() -> None:
    metric = "search.metric=heldout_multiple_choice:acc_norm"
    recipe = searched(metric, "tasks.names=[heldout_cloze, heldout_multiple_choice]",
                      "tasks.limit=50")  # fmt: skip
    assert recipe.search is not None
    asked = ranking_tasks(recipe.search, recipe.tasks)
    assert (asked.names, asked.limit) == (("heldout_multiple_choice",), 50)
    assert ranking_metrics(recipe.search)[2:] == ("heldout_multiple_choice:acc_norm",)


def test_a_task_of_ones_own_may_rank() -> None:
    recipe = searched("search.metric=mine", f"tasks.own=['{OWN}']", "tasks.names=[heldout_cloze]")
    assert recipe.search is not None
    asked = ranking_tasks(recipe.search, recipe.tasks)
    assert (asked.names, asked.own) == ((), (OWN,))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["search.metric=arc_easy"], "or a task of tasks.names or tasks.own"),
        (["search.metric=heldout_cloze:f1"], "its metrics are acc, perplexity"),
        (["search.metric=heldout_cloze:perplexity"], "no value for each example to rank by"),
        (
            ["search.metric=heldout_cloze", "training.parallelism.context_parallel_size=2"],
            "a task is asked on the training's ranks",
        ),
    ],
)
def test_what_cannot_rank_is_refused(changes: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        searched("tasks.names=[heldout_cloze]", *changes)
