"""How much memory the ranks took at most."""

from __future__ import annotations

import torch

from flagscale import processes
from flagscale.megatron import platform

_before: dict[str, int] = {}  # what was forgotten


def own_peak_memory() -> dict[str, int]:
    """What this process held at most, bytes; see `peak_memory`."""
    since = _since()
    return {place: max(held, _before.get(place, 0)) for place, held in since.items()}


def measure_peak_anew() -> None:
    """Begin to measure `peak_since`; what was held before still counts for `peak_memory`."""
    _before.update(own_peak_memory())
    processes.forget_peak_memory()
    if platform.HAS_GPU:
        torch.cuda.reset_peak_memory_stats()


def peak_since() -> int:
    """The most since `measure_peak_anew`, bytes: of the accelerator, where there is one."""
    since = _since()
    return since.get("device", since["host"])


def _since() -> dict[str, int]:
    held = {"host": processes.peak_memory()}
    if platform.HAS_GPU:
        held["device"] = torch.cuda.max_memory_allocated()
    return held


def peak_memory() -> dict[str, list[int]]:
    """What each rank held at most, bytes by rank. All ranks call it, within the runtime.

    Returns:
        `host`, resident memory of the process with its libraries, and on GPUs `device`, what torch
        had allocated there.
    """
    mine = own_peak_memory()
    every: list[dict[str, int]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    return {place: [rank[place] for rank in every] for place in mine}
