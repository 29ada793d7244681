"""Skew KL: Ko, Kim, Chen and Yun, "DistiLLM" (2024).

arXiv 2402.03898, equation 4. `KL(p || m)` with `m = alpha p + (1 - alpha) q`: forward KL whose
gradient stays bounded where the student gives next to nothing to what the teacher does; forward KL
itself where alpha is 0.
"""

from __future__ import annotations

import math

import torch

from flagscale.post_training.divergences.bounded import Bounded
from flagscale.post_training.divergences.forward_kl import kl
from flagscale.post_training.divergences.mixtures import logs_of_mixture
from flagscale.post_training.divergences.rows import Rows


class SkewKL(Bounded):
    """`KL(p || alpha p + (1 - alpha) q)`; `Bounded` with `e = (1 - alpha) (1 - p / m)`."""

    def __init__(self, temperature: float = 1.0, alpha: float = 0.1) -> None:
        """Keep both.

        Args:
            temperature: divides both models' logits.
            alpha: the teacher's weight in the mixture, at least 0 and below 1.

        Raises:
            ValueError: one of them is out of bounds.
        """
        super().__init__(temperature)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha={alpha}: must be at least 0 and below 1")
        self.alpha = alpha

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence, and those of `Bounded`."""
        rows.kept = self.excess_and_room(rows)
        excess, room = (part.sum(-1) for part in rows.kept)
        to_p, _ = logs_of_mixture(rows, self.alpha)
        difference = torch.sub(rows.q, rows.p, out=rows.spare).mul_(1 - self.alpha)  # m - p
        return torch.stack([kl(rows.p, to_p, difference), excess, room])

    def excess_and_room(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """`s (q - p)` and `s p`, s the student's share `(1 - alpha) q / m` of the mixture."""
        excess = rows.q - rows.p
        if self.alpha == 0:
            return excess, rows.p
        logit = math.log(self.alpha / (1 - self.alpha))
        share = torch.sigmoid(-logit - rows.log_ratio)
        return excess.mul_(share), share.mul_(rows.p)
