"""The distillation pipeline: a check, six steps and their inputs.

Cache-teacher is one more where trainings read its outputs, evaluate-tasks where tasks are named.

`build_pipeline` makes it for a recipe: the recipe's sections become the parameters' defaults, so
that an uploaded pipeline shows them in the KFP UI and every run can change them. The same
definition runs on this machine (`python -m pipelines run`) and compiles to YAML for a platform
(`python -m pipelines compile`). Each step is given only the sections that it depends on: another
temperature reuses data, teacher and conversion from the cache.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kfp.dsl.base_component import BaseComponent

from components.deployment.export_student.component import export_student
from components.image import VERSION
from components.monitoring.record_run.component import record_run
from flagscale.code_version import digest_of
from flagscale.recipe import Recipe
from pipelines import form, placement
from pipelines.parameters import make_pipeline
from pipelines.placement import Placement
from pipelines.platform import Platform
from pipelines.search import build_search
from pipelines.sweep import build_sweep
from pipelines.wiring import (
    always,
    ask_tasks,
    cache,
    check,
    convert,
    decide,
    figures,
    place_record,
    prepare,
    teach,
)

RELEASE = f"flagscale-distillation {VERSION}"


def build_pipeline(
    recipe: Recipe, platform: Platform | None = None, code_version: str = RELEASE
) -> BaseComponent:
    """The pipeline with the recipe's sections as defaults, placed on a platform.

    A recipe with `sweep` gives the pipeline of `pipelines.sweep`, one with `search` that of
    `pipelines.search`.

    Args:
        recipe: resolved.
        platform: None for this machine.
        code_version: changes when the code does, and with it every cache key. In a compiled
            pipeline it is the release, because the image pins the code; on this machine it is
            `source_version`.

    Raises:
        UserError: the platform cannot hold the training, or the recipe is too long.
    """
    if recipe.sweep is not None:
        return build_sweep(recipe, platform, code_version)
    if recipe.search is not None:
        return build_search(recipe, platform, code_version)
    if platform is not None:
        placement.check(platform, recipe)
    return _build(recipe, platform, code_version, _wire)


def build_preparation(recipe: Recipe, code_version: str) -> BaseComponent:
    """The same pipeline on this machine, up to the student that training would start from.

    Args:
        recipe: resolved, without a sweep or a search.
        code_version: see `build_pipeline`.
    """

    def wire(values: Mapping[str, Any], placed: Placement) -> None:
        dataset, teacher = prepare(values, placed)
        convert(values, placed, dataset, teacher, measured={})

    return _build(recipe, None, code_version, wire)


def _build(
    recipe: Recipe,
    platform: Platform | None,
    code_version: str,
    wire_steps: Callable[[Mapping[str, Any], Placement], None],
) -> BaseComponent:
    parameters = form.parameters(recipe, platform, code_version)
    made = form.made(recipe, platform, [parameter.name for parameter in parameters])
    form.check_size(made, {parameter.name: parameter.default for parameter in parameters})

    def wire(values: Mapping[str, Any]) -> None:
        placed = Placement(platform, recipe, values)
        wire_steps(check(values, placed, made), placed)

    return make_pipeline(
        name="distillation",
        display_name=f"Distillation: {recipe.name}",
        description="Distils a teacher into a smaller student with Megatron-Core and ModelOpt.",
        parameters=parameters,
        wire=wire,
        config=placement.pipeline_config(platform),
    )


def _wire(values: Mapping[str, Any], placed: Placement) -> None:
    dataset, teacher = prepare(values, placed)
    outputs = cache(values, placed, dataset, teacher) if placed.caches_teacher else None
    distilled, evaluation = teach(values, placed, dataset, teacher, outputs)
    exported = export_student(
        export_recipe=values["export"],
        models_recipe=values["models"],
        distilled_student=distilled,
        evaluation=evaluation,
        **always(values, "models"),
    )
    shipped = placed.place(exported, "models", "Export student").outputs["exported_student"]
    tasks = ask_tasks(values, placed, dataset, teacher, evaluation, shipped)
    decide(values, placed, evaluation, exported, tasks)
    if placed.on_a_cluster:
        recorded = record_run(**figures(values, placed, "export-student"))
        place_record(recorded, placed)


def source_version() -> str:
    """A digest of the sources: the local cache sees no code inside an installed package."""
    import components
    import flagscale

    return f"sources {digest_of(Path(one.__path__[0]) for one in (flagscale, components))}"
