"""Teacher, student before and student after, compared."""

from components.evaluation.evaluate.component import evaluate

__all__ = ["evaluate"]
