"""How many processor cores this process may keep busy."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path, PurePosixPath

_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_cores(groups: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> float:
    """The cores that the scheduler lets this process have, at most what its control groups pay for.

    A pod's `limits.cpu` is time, not cores: the process sees all of the node's. With a thread for
    each of them, the time of a whole period is spent at once, and threads then stand still, those
    included that others wait for: a step takes many times as long as with fewer threads.

    Args:
        groups: where control groups are mounted.
        membership: the groups of this process; see cgroups(7).

    Returns:
        A fraction where the limit is one; without limits, the cores of the process' affinity.
    """
    cores = float(len(os.sched_getaffinity(0)))
    with contextlib.suppress(OSError):  # without /proc or control groups nothing is limited
        for line in membership.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            mount = groups / controllers if controllers else groups
            # The limits of all groups above hold too. Inside a container the path may be the
            # node's, of which the container sees its own group alone, as the mount's root.
            for group in (PurePosixPath(path), *PurePosixPath(path).parents):
                cores = min(cores, _limit(mount / group.relative_to("/")))
    return cores


def _limit(group: Path) -> float:
    """Of one control group: cpu.max of version 2, cpu.cfs_* of version 1."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
    except OSError:
        return float("inf")
    return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
