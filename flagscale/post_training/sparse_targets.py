"""What a teacher's answer is where it is some tokens' probabilities and no logits: rows of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseRows:
    """N rows of a teacher's distribution at its temperature.

    Attributes:
        tokens_nk: int64 [N, k], of the whole vocabulary; those of a row differ, but for fillings.
        shares_nk: float32 [N, k], their probabilities; 0 fills.
        tail_n: float32 [N], what all other tokens have together; None: of those nothing is known,
            because the shares are of draws.
        entropy_n: float32 [N], of the teacher's whole distribution, nats.
    """

    tokens_nk: torch.Tensor
    shares_nk: torch.Tensor
    tail_n: torch.Tensor | None
    entropy_n: torch.Tensor

    def __len__(self) -> int:
        return len(self.tokens_nk)

    def __getitem__(self, rows: slice | torch.Tensor) -> SparseRows:
        return SparseRows(
            self.tokens_nk[rows],
            self.shares_nk[rows],
            None if self.tail_n is None else self.tail_n[rows],
            self.entropy_n[rows],
        )

    def by_sample(self, samples: int) -> SparseRows:
        """Rows in the order of hidden states [s, b] as those of a batch [b, s].

        Args:
            samples: b.
        """
        places = torch.arange(len(self), device=self.tokens_nk.device)
        return self[places.view(-1, samples).T.flatten()]


class GivenTargets(torch.nn.Module):
    """Stands where an output layer would, and gives what it is given."""

    def forward(self, targets: SparseRows) -> tuple[SparseRows, None]:
        """The targets, and no bias."""
        return targets, None
