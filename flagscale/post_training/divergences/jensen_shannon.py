"""Generalised Jensen-Shannon divergence: Agarwal et al., "On-policy distillation (GKD)" (2024).

arXiv 2306.13649, equation 1. `beta KL(p || m) + (1 - beta) KL(q || m)` with `m = beta p + (1 -
beta) q`: bounded, symmetric at 0.5; divided by beta it nears forward KL as beta nears 0, divided by
1 - beta reverse KL as beta nears 1.
"""

from __future__ import annotations

import math

import torch

from flagscale.post_training.divergences.bounded import Bounded
from flagscale.post_training.divergences.mixtures import logs_of_mixture
from flagscale.post_training.divergences.rows import Rows


class JensenShannon(Bounded):
    """`beta KL(p || m) + (1 - beta) KL(q || m)`; `Bounded` with `e = (1 - beta) log(q / m)`."""

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
        """The divergence, and those of `Bounded`."""
        to_p, *rows.kept = self._terms(rows)
        excess, room = (part.sum(-1) for part in rows.kept)
        teacher = torch.linalg.vecdot(rows.p, to_p)
        return torch.stack([self.beta * teacher + (1 - self.beta) * excess, excess, room])

    def excess_and_room(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """`q log(q / m)`, and what it is short of its limit times `(1 - beta) / limit`."""
        return self._terms(rows)[1:]

    def _terms(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`log(p / m)`, excess and room."""
        odds, limit = self.beta / (1 - self.beta), -math.log1p(-self.beta)
        # Where p is below q it is log1p(odds p / q); above, where log(q / m) < 0, all of the limit
        # and that much more.
        room = rows.log_ratio.clamp(max=0).exp_().mul_(odds).log1p_()
        to_p, to_q = logs_of_mixture(rows, self.beta)
        room.sub_(torch.clamp(to_q, max=0, out=rows.log_ratio))
        room.mul_(rows.q).mul_((1 - self.beta) / limit)
        return to_p, to_q.mul_(rows.q), room
