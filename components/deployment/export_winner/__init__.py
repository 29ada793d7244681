"""The step that exports the best student of a sweep."""

from components.deployment.export_winner.component import export_winner

__all__ = ["export_winner"]
