"""How much memory the ranks took at most."""

from __future__ import annotations

from pathlib import Path

import torch

from flagscale.megatron import platform


def host_peak() -> int:
    """The most memory that this process has held, bytes.

    Not of `getrusage`: its figure is also the one of whoever started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_memory() -> dict[str, list[int]]:
    """What each rank held at most, bytes by rank. All ranks call it, within the runtime.

    Returns:
        `host`, resident memory of the process with its libraries, and on GPUs `device`, what torch
        had allocated there.
    """
    mine = {"host": host_peak()}
    if platform.HAS_GPU:
        mine["device"] = torch.cuda.max_memory_allocated()
    every: list[dict[str, int]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return {place: [rank[place] for rank in every] for place in mine}
