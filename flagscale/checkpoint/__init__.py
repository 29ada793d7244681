"""Weights in Megatron-Core's distributed format, read and written by all ranks together."""

from flagscale.checkpoint.layers import load_layers
from flagscale.checkpoint.weights import (
    count_parameters,
    load_output_layer,
    load_weights,
    save_weights,
)

__all__ = [
    "count_parameters",
    "load_layers",
    "load_output_layer",
    "load_weights",
    "save_weights",
]
