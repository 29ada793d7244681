"""Names for processes that stay right when the system gives a number to another process."""

from __future__ import annotations

import os

import psutil


def this_process() -> str:
    """`<pid>:<start time>` of this process, the time in seconds since the epoch."""
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
