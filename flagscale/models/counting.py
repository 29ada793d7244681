"""How large a model is as a whole, counted from the tensors that the ranks hold."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.models.gpt import GPTModel

from flagscale.checkpoint.weights import sharded_weights
from flagscale.megatron import platform


def count_parameters(model: GPTModel) -> int:
    """Numbers that the whole model learns. All ranks call it.

    What several ranks hold, as norms and the tied embedding of a pipeline's ends, counts once.

    Args:
        model: this rank's part, as built.
    """
    learned = {name for name, _ in model.named_parameters()}
    mine = sum(
        tensor.data.numel()
        for name, tensor in sharded_weights(model).items()
        if name in learned and is_main_replica(tensor.replica_id)
    )
    return _sum(mine, torch.distributed.group.WORLD)


def count_layers(model: GPTModel) -> int:
    """Layers of the whole model. All ranks call it."""
    return _sum(len(model.decoder.layers), parallel_state.get_pipeline_model_parallel_group())


def _sum(mine: int, group: torch.distributed.ProcessGroup | None) -> int:
    total = torch.tensor(mine, dtype=torch.int64, device=platform.device())
    torch.distributed.all_reduce(total, group=group)
    return int(total)
