"""The recipe's divergence."""

from __future__ import annotations

from flagscale.post_training.divergences.divergence import Divergence
from flagscale.post_training.divergences.forward_kl import ForwardKL
from flagscale.post_training.divergences.jensen_shannon import JensenShannon
from flagscale.post_training.divergences.logits_mse import LogitsMSE
from flagscale.post_training.divergences.reverse_kl import ReverseKL
from flagscale.post_training.divergences.skew_kl import SkewKL
from flagscale.post_training.divergences.top_k_kl import TopKKL
from flagscale.post_training.divergences.total_variation import TotalVariation
from flagscale.recipe import DistillationRecipe


def divergence_of(recipe: DistillationRecipe) -> Divergence:
    """What the recipe's `divergence` names, with its temperature and its own parameter."""
    temperature = recipe.temperature
    made = {
        "forward_kl": lambda: ForwardKL(temperature),
        "reverse_kl": lambda: ReverseKL(temperature),
        "jensen_shannon": lambda: JensenShannon(temperature, recipe.beta),
        "skew_kl": lambda: SkewKL(temperature, recipe.alpha),
        "total_variation": lambda: TotalVariation(temperature),
        "top_k_kl": lambda: TopKKL(temperature, recipe.top_k),
        "logits_mse": LogitsMSE,
    }
    return made[recipe.divergence]()
