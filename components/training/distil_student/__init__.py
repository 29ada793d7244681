"""Knowledge distillation."""

from components.training.distil_student.component import distil_student

__all__ = ["distil_student"]
