"""All values of a run together: read, checked, and the sections that come of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from flagscale.errors import UserError
from flagscale.recipe import (
    DataRecipe,
    EvaluationRecipe,
    ExportRecipe,
    ModelsRecipe,
    PromoteRecipe,
    Recipe,
    Section,
    StudentRecipe,
    TasksRecipe,
    TeacherOutputsRecipe,
    TeacherRecipe,
    parse_section,
)
from flagscale.recipe.search import ranking_metrics
from flagscale.recipe.search_checks import check_search
from flagscale.recipe.sweep import VARIED
from flagscale.recipe.teacher_outputs import decided, met_by, reads_outputs
from flagscale.recipe.variants import check_distinct
from flagscale.run_values.fields import set_fields
from flagscale.run_values.made import Made
from flagscale.run_values.values import check_checkpoints, check_images, check_value

SECTIONS = (
    "data",
    "teacher",
    "student",
    "distillation",
    "teacher_outputs",
    "training",
    "evaluation",
    "export",
    "tasks",
    "models",
    "promote",  # only where the recipe has one
)
LISTS = {"sweep_variants": tuple(VARIED), "search_candidates": ("student",)}  # what each gives
MEASURED = "measured"  # students that measure layers: as little a parameter as the next
MET = "met"  # what trainings meet of teacher outputs: no parameter, it follows from them
_WHOLE = "the recipe with this run's parameters"


class _Shared(Section):
    """The sections that all variants of a sweep have in common."""

    data: DataRecipe
    teacher: TeacherRecipe
    teacher_outputs: TeacherOutputsRecipe
    evaluation: EvaluationRecipe
    export: ExportRecipe
    tasks: TasksRecipe
    models: ModelsRecipe
    promote: PromoteRecipe | None = None


def check_run(made: Made, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check all values of a run, those that are the pipeline's defaults too.

    Args:
        made: the pipeline.
        values: by the names of `made.parameters`, all of them.

    Returns:
        The sections among them as they are to be used: whole, with single fields set, and with
        what follows from others (another teacher's tokenizer). Of a sweep also `sweep_variants`, of
        a search `search_candidates`, and of both, under `MEASURED`, the students whose layers
        are measured. Of a pipeline with cache-teacher also, under `MET`, what that is asked for.

    Raises:
        UserError: a value is wrong, pods would fail of it, or a recipe would be refused.
    """
    rest = {k: v for k, v in values.items() if k not in SECTIONS and k not in LISTS}
    for key, value in rest.items():
        check_value(key, value)
    if made.platform is not None:
        check_checkpoints(values["training_checkpoints"], made.platform)
        check_images(rest, made.platform)
    whole = _changed(made, values)
    several = next((name for name in LISTS if name in values), None)
    if several is not None:
        parse_section(
            _Shared,
            {name: whole[name] for name in _Shared.model_fields if name in whole},
            where=_WHOLE,
        )
        recipes = _variants(made, several, values[several], whole)
        if made.rungs is not None:
            _check_rungs(made, list(recipes.values()), values["search_metric"])
    else:
        recipes = {_WHOLE: _read(made, whole, _WHOLE)}
    _check_accelerators(recipes, values)
    resolved = _resolved(values, list(recipes.values()))
    if several is not None:
        measured = StudentRecipe.measured_by(recipe.student for recipe in recipes.values())
        resolved[MEASURED] = [
            student.model_dump(mode="json", exclude_none=True) for student in measured
        ]
    return resolved | (_met(made, list(recipes.values())) if made.caches_teacher else {})


def _read(made: Made, whole: dict[str, Any], where: str) -> Recipe:
    """One training's recipe, in which it is decided whether it reads teacher outputs."""
    recipe = parse_section(Recipe, whole, where=where)
    if recipe.tasks.is_asked != made.evaluates_tasks:
        with_or_without = "with" if made.evaluates_tasks else "without"
        remedy = "name one" if made.evaluates_tasks else "leave them out"
        raise UserError(
            f"{where}: tasks.names={list(recipe.tasks.names)}, but this pipeline was made "
            f"{with_or_without} the step evaluate-tasks; {remedy}, or make a pipeline of a recipe "
            "that says so"
        )
    if made.caches_teacher:
        return decided(recipe, cached=True)
    if reads_outputs(recipe.distillation):
        raise UserError(
            f"{where}: distillation.teacher_outputs=cached, but this pipeline was made without the "
            "step cache-teacher; make one of a recipe that says so, or leave it out"
        )
    return recipe


def _changed(made: Made, values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole recipe as raw values: the pipeline's, with the run's sections and fields."""
    own = {name: values[name] for name in SECTIONS if name in values}
    whole = copy.deepcopy({**made.recipe, **own})
    set_fields(whole, made.recipe, values)
    data, teacher = made.recipe["data"], made.recipe["teacher"]
    pair = ("tokenizer", "tokenizer_revision")
    is_teachers = [data.get(k) for k in pair] == [teacher.get(k) for k in ("source", "revision")]
    if is_teachers and all(whole["data"].get(key) == data.get(key) for key in pair):
        for key in pair:  # so that it is taken from whichever teacher there is now
            whole["data"].pop(key, None)
    return whole


def _variants(
    made: Made, parameter: str, given: list[Any], shared: Mapping[str, Any]
) -> dict[str, Recipe]:
    """A sweep's variants or a search's candidates as whole recipes, by what errors call them."""
    keys = ["name", *LISTS[parameter]]
    found: dict[str, Recipe] = {}
    for number, variant in enumerate(given):
        if not isinstance(variant, dict) or sorted(variant) != sorted(keys):
            raise UserError(
                f"parameter {parameter}, item {number}: must be a mapping of {', '.join(keys)}, "
                f"not {sorted(variant) if isinstance(variant, dict) else repr(variant)}"
            )
        name = f"parameter {parameter}, {variant['name']!r}"
        if name in found:
            raise UserError(f"{name}: two have this name; each needs its own")
        own = {section: variant[section] for section in LISTS[parameter]}
        found[name] = _read(made, {**shared, **own}, name)
    if not found:
        raise UserError(f"parameter {parameter}: is empty; give at least one")
    names = (variant["name"] for variant in given)
    try:
        check_distinct(f"parameter {parameter}", zip(names, found.values(), strict=True))
    except ValueError as error:
        raise UserError(str(error)) from None
    return found


def _check_rungs(made: Made, candidates: list[Recipe], metric: str) -> None:
    """The rungs are the pipeline's; the candidates, and how long they train, are the run's."""
    assert made.rungs is not None
    measured = ranking_metrics(made.rungs)
    if metric not in measured:
        raise UserError(
            f"parameter search_metric={metric}: must be one of {', '.join(measured)}; a task ranks "
            "in a pipeline that is made of a recipe that says so"
        )
    first, count = candidates[0], len(candidates)
    if count > made.most_candidates:
        raise UserError(
            f"parameter search_candidates: has {count} candidates, and the pipeline was made for "
            f"{made.most_candidates}; make it anew from a recipe with more"
        )
    try:
        check_search(
            made.rungs,
            count,
            first.distillation,
            first.training,
            first.data.seq_length,
            first.tasks,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_accelerators(recipes: Mapping[str, Recipe], values: Mapping[str, Any]) -> None:
    of_models, of_training = (
        int(values.get(f"where_{kind}_accelerator_count", 0)) for kind in ("models", "training")
    )
    for name, recipe in recipes.items():
        try:
            recipe.check_models(of_models)
            recipe.check_accelerators(of_training)
            if "where_training_accelerator_count" in values and not of_training:
                recipe.check_on_cpu()
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None


def _resolved(values: Mapping[str, Any], recipes: list[Recipe]) -> dict[str, Any]:
    whole = [recipe.model_dump(mode="json", exclude_none=True) for recipe in recipes]
    resolved = {name: whole[0][name] for name in SECTIONS if name in values}
    for parameter in (name for name in LISTS if name in values):
        resolved[parameter] = [
            {"name": variant["name"], **{section: one[section] for section in LISTS[parameter]}}
            for variant, one in zip(values[parameter], whole, strict=True)
        ]
    return resolved


def _met(made: Made, recipes: list[Recipe]) -> dict[str, Any]:
    try:
        ranked = made.rungs.samples if made.rungs else 0
        met = met_by(recipes, recipes[0].teacher_outputs, ranked)
        return {MET: met.model_dump(mode="json")}
    except ValueError as error:
        raise UserError(str(error)) from None
