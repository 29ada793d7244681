"""Cached steps of a sweep in MLflow, and the end of its run."""
