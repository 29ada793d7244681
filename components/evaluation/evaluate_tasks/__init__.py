"""Tasks of lm-eval, asked of teacher and exported student."""

from components.evaluation.evaluate_tasks.component import evaluate_tasks

__all__ = ["evaluate_tasks"]
