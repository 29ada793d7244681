"""Figures of the machines while they work, sampled by MLflow's own monitors, kept by our outbox.

MLflow's own sampler ends with the first request that its server does not answer. A node tells of
itself once for all its ranks: CPU, memory, disk, network, and every GPU, which is a rank each.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flagscale.tracking.run import StepRun

logger = logging.getLogger(__name__)

_FIRST_SECONDS = 10.0  # between samples
_SHARE = 1 / 500  # of the time that has passed, later on: days of work take some thousand samples


def is_nodes_first_rank() -> bool:
    """Whether this process speaks for its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def system_metrics(run: StepRun) -> Iterator[None]:
    """Sample this machine into a run, in a thread, while the body works."""
    if not run.is_tracked or not is_nodes_first_rank():
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_sample, args=(run, over), daemon=True, name="system-metrics")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _sample(run: StepRun, over: threading.Event) -> None:
    try:
        monitors, prefix = _monitors(), _prefix()
    except Exception as error:  # whatever a driver raises: the work goes on
        logger.warning("this machine is not watched: %s", error)
        return
    for monitor in monitors:
        _figures(monitor)  # how busy a processor is psutil knows from the second time on
    began, count = time.monotonic(), 0
    while not over.wait(max(_FIRST_SECONDS, (time.monotonic() - began) * _SHARE)):
        figures: dict[str, float] = {}
        for monitor in monitors:
            figures |= _figures(monitor)
        first = run.begun.samples if run.begun else 0
        run.log_metrics({f"{prefix}{name}": v for name, v in figures.items()}, step=first + count)
        count += 1


def _figures(monitor: Any) -> dict[str, float]:  # noqa: ANN401 - one of MLflow's
    try:
        monitor.collect_metrics()
        figures: dict[str, float] = monitor.aggregate_metrics()
        monitor.clear_metrics()
    except Exception as error:  # whatever a driver raises; the other monitors go on
        logger.debug("%s: %s", type(monitor).__name__, error)
        return {}
    return figures


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception:  # no NVIDIA GPU, or no driver
        logger.debug("no NVIDIA GPU to watch")
    return monitors


def _prefix() -> str:
    """With the node's name where there are several."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    return f"system/node-{os.environ['GROUP_RANK']}/" if nodes > 1 else "system/"
