"""The frequencies of a rotary embedding, as transformers computes them."""

from __future__ import annotations

import torch

from flagscale.megatron.config_fields import LLAMA3_ROPE


def inverse_frequencies(width: int, base: float, factor: float = 0) -> torch.Tensor:
    """Radians a position, by which each pair of a head's channels is turned.

    Args:
        width: of a head.
        base: RoPE's theta.
        factor: of Llama 3's scaling; 0: not scaled.

    Returns:
        float32 [width / 2].
    """
    # Not before it is needed: a model's code brings all of transformers' generation along.
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": base}
    if factor:
        rope |= {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=1,
        rope_parameters=rope,
        max_position_embeddings=2 * int(LLAMA3_ROPE["original_max_position_embeddings"]),
    )
    frequencies: torch.Tensor = LlamaRotaryEmbedding(config).inv_freq
    return frequencies
