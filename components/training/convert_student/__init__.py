"""Teacher to student, conversion proven."""

from components.training.convert_student.component import convert_student

__all__ = ["convert_student"]
