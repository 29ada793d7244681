"""The sweep: one teacher and one dataset, many students, a leaderboard, the best one exported.

    check-recipe
    prepare-data, prepare-teacher, and where teacher outputs are read cache-teacher
    measure-layers where several students measure which of the teacher's layers can go
    for each variant, at most `sweep.parallelism` at a time:
        convert-student, distil-student, evaluate
    leaderboard, export-winner, evaluate-tasks where tasks are named, promote where the recipe says
    what a student must show

A recipe with the section `sweep` gives it; `run`, `compile`, `submit` and `schedule` take such a
recipe like any other. The variants are the parameter `sweep_variants`: a list of mappings of
`name`, `student`, `distillation` and `training`, which a run in the KFP UI may change. On a
cluster the loop is over those that the check gives. Variants whose student is the same share its
conversion through the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.deployment.export_winner.component import export_winner
from components.evaluation.leaderboard.component import leaderboard
from components.monitoring.record_many.component import record_many
from flagscale.recipe import Recipe
from flagscale.recipe.sweep import VARIED, Metric
from pipelines import form, placement
from pipelines.parameters import Parameter, make_pipeline
from pipelines.placement import Placement
from pipelines.platform import Platform
from pipelines.wiring import (
    always,
    ask_tasks,
    cache,
    check,
    decide,
    figures,
    measure,
    place_record,
    prepare,
    teach,
)

_AT_A_TIME_HERE = 1  # on this machine one training takes all cores


def build_sweep(recipe: Recipe, platform: Platform | None, code_version: str) -> BaseComponent:
    """The sweep's pipeline, with the recipe's variants as a default; see `build_pipeline`.

    Args:
        recipe: resolved, with a sweep.
        platform: None for this machine, which takes one variant after another.
        code_version: see `build_pipeline`.

    Raises:
        UserError: the platform cannot hold a variant's training, or the variants are too large a
            parameter.
    """
    sweep = recipe.sweep
    assert sweep is not None, "build_pipeline looks"
    if platform is not None:
        for variant in recipe.variants:
            placement.check(platform, variant.recipe)
    parallelism = sweep.parallelism if platform else _AT_A_TIME_HERE
    variants = [variant.sections for variant in recipe.variants]
    parameters = form.parameters(
        recipe,
        platform,
        code_version,
        more=[
            Parameter(
                "sweep_variants",
                variants,
                f"each a name and the sections {', '.join(VARIED)} of a recipe",
            ),
            Parameter(
                "sweep_metric",
                sweep.metric,
                "figure of the evaluation that decides",
                get_args(Metric),
            ),
        ],
    )
    made = form.made(recipe, platform, [parameter.name for parameter in parameters])
    form.check_size(made, {parameter.name: parameter.default for parameter in parameters})

    def wire(values: Mapping[str, Any]) -> None:
        placed = Placement(platform, recipe, values)
        checked = check(values, placed, made)
        # KFP's local runner loops over no step's output that has a name, and takes one that goes
        # into the loop for the loop's item. Here all values are the recipe's own, checked already,
        # and the loop's steps wait for the check by way of the teacher.
        _wire(checked, checked if platform else values, placed, parallelism)

    return make_pipeline(
        name="distillation-sweep",
        display_name=f"Sweep: {recipe.name}",
        description="Distils a teacher into several students and ranks them.",
        parameters=parameters,
        wire=wire,
        config=placement.pipeline_config(platform),
    )


def _wire(
    values: Mapping[str, Any],
    looped: Mapping[str, Any],
    placed: Placement,
    parallelism: int,
) -> None:
    dataset, teacher = prepare(values, placed)
    outputs = cache(values, placed, dataset, teacher) if placed.caches_teacher else None
    measured = measure(values, placed, dataset, teacher)
    with dsl.ParallelFor(
        looped["sweep_variants"], name="variants", parallelism=parallelism
    ) as variant:
        own = {section: getattr(variant, section) for section in VARIED}
        distilled, evaluation = teach(
            {**looped, **own}, placed, dataset, teacher, outputs, measured, record_failure=True
        )

    ranked = leaderboard(
        variants=values["sweep_variants"],
        metric=values["sweep_metric"],
        evaluations=dsl.Collected(evaluation),
        **always(values),
    )
    table = placed.place(ranked, "data", "Leaderboard").outputs["leaderboard"]

    exported = export_winner(
        export_recipe=values["export"],
        models_recipe=values["models"],
        distilled_students=dsl.Collected(distilled),
        evaluations=dsl.Collected(evaluation),
        leaderboard=table,
        **always(values, "models"),
    )
    won = placed.place(exported, "models", "Export winner").outputs
    shipped, measured = won["exported_student"], won["winners_evaluation"]
    tasks = ask_tasks(values, placed, dataset, teacher, measured, shipped)
    decide(values, placed, measured, exported, tasks)
    if placed.on_a_cluster:
        given = figures(values, placed, "leaderboard", "export-winner")
        for name in ("student_metrics", "training_metrics", "evaluation_metrics"):
            given[name] = dsl.Collected(given[name])
        place_record(record_many(ranking=table, **given), placed)
