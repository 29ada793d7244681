"""How much energy the ranks took: what each GPU counts, or of CPUs an estimate that says so."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

logger = logging.getLogger(__name__)

MEASURED = "counted by each GPU (NVML), without the hosts; of the last attempt"
# A server's core at work takes 3 to 10 W, with its share of caches, memory controller and fans.
_WATTS_A_CORE = 5.0
ESTIMATED = (
    f"an estimate: {_WATTS_A_CORE:g} W for each second that a core computed, which machines differ "
    "from by a factor of two; of the last attempt"
)
UNKNOWN = "not known: the GPUs have no counter of it that NVML can read"

_at_begin: list[float | None] = []


def begin() -> None:
    """Count from here. Each rank calls it."""
    _at_begin[:] = [_reading()]


def energy() -> dict[str, Any]:
    """What each rank took since `begin`. All ranks call it, within the runtime.

    Returns:
        `joules` by rank, and `from`, how they are known; without `joules` where they are not.
    """
    now, then = _reading(), _at_begin[0] if _at_begin else None
    mine = None if now is None or then is None else now - then
    every: list[float | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    if any(one is None for one in every):
        return {"from": UNKNOWN}
    return {"joules": every, "from": MEASURED if torch.cuda.is_available() else ESTIMATED}


def _reading() -> float | None:
    """Joules up to now, from a beginning of its own."""
    if not torch.cuda.is_available():
        return _WATTS_A_CORE * time.process_time()
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
    except Exception as error:  # no library or driver, a part of a GPU, a GPU before Volta
        logger.debug("no energy: %s", error)
        return None
