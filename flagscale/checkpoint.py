"""Weights and training checkpoints in Megatron-Core's distributed format.

`save_weights` and `load_weights` are for a model alone. `TrainingCheckpoints` keeps what an
interrupted training needs to go on as if nothing had happened. A checkpoint is written into a
folder that no reader looks at, renamed when it is whole, and only then becomes the latest: a kill
at any point leaves the one before.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from flagscale.artifacts import disk_full, is_disk_full, write_json
from flagscale.errors import UserError

if TYPE_CHECKING:
    from flagscale.train.setup import Trainer

logger = logging.getLogger(__name__)

_LATEST = "latest.json"
_KEPT = 2
_NOTHING_FREE = 2**16  # bytes


def save_weights(chunks: GPTModel | Sequence[GPTModel], folder: Path) -> None:
    """Write a model's weights as a distributed checkpoint. All ranks call it.

    Args:
        chunks: this rank's part of the model, wrapped or not.
        folder: is made.

    Raises:
        UserError: the disk is full.
    """
    _save(_by_chunk(chunks, _weights), folder)


def load_weights(chunks: GPTModel | Sequence[GPTModel], folder: Path) -> None:
    """Read weights that `save_weights` wrote, on any layout, into a model of the same shape.

    All ranks call it.

    Raises:
        UserError: there is no checkpoint, or it has other tensors or shapes than the model.
    """
    state = _load(_by_chunk(chunks, _weights), folder)
    for name, chunk in _named_chunks(chunks).items():
        # Not strict because of what `_weights` leaves out; that all the rest is there has been
        # checked against the checkpoint.
        unwrap_model(chunk).load_state_dict(state[name], strict=False)


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


class TrainingCheckpoints:
    """The checkpoints of one training run, in one folder."""

    def __init__(self, folder: Path) -> None:
        """Use `folder`, which need not exist yet."""
        self.folder = folder

    def save(self, state: TrainingState, trainer: Trainer) -> None:
        """Write a checkpoint, make it the latest, and delete all but the newest two.

        All ranks call it.

        Raises:
            UserError: the disk is full; the checkpoint before is untouched.
        """
        name = f"step-{state.step:08d}"
        partial, final = self.folder / f".{name}.partial", self.folder / name
        if final.exists():
            return
        if _is_first_rank():
            for stale in self.folder.glob(".step-*.partial"):
                shutil.rmtree(stale)
        _save(_sharded_state(trainer), partial / "state")
        if _is_first_rank():
            history = {"training": state.training, "validation": state.validation}
            _explaining_full_disk(lambda: write_json(partial / "history.json", history), partial)
            os.replace(partial, final)
            write_json(self.folder / _LATEST, {"step": state.step, "folder": name})
            for old in sorted(self.folder.glob("step-*"))[:-_KEPT]:
                shutil.rmtree(old)
        torch.distributed.barrier()

    def poll(self) -> None:
        """Finish a checkpoint that has been written meanwhile. All ranks call it after a step."""

    def wait(self) -> None:
        """Wait for the checkpoint that is being written. All ranks call it."""

    def restore(self, trainer: Trainer) -> TrainingState:
        """Load the latest checkpoint, if there is one, and say where training stands.

        Raises:
            UserError: the latest checkpoint cannot be read.
        """
        try:
            latest = json.loads((self.folder / _LATEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return TrainingState()
        folder = self.folder / latest["folder"]
        loaded = _load(_sharded_state(trainer, is_loading=True), folder / "state")
        for name, chunk in _named_chunks(trainer.chunks).items():
            unwrap_model(chunk).load_state_dict(loaded[name])
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        trainer.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        torch.set_rng_state(loaded["rng_state"])
        history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
        return TrainingState(latest["step"], history["training"], history["validation"])


def _is_first_rank() -> bool:
    return torch.distributed.get_rank() == 0


def _named_chunks(chunks: GPTModel | Sequence[GPTModel]) -> dict[str, GPTModel]:
    """Chunks under the names that Megatron gives them in a checkpoint."""
    if not isinstance(chunks, Sequence):
        return {"model": chunks}
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{index}": chunk for index, chunk in enumerate(chunks)}


def _by_chunk(
    chunks: GPTModel | Sequence[GPTModel], state_of: Callable[[GPTModel], dict[str, Any]]
) -> dict[str, Any]:
    return {name: state_of(unwrap_model(chunk)) for name, chunk in _named_chunks(chunks).items()}


def _weights(model: GPTModel) -> dict[str, Any]:
    """The sharded tensors that are the model, whatever its layers are implemented with.

    Without transformer-engine's extra states (FP8 scales), which a model of local layers lacks, and
    without a distillation model's projections, which are trained but are no part of the student.
    """
    return {
        name: tensor
        for name, tensor in model.sharded_state_dict().items()
        if not name.endswith("_extra_state") and not name.startswith("_loss_modules.")
    }


def _sharded_state(trainer: Trainer, is_loading: bool = False) -> dict[str, Any]:
    weights = _by_chunk(trainer.chunks, lambda chunk: chunk.sharded_state_dict())
    return {
        **weights,
        "optimizer": trainer.optimizer.sharded_state_dict(weights, is_loading=is_loading),
        "opt_param_scheduler": trainer.scheduler.state_dict(),
        "rng_state": torch.get_rng_state(),
    }


def _save(sharded_state: dict[str, Any], folder: Path) -> None:
    if _is_first_rank():
        folder.mkdir(parents=True)
    torch.distributed.barrier()
    # Megatron-Core hands the writers' results on through a manager process, which takes two seconds
    # to start and outlives a kill for ever. We save synchronously: a queue in this process will do.
    filesystem_async._results_queue = queue.Queue()
    _explaining_full_disk(lambda: dist_checkpointing.save(sharded_state, str(folder)), folder)


def _load(sharded_state: dict[str, Any], folder: Path) -> dict[str, Any]:
    if not dist_checkpointing.check_is_distributed_checkpoint(str(folder)):
        raise UserError(f"{folder}: no complete checkpoint here (metadata.json is missing)")
    try:
        state: dict[str, Any] = dist_checkpointing.load(
            sharded_state, str(folder), strict=StrictHandling.RAISE_ALL
        )
    except (CheckpointingException, CheckpointException, RuntimeError, OSError) as error:
        last_line = str(error).strip().splitlines()[-1]
        raise UserError(f"{folder}: the checkpoint cannot be read: {last_line}") from error
    return state


def _explaining_full_disk(write: Callable[[], None], folder: Path) -> None:
    try:
        write()
    except (Exception, CheckpointException) as error:
        # Torch passes on a writer's error as text, or says only that writing failed.
        text = os.strerror(errno.ENOSPC)
        nothing_free = shutil.disk_usage(folder).free < _NOTHING_FREE
        if is_disk_full(error) or text in str(error) or nothing_free:
            raise disk_full(folder) from error
        if isinstance(error, CheckpointException):  # torch's is no Exception
            raise RuntimeError(f"{folder}: the checkpoint was not written: {error}") from error
        raise
