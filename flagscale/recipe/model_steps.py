"""Section `models`: how the steps that hold models, but train none, are spread over processes."""

from __future__ import annotations

from pydantic import Field

from flagscale.recipe.parallelism import ParallelismRecipe
from flagscale.recipe.section import Ranks, Section


class LayoutRecipe(Section):
    """Sizes of Megatron's process groups: as many processes as hold one copy of the model."""

    tensor_model_parallel_size: Ranks = Field(1, description="TP: ranks that share a tensor")
    pipeline_model_parallel_size: Ranks = Field(1, description="PP: ranks that share the layers")
    expert_model_parallel_size: Ranks = Field(1, description="EP: ranks that share the experts")


class ModelsRecipe(Section):
    """All steps that hold models and train none, on the ranks of their pod."""

    parallelism: LayoutRecipe | None = Field(
        None, description="Default: the smallest that fits the platform; here one process"
    )

    @property
    def sizes(self) -> ParallelismRecipe:
        """The sizes of all process groups; a lone process where the recipe gives none."""
        given = self.parallelism or LayoutRecipe()
        return ParallelismRecipe(**given.model_dump())

    @property
    def processes(self) -> int:
        """How many processes hold the model once."""
        return self.sizes.smallest_world_size
