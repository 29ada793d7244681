"""Knowledge distillation."""

from components.training.distil_student_on_nodes.component import distil_student_on_nodes

__all__ = ["distil_student_on_nodes"]
