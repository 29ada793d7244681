"""The step that ends a rung of a search."""

from components.evaluation.rank_candidates.component import rank_candidates

__all__ = ["rank_candidates"]
