"""Hugging Face teacher to Megatron checkpoint."""
