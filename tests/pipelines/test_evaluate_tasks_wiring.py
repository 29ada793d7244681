"""evaluate-tasks asks whatever is shipped: a run's student, a sweep's winner, a search's."""

from typing import Any

import pytest
from kfp.dsl.base_component import BaseComponent

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from flagscale.run_values import check_run
from pipelines import form
from pipelines.distillation import build_pipeline

TASKS = "tasks={names: [heldout_cloze]}"
PROMOTE = "promote={conditions: ['distilled/heldout_cloze >= 0.9 * teacher/heldout_cloze']}"
SWEEP = "sweep={vary: {distillation.temperature: [1.0, 2.0]}}"


def inputs_of(pipeline: BaseComponent, task: str) -> dict[str, tuple[str, str]]:
    """The artifacts of a task: input -> the task and output that they come from."""
    artifacts = pipeline.pipeline_spec.root.dag.tasks[task].inputs.artifacts
    return {
        name: (one.task_output_artifact.producer_task, one.task_output_artifact.output_artifact_key)
        for name, one in artifacts.items()
    }


@pytest.mark.parametrize(
    ("more", "shipped", "evaluation"),
    [
        ((), "export-student", ("evaluate", "evaluation")),
        ((SWEEP,), "export-winner", ("export-winner", "winners_evaluation")),
    ],
)
def test_it_asks_what_is_shipped_and_the_gate_reads_it(
    more: tuple[str, ...], shipped: str, evaluation: tuple[str, str]
) -> None:
    pipeline = build_pipeline(load_recipe("recipes/tiny.yaml", (TASKS, PROMOTE, *more)))

    assert inputs_of(pipeline, "evaluate-tasks") == {
        "teacher": ("prepare-teacher", "teacher"),
        "dataset": ("prepare-data", "dataset"),
        "evaluation": evaluation,
        "exported_student": (shipped, "exported_student"),
    }
    assert inputs_of(pipeline, "promote")["task_evaluation"] == (
        "evaluate-tasks",
        "task_evaluation",
    )


def test_a_searchs_winner_is_asked() -> None:
    pipeline = build_pipeline(load_recipe("recipes/tiny-search.yaml", (TASKS,)))
    found = inputs_of(pipeline, "evaluate-tasks")
    assert found["exported_student"] == ("export-student", "exported_student")


def test_without_tasks_there_is_no_such_step() -> None:
    pipeline = build_pipeline(load_recipe("recipes/tiny.yaml"))
    assert "evaluate-tasks" not in pipeline.pipeline_spec.root.dag.tasks


def values_of(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    parameters = {one.name: one.default for one in form.parameters(recipe, None, "1")}
    return {**parameters, **changes}


@pytest.mark.parametrize(
    ("overrides", "tasks", "said"),
    [
        ((), {"names": ["heldout_cloze"]}, "made without the step evaluate-tasks; leave them out"),
        ((TASKS,), {}, "made with the step evaluate-tasks; name one"),
    ],
)
def test_a_run_names_tasks_where_its_pipeline_has_the_step(
    overrides: tuple[str, ...], tasks: dict[str, Any], said: str
) -> None:
    recipe = load_recipe("recipes/tiny.yaml", overrides)
    made = form.made(recipe, None, list(values_of(recipe)))
    with pytest.raises(UserError, match=said):
        check_run(made, values_of(recipe, tasks=tasks))


@pytest.mark.parametrize("name", ["heldout_cloz", "arc_easy"])
def test_a_condition_on_a_task_that_is_not_asked_is_refused(name: str) -> None:
    asked = PROMOTE.replace("distilled/heldout_cloze", f"distilled/{name}")
    with pytest.raises(UserError, match=f"distilled/{name}: will not be measured"):
        load_recipe("recipes/tiny.yaml", (TASKS, asked))
