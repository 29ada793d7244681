"""What is kept of the teacher once it has made room for its students.

A KL divergence needs the teacher's whole distribution at each token. That is 200 to 600 kB, but
follows from a hidden state of 2 to 32 kB and the teacher's output layer: the states are kept in
files, the layer stays. So no two models are in memory together, and none runs twice.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch

from flagscale.errors import UserError


class OutputLayer(Protocol):
    """Hidden states [n, h] -> logits [n, v] of this rank's slice of the vocabulary."""

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:
        """The ranks that share the vocabulary; None: it is whole."""

    @property
    def first_token(self) -> int:
        """Of the slice."""

    @property
    def size(self) -> int:
        """Tokens in the slice."""

    def __call__(self, hidden_nh: torch.Tensor, /) -> torch.Tensor:
        """Logits, any float dtype."""


class KeptTeacher:
    """A teacher's predictions of batches of text."""

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """Nothing is kept yet.

        Args:
            folder: for the hidden states; the same on all ranks.
            writes: whether this rank is the one that writes what several compute.
        """
        self._folder, self._writes = folder, writes
        self._output_layer: OutputLayer | None = None

    def keep(self, index: int, hidden_nh: torch.Tensor, output_layer: OutputLayer) -> None:
        """Keep the hidden states of a batch, and the layer."""
        self._output_layer = output_layer
        if self._writes:
            torch.save(hidden_nh.cpu(), self._folder / f"{index}.pt")

    def kept(self, index: int, device: torch.device) -> tuple[OutputLayer, torch.Tensor]:
        """The layer, and the hidden states [n, h] of a batch.

        Ranks wait for one another (a barrier) between `keep` and this.

        Raises:
            ValueError: nothing was kept.
        """
        if self._output_layer is None:
            raise ValueError("the teacher is measured before its students")
        path = self._folder / f"{index}.pt"
        return self._output_layer, torch.load(path, map_location=device, weights_only=True)


def check_room(folder: Path, tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    """Make sure that the hidden states fit.

    Args:
        folder: where they will be.
        tokens: that are predicted.
        hidden_size: of the teacher.
        dtype: that it computes in.

    Raises:
        UserError: how much is lacking, and what helps.
    """
    needed, free = tokens * hidden_size * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the teacher's hidden states of {tokens:,} test tokens take "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: set TMPDIR to a larger "
            "disk, or evaluation.max_documents or max_document_tokens lower"
        )
