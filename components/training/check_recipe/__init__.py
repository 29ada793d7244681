"""A run's values, checked before anything else."""

from components.training.check_recipe.component import check_recipe

__all__ = ["check_recipe"]
