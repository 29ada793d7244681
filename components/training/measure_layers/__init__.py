"""Which of the teacher's layers can go, measured once for all students of a run."""

from components.training.measure_layers.component import measure_layers

__all__ = ["measure_layers"]
