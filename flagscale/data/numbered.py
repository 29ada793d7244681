"""The samples of a split by their numbers: which ones a training meets, and batches of any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from flagscale.data.mixture import VALIDATION_SEED, Mixture, weights_of
from flagscale.data.prefetch import Ahead
from flagscale.data.samples import Index
from flagscale.data.stacking import MicroBatch, stacked
from flagscale.megatron import platform

_AHEAD = 8  # micro-batches


class NumberedSamples:
    """The samples of one split, each as training sees it, whatever the seed.

    Args:
        dataset: a `dataset` artifact; nothing is written there.
        cache: folder of the sample index (`flagscale.data.loader.prepare_index`).
        split: `train` or `validation`.
        reset_attention_mask: keep documents apart; see `flagscale.data.loader.Batches`.

    Raises:
        UserError: the artifact is unusable, or the split does not fill one sample.
        RuntimeError: there are several processes, and no index.
    """

    def __init__(
        self, dataset: Path, cache: Path, split: str, reset_attention_mask: bool = False
    ) -> None:
        index = Index(dataset, cache, split)
        self._split, self._reset = split, reset_attention_mask
        self._parts = index.open(reset_attention_mask)
        self._weights = weights_of(index, self._parts)
        self._device = platform.device()

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def all(self) -> list[int]:
        """The numbers of all of them."""
        return list(range(len(self)))

    def first(self, count: int, seed: int = VALIDATION_SEED) -> list[int]:
        """The samples that a run takes first.

        Args:
            count: so many, some perhaps several times.
            seed: of its order; default: that of every validation.

        Returns:
            Their numbers, each once, rising.
        """
        order = Mixture(self._parts, self._weights, seed)
        # The first epoch of a lone part has all of it.
        taken = min(count, len(self)) if len(self._parts) == 1 else count
        return sorted({order.number(position) for position in range(taken)})

    def batches(self, numbers: Iterable[Sequence[int]]) -> Iterator[MicroBatch]:
        """Micro-batches of given samples, made ahead in a thread.

        Args:
            numbers: of the samples of each.
        """

        def make() -> Iterator[MicroBatch]:
            if platform.HAS_GPU:
                torch.cuda.set_device(self._device)  # a thread begins on device 0
            order = Mixture(self._parts, self._weights, VALIDATION_SEED)
            for some in numbers:
                rows = [order.sample(number) for number in some]
                yield stacked(rows, some, self._split, self._reset)

        return Ahead(make, _AHEAD)
