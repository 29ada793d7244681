"""The teacher's outputs: what cache-teacher writes and trainings check."""
