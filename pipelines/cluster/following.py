"""Follows a run on a KFP server: its tasks' states, and what failed.

KFP's own waiting knows no cancelled run, gives up at the first error on the way, and says nothing
of tasks.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flagscale.errors import UserError
from pipelines.cluster.connection import TIMEOUT_SECONDS, Server, say
from pipelines.cluster.connection_errors import Problem, StoppedWaiting, is_transient
from pipelines.outcome import StepFailed, duration

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_LONGEST_PAUSE_SECONDS = 60.0
_PATIENCE_SECONDS = 900.0  # without an answer
# KFP's own nodes: drivers prepare a task, executors are its pods, and two stand for the run: the
# root, and the workflow with the suffix that Kubernetes gave it (it has no vowels).
_INNER = re.compile(r"root|(executor|(.*-)?driver)(\(\d+\))?|.*-[bcdfghjklmnpqrstvwxz2456789]{5}")
_NO_TIME = datetime(2000, 1, 1, tzinfo=UTC)  # KFP writes 0001 or 1970 for what has not been yet


@dataclass(frozen=True)
class Task:
    """A task of a run.

    Attributes:
        label: its name, with a number where a loop runs it more than once.
        state: KFP's.
        seconds: since it started, or that it took; None before.
        errors: what it and its pods said.
    """

    label: str
    state: str
    seconds: float | None
    errors: tuple[str, ...]

    def line(self) -> str:
        """One line, without errors."""
        time_taken = "" if self.seconds is None else f"  {duration(self.seconds)}"
        return f"{self.label:<24} {self.state:<10}{time_taken}".rstrip()


@dataclass(frozen=True)
class State:
    """A run at one moment.

    Attributes:
        name: of the run.
        state: KFP's.
        seconds: since its creation, or that it took.
        tasks: in the order of their start.
        error: of the run as a whole.
    """

    name: str
    state: str
    seconds: float | None
    tasks: tuple[Task, ...]
    error: str

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED

    def failure(self) -> str:
        """What failed, with its errors."""
        lines = [f"the run {self.state.lower()}"]
        for task in self.tasks:
            if task.state == "FAILED":
                said = task.errors or ("no error was recorded; see its log in the UI",)
                lines += [f"  {task.label}: {text}" for text in said]
        if self.error:
            lines.append(f"  {self.error}")
        return "\n".join(lines)


def look(server: Server, run_id: str) -> State:
    """The run now.

    Raises:
        UserError: the server has no such run, or does not answer.
    """
    return server.read(f"run {run_id}", lambda: _get(server, run_id), _missing(run_id))


def follow(
    server: Server, run_id: str, pause_seconds: float, timeout_seconds: float | None = None
) -> State:
    """Wait for the run's end, telling each task's change.

    Args:
        server: is asked.
        run_id: of the run.
        pause_seconds: between two looks.
        timeout_seconds: None: without end.

    Raises:
        UserError: the time is over, or the server does not answer any more; the run goes on.
        StoppedWaiting: by Ctrl-C; the run goes on.
    """
    again = f"the run goes on; python -m pipelines status {run_id} --wait follows it"
    deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    told: dict[str, str] = {}
    try:
        while True:
            state = _patient_look(server, run_id, pause_seconds, deadline, again)
            _tell(state, told)
            if state.has_ended:
                return state
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise UserError(
                    f"--timeout {timeout_seconds:g}: the run is {state.state} still; {again}"
                )
            time.sleep(min(pause_seconds, remaining))
    except KeyboardInterrupt:
        raise StoppedWaiting(
            f"stopped waiting; {again}. To end the run: Terminate, on its page"
        ) from None


def check_outcome(state: State, url: str) -> None:
    """Raise for a run that ended badly.

    Raises:
        StepFailed: with the failing tasks and their errors.
    """
    if state.state in ("FAILED", "CANCELED"):
        raise StepFailed(f"{state.failure()}\n{url}")


def _patient_look(
    server: Server, run_id: str, pause_seconds: float, deadline: float, again: str
) -> State:
    """Look; a server that is away for minutes, or a token that was renewed, ends no waiting."""
    pause = pause_seconds
    deadline = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
    while True:
        try:
            return look(server, run_id)
        except UserError as error:
            problem = error.__cause__
            lasting = not isinstance(problem, Problem.EXCEPTIONS) or not is_transient(problem, True)
            if lasting or time.monotonic() + pause > deadline:
                raise UserError(f"{error}; {again}") from None
            say(f"{error}; asking again in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _tell(state: State, told: dict[str, str]) -> None:
    """A line for each task whose state is new."""
    for task in state.tasks:
        if told.get(task.label) != task.state:
            told[task.label] = task.state
            since = _clock(state.seconds)
            say(f"{since}  {task.line()}")


def _get(server: Server, run_id: str) -> State:
    run = server.client.runs.run_service_get_run(run_id, _request_timeout=TIMEOUT_SECONDS)
    details = run.run_details.task_details if run.run_details else None
    return State(
        name=run.display_name or run_id,
        state=run.state or "PENDING",
        seconds=_seconds(run.created_at, run.finished_at),
        tasks=_tasks(details or []),
        error=(run.error.message or "") if run.error else "",
    )


def _tasks(details: list[Any]) -> tuple[Task, ...]:
    """The pipeline's tasks; a pod that was retried, or a loop, makes several of one name."""
    shown = [d for d in details if not _INNER.fullmatch(d.display_name or "")]
    tasks: list[Task] = []
    names: dict[str, int] = {}
    for detail in sorted(
        shown, key=lambda d: _time(d.start_time) or datetime.max.replace(tzinfo=UTC)
    ):
        name = detail.display_name or detail.task_id
        names[name] = names.get(name, 0) + 1
        label = name if names[name] == 1 else f"{name} ({names[name]})"
        seconds = _seconds(detail.start_time, detail.end_time)
        errors = tuple(dict.fromkeys(_errors(detail, details, depth=4)))
        tasks.append(Task(label, detail.state or "PENDING", seconds, errors))
    return tuple(tasks)


def _errors(detail: Any, details: list[Any], depth: int) -> list[str]:  # noqa: ANN401 - KFP's
    """What a task and the nodes below it said; KFP says it of few."""
    found = [detail.error.message] if detail.error and detail.error.message else []
    if depth == 0:
        return found
    below = {child.task_id or child.pod_name for child in detail.child_tasks or []}
    for other in details:
        is_below = bool({other.task_id, other.pod_name} & below - {None})
        is_below |= bool(other.parent_task_id) and other.parent_task_id == detail.task_id
        if is_below and _INNER.fullmatch(other.display_name or ""):
            found += _errors(other, details, depth - 1)
    return found


def _time(value: datetime | None) -> datetime | None:
    return value if value is not None and value > _NO_TIME else None


def _seconds(start: datetime | None, end: datetime | None) -> float | None:
    """From start to end, or until now."""
    first = _time(start)
    if first is None:
        return None
    return max(0.0, ((_time(end) or datetime.now(UTC)) - first).total_seconds())


def _clock(seconds: float | None) -> str:
    whole = int(seconds or 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _missing(run_id: str) -> str:
    return f"the server has no run {run_id}; a run's id is at the end of its page's address"
