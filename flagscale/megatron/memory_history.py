"""What filled the GPU's memory: torch's record of allocations, written when it runs out.

Open the file at https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from flagscale.errors import UserError
from flagscale.megatron import platform

logger = logging.getLogger(__name__)

# Allocations and frees that are kept, the last ones: some steps of a large model.
_MAX_ENTRIES = 100_000


@functools.cache  # one observer a process, however many chunks of a model it builds
def record_memory_history(path: Path) -> None:
    """Record allocations from now on, and write a snapshot when memory runs out.

    Args:
        path: of the snapshot; the rank is added to its name.

    Raises:
        UserError: there is no GPU.
    """
    if not platform.HAS_GPU:
        raise UserError(
            "training.record_memory_history=true records a GPU's memory, and there is no GPU here; "
            "set it to false"
        )
    torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)

    def write(device: int, alloc: int, device_alloc: int, device_free: int) -> None:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        logger.error(
            "GPU %d is out of memory: %d bytes asked for, %d allocated, %d free",
            device,
            alloc,
            device_alloc,
            device_free,
        )
        write_snapshot(torch.cuda.memory._snapshot(), path, rank)

    torch._C._cuda_attach_out_of_memory_observer(write)  # type: ignore[attr-defined]


def write_snapshot(snapshot: Any, path: Path, rank: int) -> Path:  # noqa: ANN401 - torch's
    """Write a snapshot whole or not at all.

    Args:
        snapshot: what torch's viewer reads.
        path: where to, without the rank.
        rank: of this process; ranks that run out together do not overwrite one another.

    Returns:
        The file: `memory-snapshot.pickle` becomes `memory-snapshot-rank3.pickle`.
    """
    target = path.with_name(f"{path.stem}-rank{rank}{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            pickle.dump(snapshot, stream)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    logger.error("memory snapshot: %s; open it at https://pytorch.org/memory_viz", target)
    return target
