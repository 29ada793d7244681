"""Documents as batches of windows.

A document of n tokens, BOS and EOD included, is cut into windows of `seq_length` inputs that do not
overlap. The last input of a window predicts the first token of the next, so each token but the
document's first is predicted exactly once, and never across documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Window:
    """A piece of a document.

    Attributes:
        document: its index.
        start: where in the document it begins.
        tokens: inputs and, shifted by one, labels (int64).
    """

    document: int
    start: int
    tokens: np.ndarray

    @property
    def length(self) -> int:
        """Tokens that are predicted."""
        return len(self.tokens) - 1


class Batch(tuple[Window, ...]):
    """Windows of one forward pass."""

    __slots__ = ()

    @property
    def inputs_bs(self) -> torch.Tensor:
        """int64, right-padded: causal models do not see what comes after."""
        inputs_bs = torch.zeros(len(self), max(window.length for window in self), dtype=torch.int64)
        for row, window in enumerate(self):
            inputs_bs[row, : window.length] = torch.from_numpy(window.tokens[:-1])
        return inputs_bs

    @property
    def labels_n(self) -> torch.Tensor:
        """int64, one window after the other, without padding."""
        return torch.from_numpy(np.concatenate([window.tokens[1:] for window in self]))

    @property
    def lengths(self) -> list[int]:
        """Tokens that are predicted of each window."""
        return [window.length for window in self]

    def unpadded(self, values_bsx: torch.Tensor) -> torch.Tensor:
        """[n, ...] of [b, s, ...]: what belongs to labels, one window after the other."""
        return torch.cat([values_bsx[row, : window.length] for row, window in enumerate(self)])


def batches(documents: Sequence[np.ndarray], seq_length: int, micro_batch_size: int) -> list[Batch]:
    """Cut documents into windows, and put them together.

    Like lengths together waste no padding; the largest come first, so that memory fails early.

    Args:
        documents: token ids of each, at least 2.
        seq_length: tokens a window.
        micro_batch_size: windows a batch.
    """
    windows = sorted(_windows(documents, seq_length), key=lambda window: -window.length)
    return [
        Batch(windows[start : start + micro_batch_size])
        for start in range(0, len(windows), micro_batch_size)
    ]


def _windows(documents: Sequence[np.ndarray], seq_length: int) -> Iterator[Window]:
    for index, document in enumerate(documents):
        for start in range(0, len(document) - 1, seq_length):
            yield Window(index, start, document[start : start + seq_length + 1].astype(np.int64))
