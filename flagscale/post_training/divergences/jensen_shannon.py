"""Generalised Jensen-Shannon divergence: Agarwal et al., "On-policy distillation (GKD)" (2024).

arXiv 2306.13649, equation 1. `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 -
beta) q`: bounded, symmetric at 0.5; divided by beta it nears forward KL as beta nears 0, divided by
1 - beta reverse KL as beta nears 1.
"""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.divergence import FDivergence
from flagscale.post_training.divergences.mixtures import logs_of_mixture
from flagscale.post_training.divergences.rows import Rows


class JensenShannon(FDivergence):
    """`beta KL(p || m) + (1 - beta) KL(q || m)`."""

    def __init__(self, temperature: float = 1.0, beta: float = 0.5) -> None:
        """Keep both.

        Args:
            temperature: divides both models' logits.
            beta: the teacher's weight in the mixture, between 0 and 1.

        Raises:
            ValueError: one of them is out of bounds.
        """
        super().__init__(temperature)
        if not 0 < beta < 1:
            raise ValueError(
                f"beta={beta}: must be between 0 and 1; beyond are forward_kl (0) "
                "and reverse_kl (1)"
            )
        self.beta = beta

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence, and `KL(q || m)`."""
        to_p, rows.kept = logs_of_mixture(rows, self.beta)
        student = torch.linalg.vecdot(rows.q, rows.kept)
        teacher = torch.linalg.vecdot(rows.p, to_p)
        return torch.stack([self.beta * teacher + (1 - self.beta) * student, student])

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`(1 - beta) q (log(q / m) - KL(q || m))`."""
        if rows.kept is None:
            _, rows.kept = logs_of_mixture(rows, self.beta)
        return rows.kept.sub_(sums[1, :, None]).mul_(rows.q).mul_(1 - self.beta)
