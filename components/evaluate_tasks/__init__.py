"""The step evaluate-tasks."""
