"""The recipe's divergence."""

from __future__ import annotations

from flagscale.post_training.divergences.divergence import Divergence
from flagscale.post_training.divergences.forward_kl import ForwardKL
from flagscale.recipe import DistillationRecipe


def divergence_of(recipe: DistillationRecipe) -> Divergence:
    """What the recipe's `divergence` names, with its temperature."""
    return ForwardKL(recipe.temperature)
