"""A model with what trains it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Every rank has the newest parameters, for what is no training step. All ranks call it.

        With `overlap_param_gather` a rank gathers what the others have stepped in the next forward
        pass, layer by layer; till then its own copy is old.
        """
        chunks = [chunk for chunk in self.chunks if chunk.use_forward_hook]
        for chunk in chunks:
            chunk.disable_forward_pre_hook()
        yield
        for chunk in chunks:
            chunk.enable_forward_pre_hook()
