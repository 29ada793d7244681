"""Which process is which, on this machine."""

from __future__ import annotations

import os

import psutil

RUNNER_VARIABLE = "FLAGSCALE_RUNNER"  # the runner's `this_process()`: a step ends with its runner


def this_process() -> str:
    """`<pid>:<start time>`: stays right when the system gives the number to another process."""
    return f"{os.getpid()}:{psutil.Process().create_time():.0f}"


def is_alive(process: str) -> bool:
    """Whether the process that `this_process` named still runs on this machine."""
    pid, started = process.split(":")
    try:
        found = psutil.Process(int(pid))
        same = abs(found.create_time() - float(started)) < 2
        return same and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
