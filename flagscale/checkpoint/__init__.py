"""Weights in Megatron-Core's distributed format, read and written by all ranks together."""

from flagscale.checkpoint.layers import load_layers
from flagscale.checkpoint.weights import load_weights, save_weights

__all__ = ["load_layers", "load_weights", "save_weights"]
