"""Total variation: Wen, Li, Du and Mou, "f-divergence minimization for sequence-level KD" (2023).

arXiv 2307.15190. `sum |p - q| / 2`, between 0 and 1: bounded and symmetric; the gradient does not
fade as the student nears the teacher.
"""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.divergence import FDivergence
from flagscale.post_training.divergences.rows import Rows


class TotalVariation(FDivergence):
    """`sum |p - q| / 2`."""

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence, and `sum q sign(q - p) / 2`."""
        sign = self._sign(rows)
        student = torch.linalg.vecdot(rows.q, sign) / 2
        return torch.stack([student - torch.linalg.vecdot(rows.p, sign) / 2, student])

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """`q (sign(q - p) / 2 - sum q sign(q - p) / 2)`."""
        return self._sign(rows).mul_(0.5).sub_(sums[1, :, None]).mul_(rows.q)

    def _sign(self, rows: Rows) -> torch.Tensor:
        """Of q - p, but exact where the two are close."""
        if rows.kept is None:
            rows.kept = rows.log_ratio.sign_().neg_()
        return rows.kept
