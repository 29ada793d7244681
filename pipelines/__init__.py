"""The pipeline: what runs after what, and on which resources. Run with `python -m pipelines`."""
