"""When trainings read what the teacher was asked once, and what a pipeline that does so has."""

from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import MetRecipe, Recipe, load_recipe
from flagscale.run_values import MET, check_run
from pipelines import form
from pipelines.distillation import build_pipeline
from pipelines.plan_text import as_text
from pipelines.planning import fitted, plans
from pipelines.platform import load_platform

RECIPE = Path("recipes/smollm2-135m-to-22-layers.yaml")
FOUR = "sweep.vary={distillation.temperature: [1, 2, 3, 4]}"
RATES = "sweep.vary={training.lr: [1e-4, 2e-4, 3e-4, 4e-4]}"
CACHED = "distillation.teacher_outputs=cached"
SAMPLED = "teacher_outputs.codec=sampled"
PAIRS = "distillation.attention_layer_pairs=[[3, 5]]"
MANY = "training.train_iters=200000"  # or a step's start is all that there is


def recipe(*overrides: str) -> Recipe:
    return load_recipe(RECIPE, overrides)


@pytest.mark.parametrize(
    ("overrides", "reads", "why"),
    [
        ([MANY], (), "1 training would ask the teacher for"),
        # An H100 makes the hidden states of so small a teacher faster than a volume has them.
        ([MANY, FOUR], (None,), "4 trainings would ask the teacher for"),
        ([MANY, RATES, SAMPLED], (None, "gke-h100"), "4 trainings would ask the teacher for"),
        ([FOUR, MANY, SAMPLED], (), "serves one of them"),
        ([FOUR, MANY, PAIRS], (), "have none of the teacher's inner layers"),
        ([FOUR, MANY, "distillation.teacher_outputs=live"], (), "says so"),
        ([CACHED], (None, "gke-h100"), "says so"),
        (["distillation.loss=none"], (), "no training asks the teacher"),
        (["sweep.vary={distillation.loss: [logits, none]}", MANY], (), "1 training would"),
    ],
)
@pytest.mark.parametrize("platform", [None, "gke-h100"])
def test_what_auto_comes_to(
    overrides: list[str], reads: tuple[str | None, ...], why: str, platform: str | None
) -> None:
    found = plans(recipe(*overrides), platform and load_platform(platform))
    cached = platform in reads
    assert {plan.choice.cached for plan in found} == {cached}
    assert why in found[0].choice.why
    for plan in found:
        names = [step.step for step in plan.steps]
        assert ("cache-teacher" in names) is cached
        assert f"teacher outputs {'cached' if cached else 'live'}: " in as_text(plan, "here")


def test_the_decision_is_in_the_recipe_that_is_run() -> None:
    decided, note = fitted(recipe(MANY, FOUR), None)
    assert note.startswith("note: distillation.teacher_outputs=auto: cached: 4 trainings")
    assert {one.distillation.teacher_outputs for one in decided.trainings} == {"cached"}
    decided, note = fitted(recipe(MANY), None)
    assert (decided.distillation.teacher_outputs, note) == ("live", "")


def test_a_training_without_its_teacher_needs_less() -> None:
    (live,), (cached,) = plans(recipe(MANY), None), plans(recipe(MANY, CACHED), None)
    before, after = (
        next(step for step in plan.steps if step.step == "distil-student")
        for plan in (live, cached)
    )
    # The teacher's table stays: its output layer makes the logits of hidden states.
    table = 4 * 49152 * 576
    assert before.rank["teacher"] - after.rank["teacher"] == 4 * 134_515_008 - table
    assert after.flops < 0.75 * before.flops


def made(one: Recipe) -> Any:
    return form.made(one, None, [p.name for p in form.parameters(one, None, "1")])


def values(one: Recipe, **changed: Any) -> dict[str, Any]:
    return {p.name: p.default for p in form.parameters(one, None, "1")} | changed


def test_what_trainings_meet() -> None:
    one = recipe(CACHED, "training.global_batch_size=4")
    training, met = one.training, check_run(made(one), values(one))[MET]
    assert met == MetRecipe(
        train=((training.seed, training.train_iters * 4),), validation=training.eval_iters * 4
    ).model_dump(mode="json")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"teacher_outputs": "live"}, "live"),
        ({"loss": "none"}, "live"),
        ({"attention_layer_pairs": [[3, 5]]}, "live"),
        ({}, "cached"),
        ({"temperature": 2.0}, "cached"),
    ],
)
def test_a_run_of_a_pipeline_that_asks_once_may_be_without(
    section: dict[str, Any], expected: str
) -> None:
    """Then cache-teacher is asked for nothing; what the plan decides goes by the pipeline."""
    one = recipe(CACHED)
    found = check_run(made(one), values(one, distillation=section))
    assert found["distillation"]["teacher_outputs"] == expected
    assert MetRecipe.model_validate(found[MET]).is_empty is (expected == "live")


def test_a_pipeline_without_the_step_cannot_read() -> None:
    one = recipe()
    with pytest.raises(UserError, match="was made without the step cache-teacher"):
        check_run(made(one), values(one, distillation={"teacher_outputs": "cached"}))


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        ([PAIRS, CACHED], "none of the teacher's inner layers"),
        (["sweep.vary={training.reset_attention_mask: [true, false]}", CACHED], "serves one of"),
        ([FOUR, SAMPLED, CACHED], "distillation.temperature=.*codec: hidden, or"),
        ([SAMPLED, CACHED, "distillation.divergence=reverse_kl"], "serve forward_kl alone"),
    ],
)
def test_refused_when_the_recipe_is_read(overrides: list[str], refused: str) -> None:
    with pytest.raises(UserError, match=refused):
        recipe(*overrides)


@pytest.mark.parametrize("platform", [None, "gke-h100"])
@pytest.mark.parametrize("sweep", [[], [FOUR]])
def test_the_step_is_there_where_it_is_needed(platform: str | None, sweep: list[str]) -> None:
    where = platform and load_platform(platform)
    for overrides, there in ((sweep, False), ([*sweep, CACHED], True)):
        spec = build_pipeline(recipe(*overrides), where).pipeline_spec
        tasks = dict(spec.root.dag.tasks)
        assert ("cache-teacher" in tasks) is there
        for component in spec.components.values():
            tasks |= {**component.dag.tasks}
        read = tasks["distil-student"].inputs.artifacts
        assert ("teacher_outputs" in read) is there
        recorder = tasks.get("record-run") or tasks.get("record-many")
        if recorder:
            assert ("outputs_metrics" in recorder.inputs.artifacts) is there
