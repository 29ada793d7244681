"""Student that passes what the recipe asks to MLflow's champion."""

from components.deployment.promote.component import promote

__all__ = ["promote"]
