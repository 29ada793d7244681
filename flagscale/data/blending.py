"""The order of training: epochs of a corpus, and the interleaving of several by weight.

Both are functions of a position in the endless sequence of samples, with nothing to remember in
between, so that a run may begin anywhere and any rank may ask for any part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np


class Epochs:
    """Position in an endless sequence of epochs -> sample; each epoch is another permutation.

    A permutation is computed at the places that are asked for: of a billion samples nothing is
    held. It is a Feistel network over numbers of an even count of bits (Luby and Rackoff, 1988),
    entered again with what is no sample (Black and Rogaway, CT-RSA 2002).

    Args:
        count: samples an epoch.
        seed: of the orders.
    """

    _ROUNDS = 8  # of few samples, four still prefer some orders

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self._count)
        place = self._encrypted(place, epoch)
        while place >= self._count:
            place = self._encrypted(place, epoch)
        return place

    def _encrypted(self, place: int, epoch: int) -> int:
        low = (1 << self._half) - 1
        left, right = place >> self._half, place & low
        for turn in range(self._ROUNDS):
            text = f"{self._seed} {epoch} {turn} {right}".encode()
            hashed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
            left, right = right, left ^ (hashed & low)
        return left << self._half | right


class Interleave:
    """Which corpus each position takes, and which of its samples: an even mixture by weight.

    Sample j (from 0) of a corpus with share w is due at the time (j + 1/2) / w, and samples come in
    the order of their times, ties in the order of the corpora. Of k corpora, after n samples, one
    has given n * w of them to within 1/2 + w * k / 2, wherever one starts to count: at time t each
    has given t * w rounded, and t differs from n by at most k / 2.

    Args:
        weights: positive, one a corpus; only their ratios matter.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        total = math.fsum(weights)
        self._shares = [weight / total for weight in weights]

    def __getitem__(self, position: int) -> tuple[int, int]:
        corpora, numbers = self.span(position, position + 1)
        return int(corpora[0]), int(numbers[0])

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions `start` to `stop`.

        Returns:
            The corpus and the number of its sample, from 0, int64 [stop - start] each.
        """
        around = len(self._shares) / 2 + 1
        first, last = max(start - around, 0.0), stop + around
        begins = [self._due_before(share, first) for share in self._shares]
        numbers = [
            np.arange(begin, self._due_before(share, last), dtype=np.int64)
            for share, begin in zip(self._shares, begins, strict=True)
        ]
        corpora = [np.full(len(n), i, np.int64) for i, n in enumerate(numbers)]
        times = [(n + 0.5) / share for n, share in zip(numbers, self._shares, strict=True)]
        order = np.argsort(np.concatenate(times), kind="stable")
        order = order[start - sum(begins) : stop - sum(begins)]
        return np.concatenate(corpora)[order], np.concatenate(numbers)[order]

    @staticmethod
    def _due_before(share: float, time: float) -> int:
        """Samples of a corpus due before a time, by the very figures that are compared above."""
        count = max(int(share * time + 0.5) - 1, 0)
        while (count + 0.5) / share < time:
            count += 1
        return count
