"""Runs a step's function on several processes of this machine, under torchrun.

The step's process starts torchrun and waits; each rank is `python -m flagscale.execution.launch
STEP MODULE:FUNCTION` and calls the function. What goes there and comes back are JSON values in
files (`flagscale.execution.rank_folder`). A signal to the step is passed on to every rank, which
saves and ends; a rank's error becomes the step's.

`flagscale.execution.trainjob.run` starts the same ranks in pods of their own.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
from pydantic import validate_call
from pydantic_core import to_jsonable_python

from flagscale.cores import available_cores
from flagscale.execution import heartbeat
from flagscale.execution.notes import REQUEST_VARIABLE, note_log, read_process
from flagscale.execution.rank_folder import RankFolder
from flagscale.execution.rank_logs import keep_failed
from flagscale.execution.step_process import step_process
from flagscale.imports import uncollected
from flagscale.processes import RUNNER_VARIABLE, is_alive, this_process
from flagscale.stop import deferred_stop, stop_requested

logger = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_SECONDS = 0.2


def is_first_rank() -> bool:
    """Whether this process speaks for all: it alone writes small files, logs and tracks."""
    return int(os.environ.get("RANK", "0")) == 0


def rank_command(step: str, function: str, processes: int, *options: str) -> list[str]:
    """What starts the ranks of one machine.

    Args:
        step: its name, for the log.
        function: `module:name`.
        processes: ranks on this machine.
        options: of torchrun.
    """
    return [
        *(sys.executable, "-m", "flagscale.execution.torchrun", *options),
        *("--nproc-per-node", str(processes)),
        *("--module", "flagscale.execution.launch", step, function),
    ]


def rank_environment(cores: float, processes: int) -> dict[str, str]:
    """What ranks want of their environment, unless it says otherwise: they share the cores."""
    return {
        "OMP_NUM_THREADS": str(max(1, int(cores / processes))),
        # Communication is then issued before the computation that it overlaps with.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Samples of many lengths, and buffers of many sizes, else leave holes in the GPU's memory.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # See flagscale.megatron.plain_fp32: NVIDIA's libraries read it when they are loaded.
        "NVIDIA_TF32_OVERRIDE": "0",
    }


def call_on_ranks(
    step: str,
    function: Callable[..., T],
    processes: int,
    **arguments: Any,  # noqa: ANN401 - sections, paths and other values that have a JSON form
) -> T:
    """Call a function here where one process is enough, else on as many ranks of this machine.

    Args:
        step: its name, for the log.
        function: of a module; its annotations tell a rank what to make of the JSON values. It
            returns a JSON value.
        processes: how many.
        arguments: of the function.

    Raises:
        UserError: see `run_on_ranks`.
        Interrupted: see there.
    """
    if processes == 1:
        return function(**arguments)
    request: dict[str, Any] = to_jsonable_python(arguments)
    name = f"{function.__module__}:{function.__qualname__}"
    result: T = run_on_ranks(step, name, request, processes)
    return result


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
        ranks = RankFolder.create(Path(name), request)
        command = rank_command(step, function, processes, "--standalone")
        logger.info("starting %d processes", processes)
        with deferred_stop():
            environment = _environment(ranks.path, processes)
            torchrun = subprocess.Popen(command, env=environment)  # noqa: S603
            try:
                _wait(torchrun, ranks)
            finally:
                _end(torchrun)
        code = torchrun.returncode
        if code:
            keep_failed(ranks)
            why = f"one of the processes was killed (torchrun ended with {code}); see the log above"
            ranks.raise_error(stop_requested(), otherwise=why)
        return ranks.result()


def _work(step: str, function: str) -> None:
    """The whole life of one rank."""
    ranks = RankFolder(Path(os.environ[REQUEST_VARIABLE]))
    mine = ranks.join(int(os.environ["RANK"]))
    _note_log()
    if not is_first_rank():
        os.environ["FLAGSCALE_LOG_LEVEL"] = "WARNING"
    try:
        with step_process(step, is_rank=True):
            heartbeat.heed(ranks.path)
            module, name = function.split(":")
            with uncollected():
                call = validate_call(getattr(importlib.import_module(module), name))
            result = call(**ranks.request())
            if is_first_rank():
                ranks.note_result(result)
        ranks.note_end(mine)
    except SystemExit as error:
        ranks.note_exit(mine, error.code)
        raise


def _note_log() -> None:
    """Where torchrun has this rank's output written: both streams into one file, in their order."""
    output = Path(os.readlink("/proc/self/fd/1"))
    if output.is_file():
        os.dup2(1, 2)
        note_log(str(output))


def _environment(folder: Path, processes: int) -> dict[str, str]:
    """Of the ranks of this machine: they end when this process does."""
    return {
        **rank_environment(available_cores(), processes),
        **os.environ,
        REQUEST_VARIABLE: str(folder),
        RUNNER_VARIABLE: this_process(),
    }


def _wait(torchrun: subprocess.Popen[bytes], ranks: RankFolder) -> None:
    """Until torchrun ends, passing a request to stop on to every rank, once.

    Not to torchrun: that gives its ranks 30 seconds, and a checkpoint may take longer.
    """
    told = False
    while torchrun.poll() is None:
        if stop_requested() and not told:
            told = _tell_ranks(ranks)
        time.sleep(_POLL_SECONDS)


def _tell_ranks(ranks: RankFolder) -> bool:
    """SIGTERM to each rank; whether there was one that listens already."""
    processes = [read_process(path) for path in ranks.ranks()]
    found = [process for process in processes if process is not None and is_alive(process)]
    for process in found:
        os.kill(int(process.split(":")[0]), signal.SIGTERM)
    return bool(found)


def _end(torchrun: subprocess.Popen[bytes]) -> None:
    if torchrun.poll() is None:
        for process in psutil.Process(torchrun.pid).children(recursive=True):
            process.kill()
        torchrun.kill()
        torchrun.wait()


if __name__ == "__main__":
    _work(*sys.argv[1:])
