"""Samples as a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flagscale.data.borders import Sample, pieces
from flagscale.data.layout import SPLITS
from flagscale.megatron import platform

MicroBatch = dict[str, Any]


def stacked(
    rows: Sequence[Sample],
    numbers: Sequence[int],
    split: str,
    reset_attention_mask: bool,
    following: Sequence[int] = (),
) -> MicroBatch:
    """A micro-batch as `flagscale.data.loader.Batches` describes it.

    Args:
        rows: its samples.
        numbers: theirs in the split.
        split: `train`, `validation` or `test`.
        reset_attention_mask: keep documents apart.
        following: the numbers of the next micro-batch's samples, if there is one.
    """
    batch_size, seq_length = len(rows), len(rows[0].tokens)
    arrays: dict[str, np.ndarray] = {
        "tokens": np.stack([row.tokens for row in rows]),
        "labels": np.stack([row.labels for row in rows]),
        "loss_mask": np.stack([row.loss_mask for row in rows]),
        "samples": np.array(numbers, np.int64),
        "split": np.array(SPLITS.index(split), np.int64),
        "following": np.array(following, np.int64),
    }
    extra: MicroBatch = {}
    if reset_attention_mask:
        found = pieces([row.starts for row in rows], seq_length)
        arrays |= {"position_ids": found.position_ids, "cu_seqlens": found.cu_seqlens}
        extra["max_seqlen"] = found.max_seqlen
    else:
        arrays["position_ids"] = np.tile(np.arange(seq_length), (batch_size, 1))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if platform.HAS_GPU:
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {**tensors, **extra}
