"""The order in which a seed takes a split's samples, and their numbers, which no seed changes."""

from __future__ import annotations

import bisect
import itertools

from flagscale.data.blending import Epochs, Interleave
from flagscale.data.borders import Sample
from flagscale.data.samples import Index, Samples

VALIDATION_SEED = 0  # of no run: every run validates on the same samples
_POSITIONS_A_LOOK = 4096


class Mixture:
    """The endless sequence of samples of one or several parts of a split.

    Args:
        parts: the samples of each.
        weights: their shares.
        seed: of the epochs' order.
    """

    def __init__(self, parts: list[Samples], weights: list[float], seed: int) -> None:
        self._parts = parts
        self._firsts = [0, *itertools.accumulate(map(len, parts))]
        self._epochs = [Epochs(len(part), seed) for part in parts]
        self._interleave = Interleave(weights)
        self._look = range(0)
        self._order: list[tuple[int, int]] = []

    def number(self, position: int) -> int:
        """Which sample it is: they are numbered through all parts of the split."""
        part, taken = (0, position) if len(self._parts) == 1 else self._take(position)
        return self._firsts[part] + self._epochs[part][taken]

    def sample(self, number: int) -> Sample:
        """The sample of a number."""
        part = bisect.bisect_right(self._firsts, number) - 1
        return self._parts[part][number - self._firsts[part]]

    def _take(self, position: int) -> tuple[int, int]:
        if position not in self._look:
            start = position - position % _POSITIONS_A_LOOK
            self._look = range(start, start + _POSITIONS_A_LOOK)
            corpora, numbers = self._interleave.span(self._look.start, self._look.stop)
            self._order = list(zip(corpora.tolist(), numbers.tolist(), strict=True))
        return self._order[position - self._look.start]


def weights_of(index: Index, parts: list[Samples]) -> list[float]:
    """The recipe's, or where it gives none the number of samples."""
    return [
        float(len(samples) if part.weight is None else part.weight)
        for part, samples in zip(index.parts, parts, strict=True)
    ]
