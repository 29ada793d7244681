"""Cached steps in MLflow, and the end of its run."""

from components.monitoring.record_run.component import record_run

__all__ = ["record_run"]
