"""How far a student's distribution of the next token is from its teacher's: one file a divergence.

All are made from the recipe by `divergence_of`, and used by calling them (differentiable) or by
`loss_and_gradient`; `SparseKL` is that of a teacher of whom there are no logits. `rows` has what
they share: chunks, normalisers, ranks. `reference` has each once more, slow and in float64, to
compare with.
"""

from flagscale.post_training.divergences.choosing import divergence_of, sparse_divergence_of
from flagscale.post_training.divergences.divergence import Divergence
from flagscale.post_training.divergences.sparse_kl import SparseKL

__all__ = ["Divergence", "SparseKL", "divergence_of", "sparse_divergence_of"]
