"""Divergences with bounded gradients, which keep their digits where next to nothing is left."""

from __future__ import annotations

from abc import abstractmethod

import torch

from flagscale.post_training.divergences.divergence import FDivergence
from flagscale.post_training.divergences.rows import Rows


class Bounded(FDivergence):
    """With e the derivative by q and c its limit where p is 0, the gradient is `q (e - sum q e)`.

    Of models that hardly overlap nearly all of q lies where e is c but for what is next to nothing,
    and beside which it would be rounded away. So the `room` r = c - e up to the limit is made as
    well as the `excess` e itself, each to its own digits. The gradient is then `q (e sum q r -
    r sum q e) / c`: where the models are close all e are small, where they hardly overlap all r
    that have a weight, and neither product is rounded at the other's size.
    """

    number_of_sums = 3

    @abstractmethod
    def excess_and_room(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """`q e` and `q r`, [n, V] each, with factors whose product is 1 / c."""

    def gradient(self, rows: Rows, sums: torch.Tensor) -> torch.Tensor:
        """From the sums: the divergence, and those of excess and room."""
        excess, room = rows.kept or self.excess_and_room(rows)
        return excess.mul_(sums[2, :, None]).sub_(room.mul_(sums[1, :, None]))
