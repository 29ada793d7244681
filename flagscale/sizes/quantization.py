"""What quantisation adds to a student's training, and takes from its export."""

from __future__ import annotations

from flagscale.megatron.shape import ModelShape
from flagscale.recipe.quantization import FORMATS
from flagscale.sizes.layout import Layout
from flagscale.sizes.parameters import stage_layers

FLOAT32 = 4
_FAKE_BUFFERS = 3  # fp32 copies of a weight while it is rounded


def quantized_weights(shape: ModelShape, layout: Layout | None = None, stage: int = 0) -> int:
    """Weights of a rank that are quantised: those of its layers' matrix products.

    Args:
        shape: of the student, plain layers of attention and MLP.
        layout: default: one process, which holds everything.
        stage: of the pipeline.
    """
    layout = layout or Layout()
    return (
        len(stage_layers(shape, layout, stage))
        * (_attention(shape) + _mlp(shape))
        // (layout.tensor)
    )


def fake_weights(
    shape: ModelShape, layout: Layout, stage: int, dtype_bytes: int, recompute: str
) -> int:
    """Bytes of the rounded weights that a forward pass keeps for its backward pass.

    Beside the weights themselves, one micro-batch's; where whole layers are recomputed, one layer's
    alone.
    """
    count = quantized_weights(shape, layout, stage)
    return (
        dtype_bytes
        * count
        // (len(stage_layers(shape, layout, stage)) if recompute == "full" else 1)
    )


def rounding(shape: ModelShape, layout: Layout) -> int:
    """Bytes that it takes to round the largest weight."""
    largest = max(2 * shape.hidden_size * shape.ffn_hidden_size, _attention(shape))
    return _FAKE_BUFFERS * FLOAT32 * largest // layout.tensor


def quantizers_bytes(shape: ModelShape, quantization: str) -> int:
    """Of the file that says what the quantisers know."""
    one, count = FORMATS[quantization], quantized_weights(shape)
    if one.per_tensor:
        return 0
    rows = shape.num_layers * (
        (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.kv_channels
        + 2 * shape.hidden_size
        + 2 * shape.ffn_hidden_size
    )
    return FLOAT32 * (rows if one.block_size is None else count // one.block_size)


def exported_bytes(shape: ModelShape, quantization: str, parameters: int, dtype_bytes: int) -> int:
    """Of weights in ModelOpt's unified format: quantised ones in their own bits.

    Args:
        shape: of the student.
        quantization: name of the recipe.
        parameters: of the whole student.
        dtype_bytes: of what is not quantised.
    """
    quantized = quantized_weights(shape)
    bits = FORMATS[quantization].weight_bits
    return dtype_bytes * (parameters - quantized) + bits * quantized // 8


def _attention(shape: ModelShape) -> int:
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
    return shape.hidden_size * shape.kv_channels * heads


def _mlp(shape: ModelShape) -> int:
    return 3 * shape.hidden_size * shape.ffn_hidden_size
