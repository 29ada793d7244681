"""The sweep: one teacher and one dataset, many students, a leaderboard, the best one exported.

    prepare-data, prepare-teacher
    for each variant, at most `sweep.parallelism` at a time:
        convert-student, distil-student, evaluate
    leaderboard, export-winner

A recipe with the section `sweep` gives it; `run`, `compile`, `submit` and `schedule` take such a
recipe like any other. The variants are a parameter of the pipeline: a list of mappings of `name`,
`student`, `distillation` and `training`, which a run in the KFP UI may change. Variants whose
student is the same share its conversion through the cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.export_winner.component import export_winner
from components.leaderboard.component import leaderboard
from components.record_sweep.component import record_sweep
from flagscale.errors import UserError
from flagscale.recipe import Recipe
from flagscale.recipe.sweep import VARIED
from pipelines import placement
from pipelines.distillation import (
    RELEASE,
    always,
    metrics,
    prepare,
    run_parameters,
    sections,
    teach,
)
from pipelines.parameters import Parameter, make_pipeline
from pipelines.placement import Placement
from pipelines.platform import Platform

SECTIONS = ("data", "teacher", "evaluation", "export")
_AT_A_TIME_HERE = 1  # on this machine one training takes all cores
_MOST_CHARACTERS = 100_000  # Linux takes 128 KiB an argument, in which the artifacts stand as well


def build_sweep(
    recipe: Recipe, platform: Platform | None = None, code_version: str = RELEASE
) -> BaseComponent:
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

    def wire(values: Mapping[str, Any]) -> None:
        _wire(values, Placement(platform, recipe, values), parallelism)

    variants = [variant.sections for variant in recipe.variants]
    size = len(json.dumps(variants))
    if size > _MOST_CHARACTERS:
        raise UserError(
            f"sweep.vary: {len(variants)} variants take {size:,} characters, but a pod can be "
            f"given {_MOST_CHARACTERS:,}; vary fewer values, or make several sweeps"
        )
    return make_pipeline(
        name="distillation-sweep",
        display_name=f"Sweep: {recipe.name}",
        description="Distils a teacher into several students and ranks them.",
        parameters=[
            Parameter(
                "variants",
                variants,
                f"each a name and the sections {', '.join(VARIED)} of a recipe",
            ),
            Parameter("metric", sweep.metric, "figure of the evaluation that decides"),
            *sections(recipe, SECTIONS),
            *run_parameters(recipe, platform, code_version),
        ],
        wire=wire,
    )


def _wire(values: Mapping[str, Any], placed: Placement, parallelism: int) -> None:
    dataset, teacher = prepare(values, placed)
    with dsl.ParallelFor(values["variants"], name="variants", parallelism=parallelism) as variant:
        own = {section: getattr(variant, section) for section in VARIED}
        distilled, results = teach({**values, **own}, placed, dataset, teacher)

    ranked = leaderboard(
        variants=values["variants"],
        metric=values["metric"],
        results=dsl.Collected(results),
        **always(values),
    )
    table = placed.place(ranked, "data", "Leaderboard").outputs["table"]

    exported = export_winner(
        export=values["export"],
        models=dsl.Collected(distilled),
        results=dsl.Collected(results),
        table=table,
        **always(values),
    )
    placed.place(exported, "models", "Export winner")
    if placed.on_a_cluster:
        _record(values, placed, table)


def _record(values: Mapping[str, Any], placed: Placement, table: Any) -> None:  # noqa: ANN401 - KFP's channel
    """The last step: what KFP's cache served shows up in MLflow, and the run ends there."""
    given = metrics(placed, "leaderboard", "export-winner")
    for name in ("student_metrics", "training_metrics", "evaluation_metrics"):
        given[name] = dsl.Collected(given[name])
    recorded = record_sweep(experiment=values["experiment"], leaderboard=table, **given)
    recorded.set_caching_options(enable_caching=False)
    placed.place(recorded, "data", "Record run", accelerators=False)
