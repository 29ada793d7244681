"""Forward KL: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015).

arXiv 1503.02531. `KL(p || q) = sum p log(p / q)`: the student covers all that the teacher does.
"""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.divergence import ChainRule
from flagscale.post_training.divergences.rows import Rows

# Below this KL, where rounding begins to show, the sum is made of terms that cannot cancel.
_NEAR = 1e-2
_SMALL = 0.1  # log ratios up to which the series is exact in float32


class ForwardKL(ChainRule):
    """`KL(p || q)`, from the teacher to the student."""

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence."""
        difference = torch.sub(rows.q, rows.p, out=rows.spare)
        return kl(rows.p, rows.log_ratio, difference)[None]

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`q - p`."""
        return torch.sub(rows.q, rows.p, out=rows.spare)

    def weights(self, shares: Rows) -> torch.Tensor:
        """Each part counts as much as the teacher gives it."""
        return shares.p


def kl(p: torch.Tensor, log_ratio: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    """`sum p log(p / q)` of rows, precise however close the two are.

    Args:
        p: float32 [n, V], probabilities.
        log_ratio: log(p / q); is limited to what float32 can hold where p is 0.
        difference: q - p.

    Returns:
        float32 [n]; infinite where q lacks what p has.
    """
    x = log_ratio.clamp_(min=torch.finfo(torch.float32).min)  # 0 log 0 is 0, not NaN
    # sum p log(p / q) - p + q: the same, since both sum to 1, but not so sensitive to how exactly
    # they do.
    result = torch.linalg.vecdot(p, x) + difference.sum(-1)
    if (result < _NEAR).any():
        # p (x - 1 + exp(-x)), as a series where x is small.
        series = p * x.square() * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x / 120)))
        exact = torch.where(x.abs() < _SMALL, series, p * x + difference).sum(-1)
        result = torch.where(result < _NEAR, exact, result)
    return result
