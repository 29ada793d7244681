"""Cached steps of a sweep or a search in MLflow, and the end of its run."""

from components.monitoring.record_many.component import record_many

__all__ = ["record_many"]
