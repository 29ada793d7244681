"""Reads a distributed checkpoint, on the layout that wrote it or on another.

Ranks that need the same read it once between them: each of a data-parallel group reads a share, and
hands it on.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    load_sharded_metadata,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import FileSystemReader

from flagscale.checkpoint.agreement import last_line, same_outcome
from flagscale.errors import UserError

_READING = "cannot be read"
_NAMES_TOLD = 3


def load(
    sharded_state: dict[str, Any],
    folder: Path,
    may_lack: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Read a checkpoint. All ranks call it; all raise, or none.

    Args:
        sharded_state: this rank's tensors to read into, and objects.
        folder: of the checkpoint.
        may_lack: which of the checkpoint's tensors, by name, may be left unread.

    Returns:
        The state, with what was common to all ranks.

    Raises:
        UserError: there is no checkpoint, it is incomplete or damaged, or it has other tensors or
            shapes than are asked for.
    """
    with same_outcome(folder, _READING):
        _check_files(folder)
        _check_names(sharded_state, folder)
    with same_outcome(folder, _READING):
        try:
            state, unread, _ = dist_checkpointing.load(
                sharded_state,
                str(folder),
                sharded_strategy=FullyParallelLoadStrategyWrapper(
                    get_default_load_sharded_strategy(str(folder)),
                    parallel_state.get_data_parallel_group(with_context_parallel=True),
                ),
                strict=StrictHandling.RETURN_ALL,
            )
        except (CheckpointingException, RuntimeError, ValueError, EOFError) as error:
            raise UserError(f"{folder}: the checkpoint {_READING}: {last_line(error)}") from error
        left = sorted(name for name in unread if not may_lack(name))
        if left:
            raise UserError(
                f"{folder}: the checkpoint {_READING}: it is of another model or training, with "
                f"{_told(left)}"
            )
    loaded: dict[str, Any] = state
    return loaded


def _check_names(sharded_state: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that lacks what this rank asks for."""
    asked, _ = extract_sharded_base(load_preprocess(sharded_state)[0])
    there = {one.key for one in load_sharded_metadata(str(folder)).values()}
    lacking = {one.key for one in nested_values(asked)} - there
    if lacking:
        raise UserError(f"{folder}: the checkpoint {_READING}: it lacks {_told(lacking)}")


def _told(names: set[str] | list[str]) -> str:
    some = sorted(names)[:_NAMES_TOLD]
    more = len(names) - len(some)
    return ", ".join(some) + (f" and {more} more" if more else "")


def _check_files(folder: Path) -> None:
    """Read the small files, which every rank reads by itself, before ranks depend on each other."""
    try:
        is_complete = dist_checkpointing.check_is_distributed_checkpoint(str(folder))
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'metadata.json'}: is damaged: {error}") from error
    if not is_complete:
        raise UserError(f"{folder}: no complete checkpoint here (metadata.json is missing)")
    for name, read in (
        (COMMON_STATE_FNAME, lambda path: torch.load(path, map_location="cpu")),
        (".metadata", lambda path: FileSystemReader(path.parent).read_metadata()),
    ):
        try:
            read(folder / name)
        except FileNotFoundError:
            raise UserError(f"{folder}: the checkpoint {_READING}: {name} is missing") from None
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder}: the checkpoint {_READING}: {name} is damaged") from error
