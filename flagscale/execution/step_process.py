"""The process of a step: logging, signals, the error it ends with, its figures.

A component's body runs inside `step_process`, on a laptop and on a cluster alike:

    with step_process("prepare-data") as step:
        from flagscale.steps.prepare_data import prepare_data

        step.report(prepare_data(step.section(DataRecipe, data), output), metrics)

SIGTERM (and Ctrl-C) raise `Interrupted` in the main thread. A loop that can save its state first
runs inside `deferred_stop` and asks `stop_requested` once a step (`flagscale.stop`).
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flagscale import variables
from flagscale.errors import Interrupted, UserError
from flagscale.execution.absent import AbsentInputError
from flagscale.execution.logs import configure_logging
from flagscale.execution.notes import note_error, note_process
from flagscale.execution.signals import end_with_runner, signals_raise
from flagscale.execution.step import Step
from flagscale.run_values.literal import literal
from flagscale.stop import deferred_stop
from flagscale.tracking import step_failed

logger = logging.getLogger(__name__)

EXIT_ERROR = 1
EXIT_INTERRUPTED = 143


_running: list[Step] = []


def when_published(do: Callable[[], object]) -> None:
    """Do something once the running step's outputs are where the next step finds them.

    Outside a step process that is at once.

    Args:
        do: must not raise.
    """
    if _running:
        _running[-1].when_published(do)
    else:
        do()


def keep_exclusive(place: str) -> None:
    """Keep other processes out of a place until the running step's outputs are published.

    An earlier process that is still ending is waited for. Outside a step process nobody is kept
    out.

    Args:
        place: a folder or a URL, e.g. of one training's checkpoints.

    Raises:
        UserError: another process stays there.
    """
    if _running:
        _running[-1].keep_exclusive(place)


def keep_file(name: str, path: Path) -> None:
    """Keep a file in the artifact that tells of the running step's failure, if there is to be one.

    Args:
        name: of the file there.
        path: of what is copied now.
    """
    if _running:
        _running[-1].keep_file(name, path)


@contextmanager
def step_process(
    name: str,
    experiment: str = "",
    accelerators: str = "0",
    is_rank: bool = False,
    record_failure_at: str | None = None,
) -> Iterator[Step]:
    """Run a step's work as the whole of this process.

    Errors end the process (exit code 1, or 143 when interrupted) with the error's text as the
    last line of the log, and no traceback where it is the user's to put right.

    Args:
        name: of the step.
        experiment: MLflow's, as KFP carried it; where the environment does not name one.
        accelerators: how many its pod was given; the step fails where torch cannot use them.
        is_rank: another process started this one, and will tell its error.
        record_failure_at: path of the output at which a failure is told instead, if the run is to
            go on without it (`flagscale.execution.absent`): the process then ends well.

    Raises:
        SystemExit: the step failed or was interrupted.
    """
    configure_logging()
    if experiment:
        os.environ.setdefault("MLFLOW_EXPERIMENT_NAME", literal(experiment))
    step = Step(name)
    with signals_raise():
        try:
            note_process()
            end_with_runner()
            _running.append(step)
            if not is_rank:
                step.import_first()
            try:
                _check_accelerators(accelerators)
                yield step
                step.publish()
            finally:
                _running.remove(step)
                step.close()
        except (Interrupted, KeyboardInterrupt) as error:
            _fail(name, "interrupted: " + (str(error) or "stopped by a signal"), is_rank)
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            if not (record_failure_at and isinstance(error, AbsentInputError)):
                _fail(name, _message(error), is_rank)
            if not record_failure_at:
                sys.exit(EXIT_ERROR)
            with deferred_stop():
                step.record_failure(record_failure_at, error)


def _message(error: Exception) -> str:
    """What people read: with a traceback before it where they cannot put it right."""
    if isinstance(error, UserError):
        return str(error)
    logger.error("%s", traceback.format_exc().rstrip())
    return f"{type(error).__name__}: {error}"


def _check_accelerators(count: str) -> None:
    """Before hours of work: whether there are as many as the pod was given; its ranks ask again."""
    if count != "0":
        os.environ[variables.ACCELERATORS] = count
        from flagscale.megatron.accelerators import check_accelerators

        check_accelerators()


def _fail(name: str, message: str, is_rank: bool) -> None:
    with deferred_stop():  # there is nothing left to stop
        note_error(name, message)
        if not is_rank:
            logger.error("%s: %s", name, message)
            step_failed(name, "KILLED" if message.startswith("interrupted: ") else "FAILED")
