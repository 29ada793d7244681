"""Ctrl-C and SIGTERM for the local runner: the running step saves and ends, nothing is left over.

KFP starts each step as a process and does not pass signals on. Here the first signal is passed to
the step, which writes a checkpoint and ends; after `GRACE_SECONDS`, or at a second signal, it and
its children are killed.
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import psutil

from flagscale.errors import Interrupted
from flagscale.execution.notes import read_process
from flagscale.processes import is_alive

logger = logging.getLogger(__name__)

GRACE_SECONDS = float(os.environ.get("FLAGSCALE_GRACE_SECONDS", "60"))


class Stopped(Interrupted):
    """The run was stopped by a signal.

    Attributes:
        exit_code: what a shell expects of a program that this signal ended.
    """

    def __init__(self, number: int, step: str = "") -> None:
        super().__init__(f"{step or 'the run'} was stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Stopper:
    """What the runner does about signals while `handling` is active.

    Attributes:
        signal: number of the first signal that came; None if none has.
        step_folder: set by the runner while a step runs: where the step notes its process.
            Without a running step a signal raises `Stopped`.
        kill_more: called where processes are killed: ends what is no child of this one.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.step_folder: Path | None = None
        self.kill_more: Callable[[], None] = lambda: None
        self._hurry = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM inside; before returning, no child process is left.

        Raises:
            Stopped: a signal came while no step was running.
        """
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            self._hurry.set()
            if self._thread is not None:
                self._thread.join()
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signal is not None:
            raise Stopped(self.signal)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            self._hurry.set()
            return
        self.signal = number
        if self.step_folder is None:
            self.check()
        self._thread = threading.Thread(target=self._end_step, daemon=True)
        self._thread.start()

    def _end_step(self) -> None:
        logger.info(
            "stopping: the running step saves what it can resume from "
            "(at most %.0f s; press Ctrl-C again not to wait)",
            GRACE_SECONDS,
        )
        told = False
        deadline = time.monotonic() + GRACE_SECONDS
        while not self._hurry.wait(0.2) and time.monotonic() < deadline:
            if self.step_folder is None:
                return
            step = _noted_process(self.step_folder)
            if step is not None and not told:
                told = True
                _send(step, signal.SIGTERM)
        self._kill()

    def _kill(self) -> None:
        doomed = psutil.Process().children(recursive=True)
        # Ctrl-C may have ended the shell between us and the step, which is then no child of ours.
        step = self.step_folder and _noted_process(self.step_folder)
        if step:
            doomed += [step, *step.children(recursive=True)]
        for process in doomed:
            _send(process, signal.SIGKILL)
        self.kill_more()


def _noted_process(folder: Path) -> psutil.Process | None:
    """The step's process, once it has said which it is and while it lives."""
    noted = read_process(folder)
    if noted is None or not is_alive(noted):
        return None
    try:
        return psutil.Process(int(noted.split(":")[0]))
    except psutil.NoSuchProcess:
        return None


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        logger.debug("process %d has ended already", process.pid)
