"""How many parameters a model has, in all and on one rank: exactly what Megatron-Core builds."""

from __future__ import annotations

from dataclasses import dataclass

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.layout import Layout


@dataclass(frozen=True)
class Parameters:
    """Counts of one rank.

    Attributes:
        dense: of everything but experts.
        experts: of the rank's experts, which other ranks share the optimiser's state of.
        table: of them, the largest embedding or output table: the largest single tensor.
    """

    dense: int
    experts: int
    table: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


def parameters(shape: ModelShape, layout: Layout | None = None, stage: int = 0) -> Parameters:
    """What one pipeline stage's rank holds.

    Args:
        shape: of the model; no layer spec of its own.
        layout: default: one process, which holds everything.
        stage: of the pipeline, from 0.
    """
    layout = layout or Layout()
    first, last = stage == 0, stage == layout.pipeline - 1
    layers = stage_layers(shape, layout, stage)
    table = shape.padded_vocab_size * shape.hidden_size // layout.tensor
    # The last stage has a copy of a tied table, unless it is the first stage's own.
    tables = int(first) + int(last and (shape.untie_embeddings_and_output_weights or not first))
    dense = tables * table + sum(_dense(shape, layout, index) for index in layers)
    experts = sum(_experts(shape, layout, index) for index in layers)
    if last:
        dense += _norm(shape)
        further = shape.architecture.mtp_num_layers or 0
        own = 2 * shape.hidden_size**2 // layout.tensor + 3 * _norm(shape)
        dense += further * (own + _dense(shape, layout, shape.num_layers - 1))
        experts += further * _experts(shape, layout, shape.num_layers - 1)
    return Parameters(dense, experts, table if tables else 0)


def active_parameters(shape: ModelShape) -> int:
    """Weights that one token is multiplied by: without the embedding, chosen experts alone."""
    count, whole = 0, Layout()
    for index in range(shape.num_layers):
        count += _dense(shape, whole, index)
        if has_experts(shape, index):
            chosen = shape.architecture.moe_router_topk * _expert(shape)
            count += chosen
    return count + shape.padded_vocab_size * shape.hidden_size


def stage_layers(shape: ModelShape, layout: Layout, stage: int) -> range:
    """The layers of a pipeline stage, counted from 0 over the whole model."""
    each = shape.num_layers // layout.pipeline
    return range(stage * each, (stage + 1) * each)


def has_experts(shape: ModelShape, index: int) -> bool:
    """Whether a layer, counted from 0, has experts in place of one MLP."""
    architecture = shape.architecture
    return architecture.num_experts is not None and index % architecture.moe_layer_freq == 0


def first_projections(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Numbers of a stage's gates and values, which a model has in one tensor each layer.

    A checkpoint has them apart, and Megatron-Core copies all layers' at once to write them.
    """
    count = 0
    for index in stage_layers(shape, layout, stage):
        if has_experts(shape, index):
            experts = (shape.architecture.num_experts or 0) // layout.expert
            count += experts * 2 * shape.hidden_size * expert_width(shape)
        else:
            count += 2 * shape.hidden_size * shape.ffn_hidden_size // layout.tensor
    return count


def expert_width(shape: ModelShape) -> int:
    """Width of one expert."""
    return shape.architecture.moe_ffn_hidden_size or shape.ffn_hidden_size


def _dense(shape: ModelShape, layout: Layout, index: int) -> int:
    """A layer, experts aside."""
    count = 2 * _norm(shape) + _attention(shape, layout.tensor)
    if not has_experts(shape, index):
        return count + 3 * shape.hidden_size * shape.ffn_hidden_size // layout.tensor
    architecture = shape.architecture
    router = shape.hidden_size * (architecture.num_experts or 0)
    shared = architecture.moe_shared_expert_intermediate_size or 0
    return count + router + 3 * shape.hidden_size * shared // layout.tensor


def _experts(shape: ModelShape, layout: Layout, index: int) -> int:
    if not has_experts(shape, index):
        return 0
    return (shape.architecture.num_experts or 0) // layout.expert * _expert(shape)


def _expert(shape: ModelShape) -> int:
    return 3 * shape.hidden_size * expert_width(shape)


def _attention(shape: ModelShape, tensor: int) -> int:
    if shape.architecture.multi_latent_attention:
        return _latent_attention(shape, tensor)
    hidden, channels = shape.hidden_size, shape.kv_channels
    queries, keys = channels * shape.num_attention_heads, channels * shape.num_query_groups
    count = hidden * (queries + 2 * keys) // tensor + queries * hidden // tensor
    if shape.add_qkv_bias:
        count += (queries + 2 * keys) // tensor
    if shape.qk_layernorm:
        count += 2 * channels * (_norm(shape) // hidden)
    return count


def _latent_attention(shape: ModelShape, tensor: int) -> int:
    sizes, hidden, heads = shape.architecture, shape.hidden_size, shape.num_attention_heads
    norm = (_norm(shape) // hidden) if shape.qk_layernorm else 0
    key = sizes.qk_head_dim + sizes.qk_pos_emb_head_dim
    if sizes.q_lora_rank is None:
        count = hidden * heads * key // tensor
    else:
        rank = sizes.q_lora_rank
        count = hidden * rank + rank * heads * key // tensor + norm * rank
    rank = sizes.kv_lora_rank
    count += hidden * (rank + sizes.qk_pos_emb_head_dim) + norm * rank
    count += rank * heads * (sizes.qk_head_dim + sizes.v_head_dim) // tensor
    return count + heads * sizes.v_head_dim * hidden // tensor


def _norm(shape: ModelShape) -> int:
    return shape.hidden_size * (2 if shape.architecture.normalization == "LayerNorm" else 1)
