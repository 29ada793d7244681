"""What is fixed when a pipeline is made, as far as the values of its runs depend on it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from flagscale.recipe import Section
from flagscale.recipe.search import RungsRecipe
from flagscale.recipe.section import NonNegativeInt


class PlatformFacts(Section):
    """What a platform's pods have, by kind of step: `data`, `models`, `training`."""

    mount_path: str | None = Field(None, description="Of the volume that steps share")
    url: str | None = Field(None, description="Of the object store that they share instead")
    images: dict[str, str] = Field(description="The pipeline's own, by kind")
    uses_trainjob: bool = Field(False, description="Whether the training's pods are a TrainJob's")
    accelerator_counts: dict[str, int] = Field(description="A pod of the kind, by default")


class Made(Section):
    """A pipeline as it was made."""

    parameters: tuple[str, ...] = Field(description="All that a run of it may give")
    recipe: dict[str, Any] = Field(
        description="Its sections are the parameters' defaults; without those that vary"
    )
    rungs: RungsRecipe | None = Field(None, description="Of a search")
    most_candidates: NonNegativeInt = Field(0, description="That a search was made for")
    caches_teacher: bool = Field(False, description="Whether it has the step cache-teacher")
    evaluates_tasks: bool = Field(False, description="Whether it has the step evaluate-tasks")
    platform: PlatformFacts | None = Field(None, description="None: this machine")
