"""The step that hands on a student of a search."""

from components.training.pick_candidate.component import pick_candidate

__all__ = ["pick_candidate"]
