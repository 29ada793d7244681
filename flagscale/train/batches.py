"""What one micro-batch is, and how `forward_step` gets it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from flagscale import platform


class Batch(NamedTuple):
    """One micro-batch, in the order of Megatron's `get_batch`.

    Attributes:
        tokens: int64 [b, s].
        labels: int64 [b, s]; what follows each token.
        loss_mask: float32 [b, s]; 0 where a position has no loss.
        attention_mask: None for causal attention, else bool [b or 1, 1, s, s], True = forbidden.
        position_ids: int64 [b, s].
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor


def get_batch(data_iterator: Iterator[dict[str, torch.Tensor]]) -> Batch:
    """The next micro-batch, on the device that the model is on.

    Args:
        data_iterator: yields the dictionaries of `flagscale.data.loader`.
    """
    values = next(data_iterator)
    device = platform.device()
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
    return Batch(
        tokens=moved["tokens"],
        labels=moved["labels"],
        loss_mask=moved["loss_mask"],
        attention_mask=moved.get("attention_mask"),
        position_ids=moved["position_ids"],
    )
