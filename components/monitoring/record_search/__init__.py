"""The step that completes a search's run in MLflow."""

from components.monitoring.record_search.component import record_search

__all__ = ["record_search"]
