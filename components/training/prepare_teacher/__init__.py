"""Hugging Face teacher to Megatron checkpoint."""

from components.training.prepare_teacher.component import prepare_teacher

__all__ = ["prepare_teacher"]
