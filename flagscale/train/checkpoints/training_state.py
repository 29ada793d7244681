"""What a training checkpoint holds, in a form that another layout can read.

Tensors (weights, projections of the distillation loss, the optimiser's moments) are stored under
their place in the whole model (see `sharded_optimizer`). Of the optimiser's parameter groups only
the step is stored: how parameters are grouped depends on the layout, and the rest is the recipe's
or the scheduler's. Random states are each rank's own; another layout keeps its freshly seeded ones,
and draws other dropout masks.

ModelOpt's mode `kd_loss` is not stored: a resumed training builds it anew from its recipe, and only
its projections are read.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from flagscale.checkpoint.agreement import is_first_rank
from flagscale.checkpoint.reading import load
from flagscale.checkpoint.weights import by_chunk, load_chunks, sharded_model
from flagscale.train.checkpoints import sharded_optimizer, torch_adam

if TYPE_CHECKING:
    from flagscale.train.trainer import Trainer

logger = logging.getLogger(__name__)

CURVES = ("training.jsonl", "validation.jsonl")
_RNG = "rng_state"


@dataclass
class TrainingState:
    """Where training stands, beside the tensors.

    Attributes:
        step: optimiser steps done; the position in the data follows from it.
        training: one record a step.
        validation: one record a validation.
    """

    step: int = 0
    training: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)

    @property
    def median_speed(self) -> float | None:
        """Tokens a second of all ranks together; None before the first step."""
        speeds = sorted(record["tokens per second"] for record in self.training)
        return speeds[len(speeds) // 2] if speeds else None

    def write(self, folder: Path) -> None:
        """Write the curves, a line a record: training.jsonl and validation.jsonl."""
        for name, records in zip(CURVES, (self.training, self.validation), strict=True):
            lines = [json.dumps(record) + "\n" for record in records]
            (folder / name).write_text("".join(lines), encoding="utf-8")


def layout() -> dict[str, int]:
    """Sizes of the process groups."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def sharded_state(trainer: Trainer) -> dict[str, Any]:
    """What to save. All ranks call it."""
    weights = by_chunk(trainer.chunks, sharded_model)
    optimizer = sharded_optimizer.sharded_state(trainer.optimizer, weights)
    steps = [_detach_groups(part) for part in optimizer]  # equal
    return {
        **weights,
        "optimizer": _named(optimizer),
        "optimizer_step": steps[0],
        "opt_param_scheduler": trainer.scheduler.state_dict(),
        "large_losses": _large_losses(),
        _RNG: _sharded_rng(_rng_state()),
    }


def load_state(trainer: Trainer, folder: Path, written_on: dict[str, int]) -> None:
    """Read what `sharded_state` gave. All ranks call it.

    Args:
        trainer: of the same training, on any layout.
        folder: of the checkpoint.
        written_on: the `layout` that wrote it.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another training.
    """
    weights = by_chunk(trainer.chunks, sharded_model)
    torch_adam.begin(trainer.optimizer)
    optimizer = sharded_optimizer.sharded_state(trainer.optimizer, weights, is_loading=True)
    for part in optimizer:
        _detach_groups(part)
    asked = {**weights, "optimizer": _named(optimizer)}
    same_ranks = written_on == layout()
    if same_ranks:
        asked[_RNG] = _sharded_rng(None)
    loaded = load(asked, folder, may_lack=lambda name: name == _RNG and not same_ranks)
    load_chunks(trainer.chunks, loaded, strict=True)
    parts = [loaded["optimizer"][name] for name in _named(optimizer)]
    for one, part in zip(sharded_optimizer.inside(trainer.optimizer), parts, strict=True):
        is_torch = isinstance(one.optimizer, torch.optim.Adam | torch.optim.AdamW)
        _attach_step(part, loaded["optimizer_step"], is_torch=is_torch)
    with torch_adam.step_apart(trainer.optimizer):
        sharded_optimizer.load(trainer.optimizer, parts)
    trainer.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    _set_large_losses(loaded["large_losses"])
    if same_ranks:
        _set_rng_state(loaded[_RNG])
    elif is_first_rank():
        logger.info(
            "the checkpoint was written on another layout (%s): random states start anew",
            ", ".join(f"{name} {size}" for name, size in written_on.items()),
        )


def load_best_weights(trainer: Trainer, folder: Path) -> None:
    """Read the weights alone, into a trainer that will not go on. All ranks call it.

    Raises:
        UserError: the checkpoint is missing, damaged, or of another training.
    """
    weights = by_chunk(trainer.chunks, sharded_model)
    loaded = load(weights, folder, lambda name: name == _RNG or name.startswith("optimizer."))
    load_chunks(trainer.chunks, loaded, strict=True)


def _named(optimizers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """States of the optimisers inside under names of this state; the tensors have their own."""
    return {str(number): one for number, one in enumerate(optimizers)}


def _of_torch(part: dict[str, Any]) -> dict[str, Any]:
    """Of one such state, the part that is torch's, as in its `Optimizer.state_dict`."""
    inner: dict[str, Any] = part.get("optimizer", part)
    return inner


def _detach_groups(part: dict[str, Any]) -> float | None:
    """Keep what depends on the layout, parameter groups, out of the checkpoint, in place.

    Returns:
        The step, which a plain optimiser keeps with the parameters if it is torch's, and otherwise
        with the groups; None before the first.
    """
    inner = _of_torch(part)
    groups = inner["param_groups"]
    for group in groups:
        if isinstance(group.get("params"), LocalNonpersistentObject):
            group["params"] = group["params"].unwrap()
    inner["param_groups"] = LocalNonpersistentObject(groups)
    step = inner.get("state", {}).pop("common_step", None)
    if step is None:
        step = next((group["step"] for group in groups if "step" in group), None)
    return None if step is None else float(step)


def _attach_step(part: dict[str, Any], step: float | None, *, is_torch: bool) -> None:
    """Put the step where the optimiser expects it.

    Args:
        part: of the state.
        step: from `_detach_groups`, perhaps of an optimiser that keeps it elsewhere.
        is_torch: the optimiser is torch's Adam, not transformer-engine's.
    """
    inner = _of_torch(part)
    if step is None:
        return
    if is_torch and "state" in inner:
        inner["state"]["common_step"] = torch.tensor(step)
        return
    for group in inner["param_groups"]:
        group["step"] = step if is_torch else int(step)


def _rng_state() -> dict[str, Any]:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    return states


def _set_rng_state(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def _sharded_rng(state: dict[str, Any] | None) -> ShardedObject:
    """Every rank's own."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return ShardedObject(_RNG, state, global_shape=(world_size,), global_offset=(rank,))


def _large_losses() -> dict[str, dict[str, float]]:
    """What the rerun state machine compares a loss with: the largest that any rank has seen.

    Nothing else of it outlives a step.
    """
    machine = get_rerun_state_machine()
    mine = {"counts": dict(machine.large_value_counts), "values": dict(machine.max_values)}
    told: list[dict[str, dict[str, float]]] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, mine)
    return {
        kind: {
            name: max(one[kind][name] for one in told if name in one[kind])
            for name in sorted({name for one in told for name in one[kind]})
        }
        for kind in mine
    }


def _set_large_losses(large: dict[str, dict[str, Any]]) -> None:
    machine = get_rerun_state_machine()
    machine.large_value_counts = dict(large["counts"])
    machine.max_values = dict(large["values"])
