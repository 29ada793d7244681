"""Cached steps in MLflow, and the end of its run."""
