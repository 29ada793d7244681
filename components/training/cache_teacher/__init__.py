"""The teacher asked once, for all trainings."""

from components.training.cache_teacher.component import cache_teacher

__all__ = ["cache_teacher"]
