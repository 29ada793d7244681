"""How many ranks share what: the layout that sizes are computed for."""

from __future__ import annotations

from dataclasses import dataclass

from flagscale.recipe import ParallelismRecipe


@dataclass(frozen=True)
class Layout:
    """Sizes of Megatron's process groups.

    Attributes:
        tensor: TP: ranks that share a tensor.
        pipeline: PP: ranks that share the layers.
        context: CP: ranks that share a sequence.
        expert: EP: ranks that share the experts.
        data: DP: copies of the model, each on all other ranks together.
        sequence_parallel: norms and residuals are split over the TP ranks.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence_parallel: bool = False

    @classmethod
    def of(cls, parallelism: ParallelismRecipe, world_size: int | None = None) -> Layout:
        """The recipe's, over so many ranks.

        Args:
            parallelism: sizes of the groups.
            world_size: ranks; default: as few as hold the model once.
        """
        ranks = world_size or parallelism.smallest_world_size
        return cls(
            tensor=parallelism.tensor_model_parallel_size,
            pipeline=parallelism.pipeline_model_parallel_size,
            context=parallelism.context_parallel_size,
            expert=parallelism.expert_model_parallel_size,
            data=max(1, ranks // parallelism.model_parallel_size),
            sequence_parallel=parallelism.sequence_parallel,
        )

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that hold the same dense weights, and may share their optimiser's state."""
        return self.data * self.context

    @property
    def expert_optimizer_ranks(self) -> int:
        """Ranks that hold the same experts."""
        return max(1, self.tensor * self.context * self.data // self.expert)

    def __str__(self) -> str:
        """E.g. `TP4 PP2 DP2`; sizes of 1 are left out."""
        sizes = {
            "TP": self.tensor,
            "PP": self.pipeline,
            "CP": self.context,
            "EP": self.expert,
            "DP": self.data,
        }
        named = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return " ".join(named) or "one process"
