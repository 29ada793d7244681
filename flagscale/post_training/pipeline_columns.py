"""A float32 number a token, as columns of what pipeline stages pass on in bf16."""

from __future__ import annotations

from typing import Any

import torch

from flagscale.megatron.pipeline_cargo import loss_columns


def to_columns(loss_sb: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Per-token losses [s, b] as [s, b, n] of another dtype, with nothing lost either way."""
    columns: torch.Tensor = _ToColumns.apply(loss_sb, dtype)
    return columns


def from_columns(columns_sbn: torch.Tensor) -> torch.Tensor:
    """What `to_columns` was given, on another stage."""
    loss: torch.Tensor = _FromColumns.apply(columns_sbn)
    return loss


class _ToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss_sb: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:  # noqa: ANN401
        return _split(loss_sb, dtype)

    @staticmethod
    def backward(ctx: Any, gradient_sbn: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN401
        return _joined(gradient_sbn), None


class _FromColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns_sbn: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        ctx.dtype = columns_sbn.dtype
        return _joined(columns_sbn)

    @staticmethod
    def backward(ctx: Any, gradient_sb: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return _split(gradient_sb, ctx.dtype)


def _split(value_sb: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each column is what the ones before it leave, rounded: 8 bits of the 24 at a time."""
    rest, columns = value_sb.float(), []
    for _ in range(loss_columns(dtype.itemsize)):
        columns.append(rest.to(dtype))
        rest = rest - columns[-1].float()
    return torch.stack(columns, dim=-1)


def _joined(columns_sbn: torch.Tensor) -> torch.Tensor:
    """Small ones first: every partial sum has a place in a float32."""
    first, *others = columns_sbn.float().unbind(dim=-1)
    total = torch.zeros_like(first)
    for column in reversed(others):
        total = total + column
    return first + total
