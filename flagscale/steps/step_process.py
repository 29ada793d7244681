"""The process of a step: logging, signals, the error it ends with, its figures.

A component's body runs inside `step_process`, on a laptop and on a cluster alike:

    with step_process("prepare-data") as step:
        from flagscale.steps.prepare_data import prepare_data

        step.report(prepare_data(step.section(DataRecipe, data), output), metrics)

SIGTERM (and Ctrl-C) raise `Interrupted` in the main thread. A loop that can save its state first
runs inside `deferred_stop` and asks `stop_requested` once a step.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from flagscale.artifacts import write_json
from flagscale.errors import Interrupted, UserError
from flagscale.processes import RUNNER_VARIABLE, is_alive, note_error, note_process
from flagscale.recipe import SectionT, parse_section

logger = logging.getLogger(__name__)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 143
_LOCK_SECONDS = 120.0
_QUIET_LOGGERS = {
    **dict.fromkeys(
        ("alembic", "mlflow", "urllib3", "httpx", "datasets", "matplotlib", "filelock", "modelopt"),
        logging.WARNING,
    ),
    "megatron": logging.WARNING,
    "megatron.core.datasets": logging.ERROR,  # warns of splits that are not asked for
}
# Notes of the libraries about features that are not installed here, or about one another.
_QUIET_WARNINGS = (
    ".*Apex.*",
    ".*[Tt]ransformer[_ ]?[Ee]ngine.*",
    ".*is deprecated.*",
    ".*flash.attn.*",
    ".*CUDA is not available.*",
    ".*is not tested with nvidia-modelopt.*",
    ".*we are deprecating ShardedTensor.*",
    ".*already has an intermediate output stored.*",
    ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
)


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Metrics(Protocol):
    """What KFP's `Metrics` artifact offers."""

    path: str
    metadata: dict[str, Any]


class _Stop:
    """Whether somebody asked this process to stop, whether to raise at once, and who listens."""

    requested = False
    deferred = False
    handling = False


def stop_requested() -> bool:
    """Whether the step was asked to stop: save, then raise `Interrupted`."""
    return _Stop.requested


@contextmanager
def deferred_stop() -> Iterator[None]:
    """Inside, a signal only sets what `stop_requested` tells; it raises nothing."""
    before, _Stop.deferred = _Stop.deferred, True
    try:
        yield
    finally:
        _Stop.deferred = before


class Step:
    """The running step."""

    def __init__(self, name: str) -> None:
        self.name = name

    def section(self, kind: type[SectionT], values: dict[str, Any]) -> SectionT:
        """A section of the recipe, checked again: KFP hands over its numbers as floats.

        Raises:
            UserError: a field is unknown or has a wrong value.
        """
        return parse_section(kind, values, where=self.name)

    def input(self, path: str) -> Path:
        """The folder of an input artifact."""
        return Path(path)

    def output(self, path: str) -> Path:
        """The folder to write an output artifact to."""
        return Path(path)

    def copy(self, source: Path, target: str) -> None:
        """Copy a file to where an output artifact of KFP is to be.

        Raises:
            FileNotFoundError: the step wrote no such file.
        """
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)

    def report(self, figures: Mapping[str, float], metrics: Metrics) -> None:
        """Hand the figures to KFP: into the UI and, as a file, into what its cache looks for.

        Args:
            figures: name -> value; values that JSON cannot hold (NaN, infinity) are left out.
            metrics: the component's `Output[Metrics]`.
        """
        values = {name: float(value) for name, value in figures.items()}
        metrics.metadata.update({n: v for n, v in values.items() if math.isfinite(v)})
        path = Path(metrics.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dict(metrics.metadata))


@contextmanager
def step_process(
    name: str, experiment: str = "", exclusive: str | None = None, is_rank: bool = False
) -> Iterator[Step]:
    """Run a step's work as the whole of this process.

    Errors end the process (exit code 1, or 143 when interrupted) with the error's text as the
    last line of the log, and no traceback where it is the user's to put right.

    Args:
        name: of the step.
        experiment: MLflow's, where the environment does not name one.
        exclusive: a folder that only one process at a time may write, e.g. of checkpoints; an
            earlier process that is still ending is waited for.
        is_rank: another process started this one, and will tell its error.

    Raises:
        SystemExit: the step failed or was interrupted.
    """
    _configure_logging()
    if experiment:
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", experiment)
    with _signals_raise():
        try:
            note_process()
            _end_with_runner()
            with _lock(exclusive):
                yield Step(name)
        except (Interrupted, KeyboardInterrupt) as error:
            _fail(name, "interrupted: " + (str(error) or "stopped by a signal"), is_rank)
            sys.exit(EXIT_INTERRUPTED)
        except UserError as error:
            _fail(name, str(error), is_rank)
            sys.exit(EXIT_ERROR)
        except Exception as error:
            logger.error("%s", traceback.format_exc().rstrip())
            _fail(name, f"{type(error).__name__}: {error}", is_rank)
            sys.exit(EXIT_ERROR)


def _fail(name: str, message: str, is_rank: bool) -> None:
    note_error(name, message)
    if not is_rank:
        logger.error("%s: %s", name, message)


def _configure_logging() -> None:
    """One line a message, straight to stdout: KFP shows a step's stdout as its log."""
    logging.basicConfig(
        level=os.environ.get("FLAGSCALE_LOG_LEVEL", "INFO").upper(),
        format="%(asctime)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stdout,
        force=True,
    )
    # huggingface_hub names a logger by its file's path and tells it of every temporary folder.
    for handler in logging.getLogger().handlers:
        handler.addFilter(
            lambda record: (
                record.levelno >= logging.WARNING or "huggingface_hub" not in record.pathname
            )
        )
    for name, level in _QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)
    warnings.formatwarning = _one_line
    for pattern in _QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return f"{category.__name__}: {message} ({filename}:{lineno})"


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into `Interrupted`; under a runner only SIGTERM counts.

    A terminal sends Ctrl-C to the runner and to the step. The runner passes it on as SIGTERM, so
    that one key press asks once.
    """

    def handle(_number: int, _frame: FrameType | None) -> None:
        first, _Stop.requested = not _Stop.requested, True
        if first and not _Stop.deferred:
            raise Interrupted("stopped by a signal")

    _Stop.requested = False
    under_runner = RUNNER_VARIABLE in os.environ
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, handle),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN if under_runner else handle),
    }
    _Stop.handling = True
    try:
        yield
    finally:
        _Stop.handling = False
        for number, handler in before.items():
            signal.signal(number, handler)


_mask = threading.local()  # of the thread that forks


def _before_fork() -> None:
    if _Stop.handling:
        _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _after_fork_in_parent() -> None:
    if _Stop.handling:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    """A forked worker, e.g. of a pool that is being closed, just ends.

    The signals are blocked over the fork: Python forgets one that reaches a child before it runs.
    """
    if _Stop.handling:
        _Stop.handling = False
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)


def _end_with_runner() -> None:
    """Watch the runner: when it is killed, this process must not train on unseen."""
    runner = os.environ.get(RUNNER_VARIABLE)
    if runner is None:
        return

    def watch() -> None:
        while is_alive(runner):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _lock(folder: str | None) -> Iterator[None]:
    if folder is None:
        yield
        return
    path = Path(f"{folder}.lock")  # beside it: the folder holds checkpoints and nothing else
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as stream:
        deadline = time.monotonic() + _LOCK_SECONDS
        while not _try_lock(stream.fileno()):
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another process writes there; stop it, or wait for it")
            logger.info("waiting for another process to leave %s", folder)
            time.sleep(2)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks: nobody can be kept out there
        logger.warning("no lock: %s", error)
    return True
