"""Weights and training checkpoints in Megatron-Core's distributed format.

`save_weights` and `load_weights` are for a model alone. `TrainingCheckpoints` keeps what an
interrupted training needs to go on as if nothing had happened, on the same number of processes or
on another. A checkpoint is written into a folder that no reader looks at, renamed when it is whole,
and only then becomes the latest: a kill at any point leaves the one before.
"""

from flagscale.checkpoint.training import TrainingCheckpoints
from flagscale.checkpoint.training_state import TrainingState
from flagscale.checkpoint.weights import load_weights, save_weights

__all__ = ["TrainingCheckpoints", "TrainingState", "load_weights", "save_weights"]
