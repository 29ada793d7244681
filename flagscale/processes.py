"""Which process is which on this machine, and what this one took."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

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


def peak_memory() -> int:
    """The most memory that this process has held, bytes, or since `forget_peak_memory`.

    Not of `getrusage`: its figure is also the one of whoever started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forget_peak_memory() -> None:
    """Let `peak_memory` begin anew; where the system does not, it stays what it was."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
