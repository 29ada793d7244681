"""Trained student to a Hugging Face folder."""

from components.deployment.export_student.component import export_student

__all__ = ["export_student"]
