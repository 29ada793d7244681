"""Samples, and where documents begin inside them, in the form that packed attention takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """One sequence.

    Attributes:
        tokens: int64 [s].
        labels: int64 [s]; the token after each.
        loss_mask: float32 [s]; 0 where there is no loss.
        starts: int64 [pieces]; where documents, or parts of them, begin: strictly rising from 0.
    """

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    starts: np.ndarray


class Pieces(NamedTuple):
    """The documents, or parts of documents, of a micro-batch of b samples of s tokens.

    Attributes:
        cu_seqlens: int32 [pieces + 1], strictly rising from 0 to b * s: the borders in the tokens
            laid out row after row. Each row begins a piece.
        max_seqlen: tokens of the longest piece.
        position_ids: int64 [b, s], from 0 at each border.
    """

    cu_seqlens: np.ndarray
    max_seqlen: int
    position_ids: np.ndarray


def starts_after(tokens: np.ndarray, eod_id: int) -> np.ndarray:
    """Where the documents of a row of packed text begin: at 0 and after each EOD.

    Args:
        tokens: [s].
        eod_id: ends a document.

    Returns:
        int64 [pieces], below s.
    """
    return np.concatenate([[0], np.flatnonzero(tokens[:-1] == eod_id) + 1])


def pieces(starts: Sequence[np.ndarray], seq_length: int) -> Pieces:
    """Join the pieces of rows.

    Args:
        starts: of each row, as in `Sample`.
        seq_length: tokens a row.
    """
    rows = [row * seq_length + start for row, start in enumerate(starts)]
    borders = np.concatenate([*rows, [len(starts) * seq_length]])
    lengths = np.diff(borders)
    positions = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths)
    return Pieces(
        cu_seqlens=borders.astype(np.int32),
        max_seqlen=int(lengths.max()),
        position_ids=positions.reshape(len(starts), seq_length),
    )
