"""The recipe's divergence."""

from __future__ import annotations

from flagscale.post_training.divergences.divergence import Divergence
from flagscale.post_training.divergences.forward_kl import ForwardKL
from flagscale.post_training.divergences.jensen_shannon import JensenShannon
from flagscale.post_training.divergences.logits_mse import LogitsMSE
from flagscale.post_training.divergences.reverse_kl import ReverseKL
from flagscale.post_training.divergences.skew_kl import SkewKL
from flagscale.post_training.divergences.sparse_kl import SparseKL
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


def sparse_divergence_of(recipe: DistillationRecipe) -> SparseKL:
    """The same where some tokens' probabilities are all that is known of the teacher.

    Raises:
        ValueError: it takes the teacher's logits.
    """
    if recipe.divergence not in ("forward_kl", "top_k_kl"):
        raise ValueError(f"divergence={recipe.divergence}: needs the teacher's logits")
    top_k = recipe.top_k if recipe.divergence == "top_k_kl" else None
    return SparseKL(recipe.temperature, top_k)
