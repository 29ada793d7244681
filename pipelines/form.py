"""What a run may change: KFP's form "Start a run", in which parameters stand sorted by name.

A section's single fields come right after it, and all of the platform's (`where_...`) last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flagscale.errors import UserError
from flagscale.recipe import Recipe
from flagscale.recipe.search import RungsRecipe
from flagscale.recipe.sweep import VARIED
from flagscale.run_values import FIELDS, LISTS, SECTIONS, Field, Made, PlatformFacts
from pipelines import where
from pipelines.parameters import Parameter
from pipelines.platform import Platform

_IN_THE_POD = "/tmp/flagscale"  # noqa: S108
_MOST_CHARACTERS = 100_000  # Linux takes 128 KiB an argument, in which KFP writes more than these


def parameters(
    recipe: Recipe, platform: Platform | None, code_version: str, more: Sequence[Parameter] = ()
) -> list[Parameter]:
    """All of a pipeline's parameters, as the form shows them.

    Args:
        recipe: its sections are defaults; those that a sweep or a search varies are none of them.
        platform: None for this machine.
        code_version: see `pipelines.distillation.build_pipeline`.
        more: of this kind of pipeline.
    """
    sections = [
        name
        for name in SECTIONS
        if name not in _varied(recipe) and getattr(recipe, name) is not None
    ]
    folder = f"{where.location(platform) or _IN_THE_POD}/checkpoints/{recipe.name}"
    found = [
        *(_section(recipe, name) for name in sections),
        *(_field(field) for field in FIELDS if field.section in sections),
        Parameter("training_checkpoints", folder, "of trainings; an interrupted run goes on there"),
        Parameter("tracking_experiment", recipe.tracking.experiment, "MLflow's experiment"),
        Parameter("where_code_version", code_version, "changes when the code does"),
        *(where.parameters(platform, recipe) if platform else []),
        *more,
    ]
    return sorted(found, key=lambda parameter: parameter.name)


def _varied(recipe: Recipe) -> tuple[str, ...]:
    """Sections that a list of the run's gives instead."""
    if recipe.search is not None:
        return ("student",)
    return () if recipe.sweep is None else tuple(VARIED)


def _section(recipe: Recipe, name: str) -> Parameter:
    default = getattr(recipe, name).model_dump(mode="json", exclude_none=True)
    return Parameter(name, default, f"section `{name}` of the recipe")


def _field(field: Field) -> Parameter:
    text = f"sets {field.section}.{field.field}; empty: as the section has it"
    choices = ("", *field.choices) if field.choices else ()
    return Parameter(field.name, "", text, choices)


def made(recipe: Recipe, platform: Platform | None, names: Sequence[str]) -> Made:
    """What of the pipeline its runs' values are checked against.

    Args:
        recipe: resolved.
        platform: None for this machine.
        names: of the pipeline's parameters.
    """
    left_out = {"sweep", "search", *_varied(recipe)}
    search = recipe.search
    rungs = search and RungsRecipe(**search.model_dump(exclude={"candidates"}))
    facts = recipe.model_dump(mode="json", exclude_none=True, exclude=left_out)
    return Made(
        parameters=tuple(names),
        recipe=facts,
        rungs=rungs,
        most_candidates=search.count if search else 0,
        caches_teacher=recipe.caches_teacher,
        evaluates_tasks=recipe.tasks.is_asked,
        platform=_facts(platform, recipe) if platform else None,
    )


def check_size(made: Made, values: Mapping[str, Any]) -> None:
    """Refuse values that no step could be started with: KFP hands them over in one argument.

    Args:
        made: the first step is given it as well.
        values: of all parameters of a run, or of the pipeline.

    Raises:
        UserError: they are too long together, and which is the longest.
    """
    sizes = {name: len(json.dumps(value)) for name, value in values.items()}
    total = sum(sizes.values()) + len(made.model_dump_json(ensure_ascii=True))
    if total > _MOST_CHARACTERS:
        longest = max(sizes, key=lambda name: sizes[name])
        remedy = (
            "vary fewer values, or make several runs of it"
            if longest in LISTS
            else "keep long texts in files, or leave some out"
        )
        raise UserError(
            f"{longest}: takes {sizes[longest]:,} characters; with all other parameters a step "
            f"would be given {total:,} in one argument, and can be given {_MOST_CHARACTERS:,}; "
            f"{remedy}"
        )


def _facts(platform: Platform, recipe: Recipe) -> PlatformFacts:
    values = {p.name: p.default for p in where.parameters(platform, recipe)}
    kinds = [k for k in where.KINDS if f"where_{k}_accelerator_count" in values]
    shared = platform.shared
    return PlatformFacts(
        mount_path=shared.mount_path if shared and shared.url is None else None,
        url=shared.url if shared else None,
        uses_trainjob=platform.uses_trainjob(recipe.resources.nodes),
        images={kind: str(values[f"where_{kind}_image"]) for kind in kinds},
        accelerator_counts={
            kind: int(str(values[f"where_{kind}_accelerator_count"])) for kind in kinds
        },
    )
