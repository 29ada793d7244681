"""What the forward pass keeps for the backward pass.

Korthikanti et al. (arXiv 2205.05198) count it for a layer of GPT-3. The layers here are others: a
gated MLP of any width, key/value groups, no dropout, and attention that keeps no [s, s] scores. So
the tensors are counted one by one, once for Megatron-Core's local layers on torch's kernels, once
for transformer-engine's.
"""

from __future__ import annotations

from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import expert_width, has_experts

FLOAT32 = 4


@dataclass(frozen=True)
class Computation:
    """How a model is run.

    Attributes:
        dtype_bytes: of a number: 2 in bf16, 4 in fp32.
        transformer_engine: its layers, with its fused SwiGLU and rotary embedding; or local ones.
        recompute: `none`, `selective` (attention) or `full` (whole layers).
    """

    dtype_bytes: int = FLOAT32
    transformer_engine: bool = False
    recompute: str = "none"


def stage_activations(
    shape: ModelShape, layers: range, layout: Layout, computation: Computation, tokens: int
) -> int:
    """Bytes that one micro-batch leaves on a rank, the output layer aside.

    Where whole layers are recomputed, that is what goes into each.

    Args:
        shape: of the model.
        layers: of the rank's pipeline stage.
        layout: how ranks share it.
        computation: how it is run.
        tokens: of the micro-batch, on this rank (its share under context parallelism).
    """
    if computation.recompute == "full":
        width = shape.hidden_size * computation.dtype_bytes // _sequence_ranks(layout)
        return tokens * width * len(layers)
    return sum(layer_activations(shape, i, layout, computation, tokens) for i in layers)


def layer_activations(
    shape: ModelShape, index: int, layout: Layout, computation: Computation, tokens: int
) -> int:
    """Bytes that one layer keeps of `tokens` tokens."""
    size, tensor = computation.dtype_bytes, layout.tensor
    kept = 2 * norm_activations(shape, layout, computation)
    kept += _attention(shape, computation) * size / tensor
    kept += _head_norms(shape, computation) / tensor
    kept += FLOAT32 * shape.num_attention_heads / tensor  # of the softmax, one number a row
    if has_experts(shape, index):
        kept += _moe(shape, layout, computation)
    else:
        kept += _mlp(shape.ffn_hidden_size, computation) * size / tensor
    return int(tokens * kept)


def backward_transient(
    shape: ModelShape, index: int, layout: Layout, computation: Computation, tokens: int
) -> int:
    """Bytes that the backward pass of a layer needs beside what the forward pass kept.

    Gradients of the MLP's gate, value and product, and of its first weight before that is added to
    the others.
    """
    tensor, size = layout.tensor, computation.dtype_bytes
    width, copies = shape.ffn_hidden_size / tensor, 1.0
    if has_experts(shape, index):
        width = float(expert_width(shape))
        copies = shape.architecture.moe_router_topk / _sequence_ranks(layout)
    return int(size * width * (3 * copies * tokens + 2 * shape.hidden_size))


def forward_transient(
    shape: ModelShape, index: int, layout: Layout, computation: Computation, tokens: int
) -> int:
    """Bytes that a layer needs while it runs, where no backward pass follows.

    Residual, its copy, a norm's input and output; and attention's tensors, or the MLP's.
    """
    size = computation.dtype_bytes
    inside = _attention(shape, computation) * size / layout.tensor
    if has_experts(shape, index):
        inside = max(inside, _moe(shape, layout, computation))
    else:
        inside = max(inside, _mlp(shape.ffn_hidden_size, computation) * size / layout.tensor)
    return int(tokens * (4 * shape.hidden_size * size + inside))


def norm_activations(shape: ModelShape, layout: Layout, computation: Computation) -> float:
    """Bytes a token of one norm over the hidden size: its input, and its output.

    torch's own kernel works in fp32 and keeps the normalised input beside both.
    """
    size, width = computation.dtype_bytes, shape.hidden_size / _sequence_ranks(layout)
    if computation.transformer_engine:
        return 2 * size * width
    return (2 * FLOAT32 + size) * width


def _sequence_ranks(layout: Layout) -> int:
    return layout.tensor if layout.sequence_parallel else 1


def _attention(shape: ModelShape, computation: Computation) -> float:
    """Numbers a token: the projection, rotated queries and keys, and what attention returns."""
    sizes, heads = shape.architecture, shape.num_attention_heads
    if sizes.multi_latent_attention:
        key = heads * (sizes.qk_head_dim + sizes.qk_pos_emb_head_dim)
        value = heads * sizes.v_head_dim
        latents = (sizes.q_lora_rank or 0) + sizes.kv_lora_rank + sizes.qk_pos_emb_head_dim
        return 4 * key + 3 * value + 3 * latents
    queries = heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    return (queries + 2 * keys) + queries + keys + queries


def _head_norms(shape: ModelShape, computation: Computation) -> float:
    """Bytes a token of the norms on query and key heads."""
    if not shape.qk_layernorm or shape.architecture.multi_latent_attention:
        return 0.0
    queries = shape.num_attention_heads * shape.kv_channels
    keys = shape.num_query_groups * shape.kv_channels
    if computation.transformer_engine:
        return computation.dtype_bytes * (queries + keys)
    if computation.dtype_bytes < FLOAT32:
        return 2 * FLOAT32 * (queries + keys)
    copied = queries if shape.num_query_groups < shape.num_attention_heads else 0
    return FLOAT32 * (queries + keys + copied)


def _mlp(width: int, computation: Computation) -> float:
    """Numbers a token: gate and value, and what the second projection reads.

    Without the fused SwiGLU also the activated gate and a copy of the value.
    """
    return (3 if computation.transformer_engine else 5) * width


def _moe(shape: ModelShape, layout: Layout, computation: Computation) -> float:
    """Bytes a token of a layer of experts, which are taken to be used evenly.

    Each token is copied to its experts before and after the exchange, and each expert's output
    back; the router works in fp32 over all experts.
    """
    sizes, size = shape.architecture, computation.dtype_bytes
    width = expert_width(shape)
    share = _sequence_ranks(layout)
    copies = 3 * shape.hidden_size + _mlp(width, computation)
    routed = size * sizes.moe_router_topk * copies
    router = FLOAT32 * 4 * (sizes.num_experts or 0)
    shared = sizes.moe_shared_expert_intermediate_size or 0
    return (routed + router) / share + size * _mlp(shared, computation) / layout.tensor
