"""The smallest layout whose ranks have room for their share, and the nearest to one that has not.

Layouts are tried in the order of their ranks, fewer pipeline stages first: tensor parallelism cuts
activations and logits too, and leaves no rank waiting for another. Experts are spread by expert
parallelism instead, each whole on its rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flagscale.errors import UserError
from flagscale.megatron.layout import check_layout
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import ParallelismRecipe
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import parameters

LARGEST = 8  # tensor ranks: those of one node, which exchange at every layer


def smallest_layout(
    shapes: Sequence[ModelShape],
    fits: Callable[[ParallelismRecipe], bool],
    most_ranks: int,
    seq_length: int,
) -> ParallelismRecipe | None:
    """The layout with the fewest ranks that fits.

    Args:
        shapes: of all models that are divided so.
        fits: whether every rank of a layout has room.
        most_ranks: that there are.
        seq_length: of a sample, which must be divisible too.

    Returns:
        None where none of so many ranks fits.
    """
    return next((s for s in layouts(shapes, most_ranks, seq_length) if fits(s)), None)


def smallest_for_weights(
    shapes: Sequence[ModelShape],
    dtype_bytes: int,
    memory: float,
    most_ranks: int,
    seq_length: int = 1,
) -> ParallelismRecipe | None:
    """`smallest_layout` where the models' weights are all that counts.

    Args:
        shapes: of the models that are held at once.
        dtype_bytes: of a weight.
        memory: bytes that a rank has for them.
        most_ranks: that there are.
        seq_length: of a sample.
    """

    def fits(sizes: ParallelismRecipe) -> bool:
        layout = Layout.of(sizes)
        return all(
            dtype_bytes * sum(parameters(shape, layout, stage).total for shape in shapes) <= memory
            for stage in range(layout.pipeline)
        )

    return smallest_layout(shapes, fits, most_ranks, seq_length)


def layouts(
    shapes: Sequence[ModelShape], most_ranks: int, seq_length: int
) -> Iterator[ParallelismRecipe]:
    """Layouts that the models can be divided into, by number of ranks."""
    experts = [shape.architecture.num_experts for shape in shapes if shape.architecture.num_experts]
    for ranks in range(1, most_ranks + 1):
        for pipeline in _divisors(ranks):
            share = ranks // pipeline
            tensor, expert = (1, share) if experts else (share, 1)
            if tensor > LARGEST or any(count % expert for count in experts):
                continue
            sizes = ParallelismRecipe(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                expert_model_parallel_size=expert,
            )
            if all(divides(shape, sizes, seq_length) for shape in shapes):
                yield sizes


def divides(shape: ModelShape, sizes: ParallelismRecipe, seq_length: int) -> bool:
    """Whether the model can be divided so."""
    try:
        check_layout(shape, sizes, seq_length)
    except UserError:
        return False
    return True


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]
