"""Trained student to a Hugging Face folder."""
