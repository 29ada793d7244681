"""The step that ranks the variants of a sweep."""

from components.evaluation.leaderboard.component import leaderboard

__all__ = ["leaderboard"]
