"""What each chunk of this rank reads of a dataset: its data-parallel share, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from flagscale.data.loader import prepare_index, train_iterator, validation_batches
from flagscale.megatron.arguments import Arguments
from flagscale.recipe import TrainingRecipe
from flagscale.train.batches import ChunkBatches, reads_data


class RankBatches:
    """What each chunk of this rank reads of the dataset: its data-parallel share, or nothing."""

    def __init__(
        self, dataset: Path, cache: Path, args: Arguments, training: TrainingRecipe
    ) -> None:
        """Build the index on one rank, before the others read it."""
        self._dataset, self._cache, self._args, self._training = dataset, cache, args, training
        if torch.distributed.get_rank() == 0:
            prepare_index(dataset, cache)
        torch.distributed.barrier()
        self._share: dict[str, Any] = {
            "micro_batch_size": args.micro_batch_size,
            "global_batch_size": args.global_batch_size,
            "data_parallel_rank": parallel_state.get_data_parallel_rank(),
            "data_parallel_size": parallel_state.get_data_parallel_world_size(),
            "reset_attention_mask": args.reset_attention_mask,
        }
        count = args.parallelism.virtual_pipeline_model_parallel_size
        stages = [None] if count is None else list(range(count))
        self._reads = [reads_data(args, stage) for stage in stages]

    def train(self, start_step: int) -> ChunkBatches:
        """From `start_step` on."""

        def iterator() -> Iterator[dict[str, torch.Tensor]]:
            return train_iterator(
                self._dataset,
                self._cache,
                seed=self._training.seed,
                start_step=start_step,
                **self._share,
            )

        return [iterator() if reads else None for reads in self._reads]

    def validation(self) -> ChunkBatches:
        """From the first on, at every call."""

        def iterator() -> Iterator[dict[str, torch.Tensor]]:
            batches = validation_batches(
                self._dataset, self._cache, eval_iters=self._training.eval_iters, **self._share
            )
            return iter(batches)

        return [iterator() if reads else None for reads in self._reads]
