"""Text of the train split that a model is measured on before it is trained: calibration."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch

from flagscale.data.layout import read_manifest
from flagscale.data.loader import MicroBatch, train_iterator
from flagscale.data.samples import Index

# Enough for matrix products to be fast; what is held of each token is large.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
# Of a training's order of samples another one is made: its first steps are to see other text than
# the student was fitted to. On the same text, half of a run's steps had next to nothing to learn.
OTHER_ORDER = 0x5EED


@dataclass(frozen=True)
class Calibration:
    """Micro-batches, and which they are.

    Attributes:
        batches: `tokens` and `labels`, int64 [b, s], `loss_mask`, float32 [b, s].
        digest: `sha256:<hex>` of these three, the same whenever and wherever the text is.
    """

    batches: list[MicroBatch]
    digest: str

    @property
    def whole(self) -> torch.Tensor:
        """The tokens of all micro-batches as one, int64 [b, s]."""
        return torch.cat([batch["tokens"] for batch in self.batches])

    @property
    def tokens(self) -> int:
        """Positions, those without a loss included."""
        return sum(batch["tokens"].numel() for batch in self.batches)


def calibration(dataset: Path, cache: Path, tokens: int, seed: int, device: str) -> Calibration:
    """Samples in another order than a training of this seed sees them in: one process reads them.

    Args:
        dataset: a `dataset` artifact.
        cache: folder for the index of its samples.
        tokens: at most so many, in whole samples; of one sample, its beginning.
        seed: of the order.
        device: that they are for: `cpu` or `cuda`.

    Raises:
        UserError: the artifact is unusable.
    """
    seq_length = int(read_manifest(dataset)["facts"]["seq_length"])
    samples, length = max(1, tokens // seq_length), min(tokens, seq_length)
    seed ^= OTHER_ORDER
    Index(dataset, cache, "train").build()  # the other ranks wait for what is read
    iterator = train_iterator(dataset, cache, micro_batch_size=1, global_batch_size=1, seed=seed)
    names = ("tokens", "labels", "loss_mask")
    rows = [
        {name: sample[name][:, :length] for name in names}
        for sample in itertools.islice(iterator, samples)
    ]
    hashed = hashlib.sha256()
    for row in rows:
        for name in names:
            hashed.update(row[name].contiguous().numpy().tobytes())
    size = max(1, _BATCH_TOKENS[device] // length)
    batches = [
        {name: torch.cat([row[name] for row in rows[start : start + size]]) for name in names}
        for start in range(0, samples, size)
    ]
    return Calibration(batches, f"sha256:{hashed.hexdigest()}")
