"""What a model needs where it is used: weights as they are exported, memory, operations, speed."""

from __future__ import annotations

from dataclasses import replace

from flagscale.megatron.shape import ModelShape
from flagscale.sizes.activations import FLOAT32, Computation, forward_transient
from flagscale.sizes.layout import Layout
from flagscale.sizes.machine import ACCELERATORS
from flagscale.sizes.parameters import active_parameters, parameters
from flagscale.sizes.steps import FORWARD_EFFICIENCY
from flagscale.sizes.work import forward_flops


def exported(shape: ModelShape) -> ModelShape:
    """The model without the vocabulary's padding, which no export has."""
    return replace(shape, padded_vocab_size=shape.vocab_size)


def parameters_in_use(shape: ModelShape) -> int:
    """All weights, a tied table once."""
    return parameters(exported(shape)).total


def active_in_use(shape: ModelShape) -> int:
    """Weights that one token is multiplied by: see `active_parameters`."""
    return active_parameters(exported(shape))


def weight_bytes(platform: str) -> int:
    """Of a number on a platform: `cpu`, where models are widened to fp32, or an accelerator."""
    return FLOAT32 if platform == "cpu" else 2


def memory_in_use(shape: ModelShape, seq_length: int, dtype_bytes: int) -> int:
    """Bytes of one process that reads a sequence: weights, keys and values, one layer at work.

    Args:
        shape: of the model.
        seq_length: tokens of the sequence.
        dtype_bytes: of a number.
    """
    cached = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels * seq_length
    layer = forward_transient(shape, 0, Layout(), Computation(dtype_bytes), seq_length)
    held = dtype_bytes * (parameters_in_use(shape) + cached)
    return held + layer + FLOAT32 * shape.vocab_size


def flops_a_token(shape: ModelShape, seq_length: int) -> float:
    """Operations of a forward pass, a token of sequences of that length."""
    return forward_flops(exported(shape), 1, seq_length)


def seconds_a_token(shape: ModelShape, seq_length: int, platform: str) -> float:
    """By the share of an accelerator's peak that plans take for forward passes.

    Raises:
        ValueError: the platform's speed is not known.
    """
    accelerator = ACCELERATORS.get(platform)
    if accelerator is None or accelerator.flops is None:
        raise ValueError(f"platform={platform}: its speed is not known")
    return flops_a_token(shape, seq_length) / (FORWARD_EFFICIENCY * accelerator.flops)
