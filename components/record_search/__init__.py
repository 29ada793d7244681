"""The step that completes a search's run in MLflow."""
