"""What is refused before a training's processes start, which none of them could train."""

from __future__ import annotations

from pathlib import Path

from flagscale.errors import UserError
from flagscale.megatron.shape import ModelShape
from flagscale.recipe import DistillationRecipe, TrainingRecipe
from flagscale.recipe.combinations import check_combination


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
    try:
        check_combination(distillation, training, ModelShape.load(student).architecture)
        training.check_world_size(processes)
    except ValueError as error:
        raise UserError(str(error)) from error
