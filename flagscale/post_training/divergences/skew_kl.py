"""Skew KL: Ko, Kim, Chen and Yun, "DistiLLM" (2024).

arXiv 2402.03898, equation 4. `KL(p || m)` with `m = alpha p + (1 - alpha) q`: forward KL whose
gradient stays bounded where the student gives next to nothing to what the teacher does; forward KL
itself where alpha is 0.
"""

from __future__ import annotations

import math

import torch

from flagscale.post_training.divergences.divergence import FDivergence
from flagscale.post_training.divergences.forward_kl import kl
from flagscale.post_training.divergences.mixtures import logs_of_mixture
from flagscale.post_training.divergences.rows import Rows


class SkewKL(FDivergence):
    """`KL(p || alpha p + (1 - alpha) q)`."""

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
        """The divergence, and the sum of `_tilted`."""
        tilted = self._tilted(rows).sum(-1)
        to_p, _ = logs_of_mixture(rows, self.alpha)
        difference = torch.sub(rows.q, rows.p, out=rows.spare).mul_(1 - self.alpha)  # m - p
        return torch.stack([kl(rows.p, to_p, difference), tilted])

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`(1 - alpha) (q sum(u) - u)`, u the tilted difference."""
        tilted = self._tilted(rows)
        return rows.q.mul_(sums[1, :, None]).sub_(tilted).mul_(1 - self.alpha)

    def _tilted(self, rows: Rows) -> torch.Tensor:
        """`u = (p - q) (1 - alpha) q / m`, which is `q (p / m - 1)`: nothing in it overflows."""
        if rows.kept is None:
            rows.kept = rows.p - rows.q
            if self.alpha > 0:
                logit = math.log(self.alpha / (1 - self.alpha))
                rows.kept.mul_(torch.sigmoid(-logit - rows.log_ratio))
        return rows.kept
