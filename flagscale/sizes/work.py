"""Operations of the models, and what ranks send one another."""

from __future__ import annotations

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import active_parameters, parameters


def forward_flops(shape: ModelShape, tokens: int, seq_length: int) -> float:
    """Of a forward pass: two a weight and token, and causal attention's scores and sums.

    Args:
        shape: of the model.
        tokens: in all.
        seq_length: of the sequences that they stand in.
    """
    return tokens * (2.0 * active_parameters(shape) + _attention(shape, seq_length))


def training_flops(
    student: ModelShape, teacher: ModelShape | None, tokens: int, seq_length: int, recompute: str
) -> float:
    """Of training on so many tokens: a backward pass is two forward passes.

    Args:
        student: its shape.
        teacher: its shape, which runs forward alone; None: there is none.
        tokens: in all.
        seq_length: of a sample.
        recompute: `none`, `selective` (attention again) or `full` (another forward pass).
    """
    forward = forward_flops(student, tokens, seq_length)
    total = 3 * forward
    if recompute == "full":
        total += forward
    elif recompute == "selective":
        total += tokens * _attention(student, seq_length)
    return total + (forward_flops(teacher, tokens, seq_length) if teacher is not None else 0.0)


def sent_a_step(
    student: ModelShape,
    teacher: ModelShape | None,
    layout: Layout,
    dtype_bytes: int,
    tokens: int,
) -> float:
    """Bytes that one rank sends in one optimiser step.

    Rings: of n ranks, each sends (n - 1) / n of a buffer to reduce and scatter it, and as much to
    gather it.

    Args:
        student: its shape.
        teacher: its shape, or None.
        layout: of the ranks.
        dtype_bytes: of activations and weights.
        tokens: of the step, on this rank (of all its micro-batches).
    """
    weights = parameters(student, layout).total
    ranks = layout.optimizer_ranks
    sent = (4 + dtype_bytes) * weights * (ranks - 1) / ranks
    # Tensor parallelism reduces [tokens, hidden] twice a layer, forward and backward.
    models = [(student, 2)] + ([(teacher, 1)] if teacher is not None else [])
    for shape, passes in models:
        layers = shape.num_layers // layout.pipeline
        hidden = tokens * shape.hidden_size * dtype_bytes
        ring = 2 * (layout.tensor - 1) / layout.tensor
        sent += passes * 2 * layers * hidden * ring
        if layout.pipeline > 1:
            sent += passes * hidden
    return sent


def _attention(shape: ModelShape, seq_length: int) -> float:
    """Operations a token: each sees half of the sequence on average."""
    sizes, heads = shape.architecture, shape.num_attention_heads
    key = value = shape.kv_channels
    if sizes.multi_latent_attention:
        key, value = sizes.qk_head_dim + sizes.qk_pos_emb_head_dim, sizes.v_head_dim
    return float(shape.num_layers * heads * (key + value) * seq_length)
