"""Cached steps of a sweep in MLflow, and the end of its run."""

from components.monitoring.record_sweep.component import record_sweep

__all__ = ["record_sweep"]
