"""Forward KL: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015).

arXiv 1503.02531. `KL(p || q) = sum p log(p / q)`: the student covers all that the teacher does.
"""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.divergence import ChainRule
from flagscale.post_training.divergences.rows import Rows


class ForwardKL(ChainRule):
    """`KL(p || q)`, from the teacher to the student."""

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence."""
        # sum p log(p / q) - p + q: the same, since both sum to 1, but not so sensitive to how
        # exactly they do.
        difference = torch.sub(rows.q, rows.p, out=rows.spare).sum(-1)
        return (torch.linalg.vecdot(rows.p, rows.log_ratio) + difference)[None]

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`q - p`."""
        return torch.sub(rows.q, rows.p, out=rows.spare)

    def weights(self, shares: Rows) -> torch.Tensor:
        """Each part counts as much as the teacher gives it."""
        return shares.p
