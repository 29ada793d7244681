"""Teacher and student asked lm-eval's tasks."""

from components.evaluation.evaluate_tasks.component import evaluate_tasks

__all__ = ["evaluate_tasks"]
