"""Reverse KL: Gu, Dong, Wei and Huang, "MiniLLM" (2024).

arXiv 2306.08543. `KL(q || p) = sum q log(q / p)`: the student keeps to what the teacher does, and
may leave some of it out.
"""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.divergence import ChainRule
from flagscale.post_training.divergences.forward_kl import kl
from flagscale.post_training.divergences.rows import Rows


class ReverseKL(ChainRule):
    """`KL(q || p)`, from the student to the teacher."""

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence."""
        difference = torch.sub(rows.p, rows.q, out=rows.spare)
        return kl(rows.q, self._log_ratio(rows), difference)[None]

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`q (log(q / p) - KL)`."""
        log_ratio = self._log_ratio(rows).clamp_(min=torch.finfo(torch.float32).min)
        return log_ratio.sub_(sums[0, :, None]).mul_(rows.q)

    def weights(self, shares: Rows) -> torch.Tensor:
        """Each part counts as much as the student gives it."""
        return shares.q

    def _log_ratio(self, rows: Rows) -> torch.Tensor:
        """log(q / p)."""
        if not rows.kept:
            rows.kept = (rows.log_ratio.neg_(),)
        return rows.kept[0]
