"""The checkpoints of a training.

They keep what an interrupted training needs to go on as if nothing had happened, on the same number
of processes or on another. A checkpoint is written into a folder that no reader looks at, renamed
when it is whole, and only then becomes the latest: a kill at any point leaves the one before.
"""

from flagscale.train.checkpoints.training_checkpoints import TrainingCheckpoints
from flagscale.train.checkpoints.training_state import CURVES, TrainingState

__all__ = ["CURVES", "TrainingCheckpoints", "TrainingState"]
