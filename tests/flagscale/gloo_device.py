"""One gloo device for all process groups of a test's process.

Each group otherwise makes its own, with a thread that takes 10 ms to end; Megatron-Core makes 21
groups at a start, and the tests start it a thousand times.
"""

import functools
import os
from datetime import timedelta

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d


@functools.cache
def _device(_process: int) -> ProcessGroupGloo.Device:
    return ProcessGroupGloo.create_default_device()


class _OnSharedDevice(ProcessGroupGloo):
    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices = [_device(os.getpid())]  # after a fork another: threads stay behind
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def share() -> None:
    """From now on, in this process and its forks."""
    distributed_c10d.ProcessGroupGloo = _OnSharedDevice
