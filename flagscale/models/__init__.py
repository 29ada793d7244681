"""Hugging Face models to Megatron-Core and back, with proof."""
