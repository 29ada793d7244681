"""Section `training.parallelism`: how the training is spread over processes."""

from __future__ import annotations

import math

from pydantic import Field, model_validator

from flagscale.recipe.section import Ranks, Section


class ParallelismRecipe(Section):
    """Sizes of Megatron's process groups. What is left of the processes is data parallelism."""

    tensor_model_parallel_size: Ranks = Field(1, description="TP: ranks that share a tensor")
    sequence_parallel: bool = Field(
        False, description="Split norms and residuals over TP ranks by sequence; needs TP > 1"
    )
    pipeline_model_parallel_size: Ranks = Field(1, description="PP: ranks that share the layers")
    virtual_pipeline_model_parallel_size: Ranks | None = Field(
        None, description="Chunks a pipeline rank, interleaved; distillation.loss=none only"
    )
    context_parallel_size: Ranks = Field(1, description="CP: ranks that share a sequence")
    expert_model_parallel_size: Ranks = Field(
        1, description="EP: ranks that share the experts; divides TP x CP x DP"
    )
    processes: Ranks | None = Field(
        None, description="On each node; default: one a GPU, on a CPU as few as hold the model"
    )
    use_distributed_optimizer: bool | None = Field(
        None, description="Shard the optimiser's state over DP ranks; default: on a GPU"
    )

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one copy of the model together."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def smallest_world_size(self) -> int:
        """The fewest processes that hold the model once, experts included."""
        ranks = self.tensor_model_parallel_size * self.context_parallel_size
        return self.pipeline_model_parallel_size * math.lcm(ranks, self.expert_model_parallel_size)

    @model_validator(mode="after")
    def _check(self) -> ParallelismRecipe:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel=true needs tensor_model_parallel_size above 1, but it is 1"
            )
        chunks = self.virtual_pipeline_model_parallel_size
        if chunks is not None and (chunks == 1 or self.pipeline_model_parallel_size == 1):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size={chunks} needs to be above 1, and "
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} above 1 too"
            )
        return self

    def check_world_size(self, world_size: int) -> None:
        """Make sure that so many processes can be divided so.

        Raises:
            ValueError: which sizes do not divide them.
        """
        if world_size % self.model_parallel_size:
            raise ValueError(
                f"parallelism: tensor x pipeline x context = {self.tensor_model_parallel_size} x "
                f"{self.pipeline_model_parallel_size} x {self.context_parallel_size} does not "
                f"divide the {world_size} processes"
            )
        stage = world_size // self.pipeline_model_parallel_size
        if stage % self.expert_model_parallel_size:
            raise ValueError(
                f"parallelism: expert_model_parallel_size={self.expert_model_parallel_size} does "
                f"not divide the {stage} processes of a pipeline stage"
            )
