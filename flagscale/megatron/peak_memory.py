"""How much memory the ranks took at most."""

from __future__ import annotations

import torch

from flagscale import processes
from flagscale.megatron import platform


def peak_memory() -> dict[str, list[int]]:
    """What each rank held at most, bytes by rank. All ranks call it, within the runtime.

    Returns:
        `host`, resident memory of the process with its libraries, and on GPUs `device`, what torch
        had allocated there.
    """
    mine = {"host": processes.peak_memory()}
    if platform.HAS_GPU:
        mine["device"] = torch.cuda.max_memory_allocated()
    every: list[dict[str, int]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return {place: [rank[place] for rank in every] for place in mine}
