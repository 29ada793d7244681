"""Norms on torch's kernels that take part in sequence parallelism.

Megatron-Core's own fallback without transformer-engine and Apex (`WrappedTorchNorm`) refuses
sequence parallelism. There, each tensor-parallel rank normalises its share of the positions with
the whole weight, so the weight's gradient is a sum over those ranks. Megatron-Core adds it up for
parameters that carry the mark `sequence_parallel` (`finalize_model_grads`). A norm on query and key
heads needs no mark: `finalize_model_grads` knows those by their name, and sums over ranks because
each rank has other heads.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron-Core's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Take Megatron-Core's arguments for a norm.

        Args:
            config: says whether positions are split over tensor-parallel ranks.
            hidden_size: of the last dimension, which is normalised.
            eps: added to the mean square.
        """
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with Megatron-Core's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        """Take Megatron-Core's arguments for a norm.

        Args:
            config: says whether positions are split over tensor-parallel ranks.
            hidden_size: of the last dimension, which is normalised.
            eps: added to the variance.
        """
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        _mark(self, config)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def _mark(norm: torch.nn.Module, config: TransformerConfig) -> None:
    for parameter in norm.parameters():
        # The attribute that Megatron-Core's gradient reduction and optimiser look for.
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
