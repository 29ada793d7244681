"""A run's steps as people know them: one each, whatever KFP and Argo make of it.

For each task KFP has a driver, the task itself and its executor, which is the step's pod. Argo has
each of them once more for each attempt, and all again when it begins anew what they are in.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from pipelines.cluster.definition import Definition
from pipelines.cluster.workflow_nodes import Node, read_nodes, split_attempt, time_of
from pipelines.outcome import duration

_ATTEMPT = re.compile(r"\(\d+\)")
_ITERATION = re.compile(r".*\((\d+):.*\)")
_DRIVER = "-driver"
# What is no step: it holds steps, or stands for the run. KFP's workflows end in five characters
# that Kubernetes chose, none of them a vowel.
_HOLDER = re.compile(
    r"root|iteration.*|(for-loop|condition|exit-handler)-.*|.*-[bcdfghjklmnpqrstvwxz2456789]{5}"
)
_LATE = datetime.max.replace(tzinfo=UTC)

Path = tuple[str, ...]


@dataclass(frozen=True)
class Attempt:
    """One try at a step.

    Attributes:
        node: its id; the pod's name ends as it does.
        state: KFP's.
        start: None before.
        end: None before.
        error: what KFP says of it; nearly always nothing.
    """

    node: str
    state: str
    start: datetime | None
    end: datetime | None
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """Since it started, or that it took."""
        return seconds_between(self.start, self.end)


@dataclass(frozen=True)
class Step:
    """A step of a run.

    Attributes:
        name: of its task.
        label: the name, and in a loop the item's.
        state: KFP's, or CACHED, or RETRYING between two attempts, or UNKNOWN where the run has
            ended and KFP does not tell how the step did.
        start: of the first thing that was done for it.
        rounds: its attempts, in their order; another round begins where KFP began anew what the
            step is in. Where `by_driver`, they are the driver's.
        allowed: attempts in a round, by the step's own retries; None: nobody knows.
        by_driver: whether KFP's driver failed, which prepares it: the step itself never began.
        error: what KFP says of it; nearly always nothing.
    """

    name: str
    label: str
    state: str
    start: datetime
    rounds: tuple[tuple[Attempt, ...], ...] = ()
    allowed: int | None = None
    by_driver: bool = False
    error: str = ""

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Of all rounds."""
        return tuple(attempt for attempts in self.rounds for attempt in attempts)

    @property
    def seconds(self) -> float | None:
        """The step's own: from its first attempt's start to its last one's end, or until now."""
        if not self.rounds or self.by_driver or self.state == "UNKNOWN":
            return None
        return seconds_between(self.attempts[0].start, self.attempts[-1].end)

    def of_ended_run(self) -> Step:
        """The step, after the run's end: nothing runs any more, whatever the list still says."""
        going_on = self.state in ("PENDING", "RUNNING", "RETRYING")
        return replace(self, state="UNKNOWN") if going_on else self

    def count(self) -> str:
        """`attempt 2 of 6`, where there is more than one."""
        if self.by_driver:
            return "KFP's driver failed before it began"
        if len(self.attempts) < 2:
            return ""
        of = f" of {self.allowed}" if self.allowed else ""
        in_all = f" ({len(self.attempts)} in all)" if len(self.rounds) > 1 else ""
        return f"attempt {len(self.rounds[-1])}{of}{in_all}"

    def line(self, width: int = 0) -> str:
        """One line, with the label as wide as that."""
        taken = "" if self.seconds is None else duration(self.seconds)
        return (
            f"{self.label:<{max(width, 24)}} {self.state:<9}  {taken:<12}  {self.count()}".strip()
        )


def read_steps(details: Iterable[Any], definition: Definition) -> tuple[Step, ...]:
    """The steps that have begun, in the order of their start.

    Args:
        details: `task_details` of KFP's API.
        definition: of the run's pipeline.
    """
    details = list(details)
    tasks = _Tasks(read_nodes(details))
    steps = [tasks.step(path, definition) for path in tasks.paths(definition)]
    found = [step for step in steps if step is not None]
    ordered = tuple(sorted(found, key=lambda step: (step.start, step.label)))
    return ordered or _by_last_name(details)


def seconds_between(start: datetime | None, end: datetime | None) -> float | None:
    """From start to end, or until now; None before the start."""
    if start is None:
        return None
    return max(0.0, ((end or datetime.now(UTC)) - start).total_seconds())


class _Tasks:
    """A run's nodes by the task that they are of: a path of names, without attempts."""

    def __init__(self, nodes: list[Node]) -> None:
        self._executors: dict[Path, list[Node]] = defaultdict(list)
        self._drivers: dict[Path, list[Node]] = defaultdict(list)
        self._attempts: dict[str, list[Node]] = defaultdict(list)  # by the name of what is tried
        self._holders: set[Path] = set()
        for node in sorted(nodes, key=lambda node: split_attempt(node.name)[1] or 0):
            tried, attempt = split_attempt(node.name)
            if attempt is not None:
                self._attempts[tried].append(node)
                continue
            _workflow, *path = _ATTEMPT.sub("", node.name).split(".")
            if not path:
                continue
            *scope, last = path
            if last == "executor":
                self._executors[tuple(scope)].append(node)
                continue
            self._holders.add(tuple(scope))
            if last.endswith(_DRIVER):
                self._drivers[(*scope, last.removesuffix(_DRIVER))].append(node)

    def paths(self, definition: Definition) -> set[Path]:
        """Of the steps."""
        return {
            path
            for path in {*self._executors, *self._drivers}
            if path in self._executors or not self._holds_steps(path, definition)
        }

    def step(self, path: Path, definition: Definition) -> Step | None:
        """The step of a path; None before anything was done for it."""
        nodes = [*self._executors[path], *self._drivers[path]]
        begun = sorted((n for n in nodes if n.state and n.start), key=lambda n: n.start or _LATE)
        if not begun:
            return None
        last = begun[-1]
        of_driver = last in self._drivers[path]
        by_driver = of_driver and last.state == "FAILED"
        tried = [n for n in begun if (n in self._drivers[path]) == by_driver]
        # A driver that did its work once is not what failed.
        found = [self._round(n) for n in tried if not by_driver or n.state == "FAILED"]
        rounds = tuple(attempts for attempts in found if attempts)
        state = _state(last, of_driver, rounds[-1] if rounds else ())
        return Step(
            name=path[-1],
            label=_label(path, definition),
            state=state if state != "CACHED" or definition.has_pod(path[1:]) else "SUCCEEDED",
            start=begun[0].start or _LATE,
            rounds=rounds,
            allowed=None if by_driver else definition.most_attempts(path[1:]),
            by_driver=by_driver,
            error=next((node.error for node in reversed(begun) if node.error), ""),
        )

    def _holds_steps(self, path: Path, definition: Definition) -> bool:
        known = definition.holds_tasks(path[1:])
        return known or path in self._holders or _HOLDER.fullmatch(path[-1]) is not None

    def _round(self, node: Node) -> tuple[Attempt, ...]:
        """Its attempts; a node that nothing repeats is its only one, one that was left out none."""
        tries = [n for n in self._attempts[node.name] if n.state]
        tries = tries or ([] if node.state == "SKIPPED" else [node])
        return tuple(Attempt(n.id, n.state or "", n.start, n.end, n.error) for n in tries)


def _state(last: Node, of_driver: bool, attempts: tuple[Attempt, ...]) -> str:
    """The step's state, by what was begun for it last."""
    state = last.state or "PENDING"
    if of_driver:
        return state if state == "FAILED" else "PENDING"
    if state == "SKIPPED":
        return "CACHED"
    if state != "RUNNING":
        return state
    # The executor runs as soon as its first pod is asked for, and while no pod is there.
    of_pod = attempts[-1].state if attempts else "PENDING"
    return "RETRYING" if of_pod == "FAILED" else of_pod


def _label(path: Path, definition: Definition) -> str:
    """The task's name, and what tells its iteration from others."""
    items = []
    for number, name in enumerate(path):
        found = _ITERATION.fullmatch(name)
        if found:
            items.append(definition.item(path[1:number], int(found[1])))
    return f"{path[-1]} [{', '.join(items)}]" if items else path[-1]


def _by_last_name(details: list[Any]) -> tuple[Step, ...]:
    """The steps of a server that does not tell what is in what: all nodes that may be one."""
    names: Counter[str] = Counter()
    steps = []
    begun = [d for d in details if d.display_name and d.state and time_of(d.start_time)]
    for detail in sorted(begun, key=lambda d: d.start_time):
        name, attempt = split_attempt(detail.display_name)
        inner = name == "executor" or name.endswith(_DRIVER) or _HOLDER.fullmatch(name)
        if attempt is not None or inner:
            continue
        names[name] += 1
        error = (detail.error.message or "") if detail.error else ""
        end = time_of(detail.end_time)
        only = Attempt("", detail.state, detail.start_time, end, error)
        label = name if names[name] == 1 else f"{name} ({names[name]})"
        steps.append(Step(name, label, detail.state, detail.start_time, ((only,),), error=error))
    return tuple(steps)
