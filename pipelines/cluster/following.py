"""Follows a run on a KFP server: how it is doing, and how its steps are.

KFP's own waiting knows no cancelled run, gives up at the first error on the way, and says nothing
of steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from flagscale.errors import UserError
from pipelines.cluster.client import TIMEOUT_SECONDS
from pipelines.cluster.connection_errors import BrokenAnswer, StoppedWaiting, is_passing
from pipelines.cluster.definition import Definition, read_definition
from pipelines.cluster.server import Server, say
from pipelines.cluster.steps import Step, read_steps, seconds_between
from pipelines.cluster.workflow_nodes import time_of
from pipelines.outcome import duration

ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
_LONGEST_PAUSE_SECONDS = 60.0
_PATIENCE_SECONDS = 900.0  # without an answer
_SILENT_PROBLEMS = 2  # in a row: whatever is over with the next look


@dataclass(frozen=True)
class State:
    """A run at one moment.

    Attributes:
        run_id: KFP's.
        name: of the run.
        state: KFP's.
        seconds: since its creation, or that it took.
        steps: that have begun, in the order of their start.
        error: of the run as a whole; nearly always nothing.
        definition: of its pipeline.
    """

    run_id: str
    name: str
    state: str
    seconds: float | None
    steps: tuple[Step, ...]
    error: str
    definition: Definition

    @property
    def has_ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED

    @property
    def is_behind(self) -> bool:
        """Whether KFP's list of tasks ends before the run did."""
        return any(step.state == "UNKNOWN" for step in self.steps)

    def headline(self) -> str:
        """The run in one line."""
        taken = "" if self.seconds is None else f" in {duration(self.seconds)}"
        return f"{self.name}: {self.state}{taken}"

    def lines(self) -> list[str]:
        """The run, and a line for each step."""
        width = max((len(step.label) for step in self.steps), default=0)
        lines = [self.headline(), *(f"  {step.line(width)}" for step in self.steps)]
        if self.is_behind:
            lines.append("  KFP's list of tasks ends before the run did: later ones are not in it")
        return lines


def look(server: Server, run_id: str, definition: Definition | None = None) -> State:
    """The run now.

    Args:
        server: is asked.
        run_id: of the run.
        definition: of its pipeline, where it was read before.

    Raises:
        UserError: the server has no such run, or does not answer.
    """
    run = server.read(f"run {run_id}", lambda: _get(server, run_id), _missing(run_id))
    return _state(server, run, definition)


def follow(
    server: Server, run_id: str, pause_seconds: float, timeout_seconds: float | None = None
) -> State:
    """Wait for the run's end, telling each step's change.

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
    told: dict[str, tuple[str, int]] = {}
    state: State | None = None
    try:
        while True:
            before = state
            run = _patiently(server, run_id, pause_seconds, deadline, again)
            state = _state(server, run, before.definition if before else None)
            _tell(state, told)
            remaining = deadline - time.monotonic()
            # The list of tasks may come a moment after the run's end.
            look_again = state.is_behind and before and not before.has_ended and remaining > 0
            if state.has_ended and not look_again:
                return state
            if remaining <= 0:
                raise UserError(
                    f"--timeout {timeout_seconds:g}: the run is {state.state} still; {again}"
                )
            time.sleep(min(pause_seconds, remaining))
    except KeyboardInterrupt:
        raise StoppedWaiting(
            f"stopped waiting; {again}. To end the run: Terminate, on its page"
        ) from None


def _patiently(
    server: Server, run_id: str, pause_seconds: float, deadline: float, again: str
) -> Any:  # noqa: ANN401 - KFP's
    """The run; a server that is away for minutes, or a token that was renewed, ends no waiting."""
    pause, problems = pause_seconds, 0
    deadline = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
    while True:
        try:
            return server.read_once(f"run {run_id}", lambda: _get(server, run_id), _missing(run_id))
        except UserError as error:
            if not is_passing(error.__cause__) or time.monotonic() + pause > deadline:
                raise UserError(f"{error}; {again}") from None
            problems += 1
            if problems > _SILENT_PROBLEMS:
                say(f"{error}; asking again in {pause:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _tell(state: State, told: dict[str, tuple[str, int]]) -> None:
    """A line for each step whose state is new, or that is tried again."""
    for step in state.steps:
        now = (step.state, len(step.attempts))
        if told.get(step.label) != now:
            told[step.label] = now
            say(f"{_clock(state.seconds)}  {step.line()}")


def _get(server: Server, run_id: str) -> Any:  # noqa: ANN401 - KFP's
    try:
        run = server.client.runs.run_service_get_run(run_id, _request_timeout=TIMEOUT_SECONDS)
    except (ValueError, TypeError, AttributeError) as error:
        raise BrokenAnswer from error  # KFP's client, on what is no run
    if getattr(run, "run_id", None) != run_id:
        raise BrokenAnswer
    return run


def _state(server: Server, run: Any, definition: Definition | None) -> State:  # noqa: ANN401 - KFP's
    if definition is None or not definition.spec:
        definition = read_definition(server, run)
    state = run.state or "PENDING"
    details = (run.run_details.task_details if run.run_details else None) or []
    steps = read_steps(details, definition)
    if state in ENDED:
        steps = tuple(step.of_ended_run() for step in steps)
    return State(
        run_id=run.run_id,
        name=run.display_name or run.run_id,
        state=state,
        seconds=seconds_between(time_of(run.created_at), time_of(run.finished_at)),
        steps=steps,
        error=(run.error.message or "") if run.error else "",
        definition=definition,
    )


def _clock(seconds: float | None) -> str:
    whole = int(seconds or 0)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _missing(run_id: str) -> str:
    return f"the server has no run {run_id}; a run's id is at the end of its page's address"
