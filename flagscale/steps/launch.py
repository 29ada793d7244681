"""Runs a step's function on several processes of this machine, under torchrun.

The step's process starts torchrun and waits; each rank is `python -m flagscale.steps.launch STEP
MODULE:FUNCTION` and calls the function. What goes there and comes back are JSON values in files. A
signal to the step is passed on to every rank, which saves and ends; a rank's error becomes the
step's.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from flagscale.artifacts import write_json
from flagscale.errors import Interrupted, UserError
from flagscale.processes import (
    FOLDER_VARIABLE,
    RUNNER_VARIABLE,
    is_alive,
    read_error,
    read_process,
    this_process,
)
from flagscale.steps.step_process import (
    EXIT_INTERRUPTED,
    deferred_stop,
    step_process,
    stop_requested,
)

logger = logging.getLogger(__name__)

_REQUEST_VARIABLE = "FLAGSCALE_REQUEST"
_EXIT_CODE = "exit-code"
_POLL_SECONDS = 0.2


def is_rank() -> bool:
    """Whether this process is one of several that torchrun, or a cluster's launcher, started."""
    return "WORLD_SIZE" in os.environ


def is_first_rank() -> bool:
    """Whether this process speaks for all: it alone writes small files, logs and tracks."""
    return int(os.environ.get("RANK", "0")) == 0


def run_on_ranks(
    step: str,
    function: str,
    request: dict[str, Any],
    processes: int,
) -> Any:  # noqa: ANN401 - any JSON value
    """Call a function in as many processes, and give back what the first of them returned.

    Args:
        step: its name, for the log.
        function: `module:name`; its result is a JSON value.
        request: its keyword arguments, JSON values.
        processes: ranks, all on this machine.

    Raises:
        UserError: a rank failed; the message is that of the first one to fail.
        Interrupted: this process was asked to stop, and the ranks have stopped.
    """
    with tempfile.TemporaryDirectory(prefix="flagscale-ranks-") as name:
        folder = Path(name)
        write_json(folder / "request.json", request)
        command = [
            *(sys.executable, "-m", "flagscale.steps.torchrun", "--standalone"),
            *("--nproc-per-node", str(processes)),
            *("--module", "flagscale.steps.launch", step, function),
        ]
        logger.info("starting %d processes", processes)
        with deferred_stop():
            torchrun = subprocess.Popen(command, env=_environment(folder, processes))  # noqa: S603
            try:
                _wait(torchrun, folder)
            finally:
                _end(torchrun)
        return _outcome(folder, torchrun.returncode)


def _work(step: str, function: str) -> None:
    """The whole life of one rank."""
    folder = Path(os.environ[_REQUEST_VARIABLE])
    mine = folder / os.environ["RANK"]
    mine.mkdir()
    os.environ[FOLDER_VARIABLE] = str(mine)
    if not is_first_rank():
        os.environ["FLAGSCALE_LOG_LEVEL"] = "WARNING"
    try:
        with step_process(step, is_rank=True):
            request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
            module, name = function.split(":")
            result = getattr(importlib.import_module(module), name)(**request)
            if is_first_rank():
                write_json(folder / "result.json", result)
    except SystemExit as error:
        write_json(mine / _EXIT_CODE, error.code)
        raise


def _environment(folder: Path, processes: int) -> dict[str, str]:
    """Of the ranks: they end when this process does, and share its cores."""
    cores = len(os.sched_getaffinity(0))
    return {
        "OMP_NUM_THREADS": str(max(1, cores // processes)),
        # Communication is then issued before the computation that it overlaps with.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        **os.environ,
        _REQUEST_VARIABLE: str(folder),
        RUNNER_VARIABLE: this_process(),
    }


def _wait(torchrun: subprocess.Popen[bytes], folder: Path) -> None:
    """Until torchrun ends, passing a request to stop on to every rank, once.

    Not to torchrun: that gives its ranks 30 seconds, and a checkpoint may take longer.
    """
    told = False
    while torchrun.poll() is None:
        if stop_requested() and not told:
            told = _tell_ranks(folder)
        time.sleep(_POLL_SECONDS)


def _tell_ranks(folder: Path) -> bool:
    """SIGTERM to each rank; whether there was one that listens already."""
    ranks = [read_process(path) for path in folder.iterdir() if path.is_dir()]
    found = [process for process in ranks if process is not None and is_alive(process)]
    for process in found:
        os.kill(int(process.split(":")[0]), signal.SIGTERM)
    return bool(found)


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    if torchrun.poll() is None:
        for process in psutil.Process(torchrun.pid).children(recursive=True):
            process.kill()
        torchrun.kill()
        torchrun.wait()


def _outcome(folder: Path, code: int) -> Any:  # noqa: ANN401 - any JSON value
    if code == 0:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    failed = sorted(folder.glob(f"*/{_EXIT_CODE}"), key=lambda path: path.stat().st_mtime_ns)
    interrupted = [p for p in failed if json.loads(p.read_text()) == EXIT_INTERRUPTED]
    if stop_requested() and failed == interrupted:
        message = read_error(interrupted[0].parent) if interrupted else None
        raise Interrupted((message or "stopped by a signal").removeprefix("interrupted: "))
    # A rank that is stopped because of another's error is not the one to ask.
    told = [path.parent for path in failed if path not in interrupted]
    message = read_error(told[0]) if told else None
    if message is None:
        message = f"one of the processes was killed (torchrun ended with {code}); see the log above"
    raise UserError(message)


if __name__ == "__main__":
    _work(*sys.argv[1:])
