"""A run's values, checked before anything else."""
