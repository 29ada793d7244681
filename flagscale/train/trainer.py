"""A model with what trains it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True)
class Trainer:
    """A model with what trains it.

    Attributes:
        chunks: this rank's chunks of the model: one, or several of an interleaved pipeline.
        optimizer: of all chunks.
        scheduler: of its learning rate.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
