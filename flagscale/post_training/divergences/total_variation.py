"""Total variation: Wen, Li, Du and Mou, "f-divergence minimization for sequence-level KD" (2023).

arXiv 2307.15190. `sum |p - q| / 2`, between 0 and 1: bounded and symmetric; the gradient does not
fade as the student nears the teacher.
"""

from __future__ import annotations

import torch

from flagscale.post_training.divergences.bounded import Bounded
from flagscale.post_training.divergences.rows import Rows


class TotalVariation(Bounded):
    """`sum |p - q| / 2`; `Bounded` with e 1 where q is above p, 1/2 where equal, 0 where below."""

    def sums(self, rows: Rows) -> torch.Tensor:
        """The divergence, and those of `Bounded`."""
        rows.kept = self.excess_and_room(rows)
        excess, room = (part.sum(-1) for part in rows.kept)
        sign = rows.log_ratio  # by now its sign
        loss = (torch.linalg.vecdot(rows.p, sign) + (excess - room)) / 2
        return torch.stack([loss, excess, room])

    def excess_and_room(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns of q where it is above p, and where it is below; equal ones half and half."""
        sign = rows.log_ratio.sign_()  # of p - q, but exact where the two are close
        half = rows.q.div_(2)
        room = torch.addcmul(half, half, sign, out=rows.spare)
        return torch.addcmul(half, half, sign, value=-1), room
