"""What is refused before a training's processes start, which none of them could train."""

from __future__ import annotations

from pathlib import Path

from flagscale.errors import UserError
from flagscale.megatron.quantized import check_quantized
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.recipe.combinations import check_combination
from flagscale.recipe.quantized_training import check_quantized_training


def check_training(
    distillation: DistillationRecipe, training: TrainingRecipe, student: Path, processes: int
) -> None:
    """Make sure that so many processes can train this.

    The sections may have been changed one by one since the recipe was read.

    Args:
        distillation: the loss.
        training: the optimisation.
        student: a `student` artifact.
        processes: ranks in all.

    Raises:
        UserError: what does not go together.
    """
    shape = ModelShape.load(student)
    if shape.quantization is not None:
        check_quantized(shape, shape.quantization, training.parallelism, calibrates=False)
    try:
        check_combination(distillation, training, shape.architecture)
        if shape.quantization is not None:
            check_quantized_training(shape.quantization, training)
        training.check_world_size(processes)
    except ValueError as error:
        raise UserError(str(error)) from error
