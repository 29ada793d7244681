"""Teacher, student before and student after, compared."""

from components.training.cache_teacher.component import cache_teacher

__all__ = ["cache_teacher"]
