"""How far a student's distribution of the next token is from its teacher's: one file a divergence.

All are made from the recipe by `divergence_of`, and used by calling them (differentiable) or by
`loss_and_gradient`. `rows` has what they share: chunks, normalisers, ranks. `reference` has each
once more, slow and in float64, to compare with.
"""

from flagscale.post_training.divergences.choosing import divergence_of
from flagscale.post_training.divergences.divergence import Divergence

__all__ = ["Divergence", "divergence_of"]
