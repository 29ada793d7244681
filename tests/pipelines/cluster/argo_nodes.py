"""A run's tasks as KFP lists them, made as Argo makes the nodes of KFP's workflows.

Every template is repeated, by the controller's policy: so each task is a driver and what it
prepares, each of those a node for the attempts and one for each attempt, and so are what holds
them: the workflow and its root. Entries come in no order and have no name but the last.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.cluster.workflow_nodes import node_id

NOT_YET = "0001-01-01T00:00:00Z"  # as the backend writes a time that has not come
WORKFLOW = "distillation-x4k9z"
ATTEMPT_SECONDS = 65
_BETWEEN_SECONDS = 10
_DRIVER_SECONDS = 3
_BEGIN = datetime(2026, 11, 28, 9, tzinfo=UTC)

Rounds = list[list[str]]


def tasks(**steps: str | list[str] | Rounds) -> list[dict[str, Any]]:
    """The `task_details` of a run whose steps come one after the other.

    Args:
        steps: by task name, with underscores. A state: KFP's, of its only attempt; CACHED; DRIVER,
            while its driver is at work; BROKEN where that fails; LEFT OUT after a failure. Or the
            states of its attempts, at the end BACKOFF between two; or lists of those, where the
            policy begins anew what the step is in.
    """
    nodes = _Nodes()
    top = nodes.repeated(WORKFLOW, "RUNNING")
    driver = nodes.repeated(f"{top}.root-driver", "SUCCEEDED", after=top)
    before = root = nodes.repeated(f"{top}.root", "RUNNING", after=driver)
    for name, said in steps.items():
        before = nodes.task(f"{root}.{name.replace('_', '-')}", said, before)
    states = {nodes.entries[name].get("state") for name in nodes.in_scope(root)}
    over = next((s for s in ("PENDING", "RUNNING", "FAILED") if s in states), "SUCCEEDED")
    for holder in (WORKFLOW, top, f"{top}.root", root):
        nodes.end(holder, over.replace("PENDING", "RUNNING"))
    entries = list(nodes.entries.values())
    random.Random(len(entries)).shuffle(entries)
    return entries


@dataclass
class _Nodes:
    """Entries by full name, and the time."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    now: datetime = _BEGIN

    def task(self, name: str, said: str | list[str] | Rounds, before: str) -> str:
        """A driver and what it prepares; gives the node that the next task hangs on."""
        if said == "LEFT OUT":
            self.child(before, self.add(f"{name}-driver", None))
            self.child(f"{name}-driver", self.add(name, None))
            return name
        of_driver = {"DRIVER": "RUNNING", "BROKEN": "FAILED"}.get(str(said), "SUCCEEDED")
        attempt = self.repeated(f"{name}-driver", of_driver, after=before)
        if of_driver != "SUCCEEDED":
            return attempt
        rounds = _rounds(said)
        self.child(attempt, self.add(name, "RUNNING"))
        for number, states in enumerate(rounds):
            attempt = self.add(f"{name}({number})", "RUNNING")
            self.child(name, attempt)
            self.child(attempt, self.executor(f"{attempt}.executor", states))
            self.end(attempt, states[-1])
        self.end(name, rounds[-1][-1])
        return attempt

    def executor(self, name: str, states: list[str]) -> str:
        """The step's pods, one after the other; one that is cached has none."""
        if states == ["CACHED"]:
            self.end(self.add(name, "SKIPPED"), "SKIPPED")
            return name
        self.add(name, "RUNNING")
        for number, state in enumerate(state for state in states if state != "BACKOFF"):
            pod = self.add(f"{name}({number})", state)
            self.child(name, pod)
            self.now += timedelta(seconds=ATTEMPT_SECONDS)
            self.end(pod, state)
            self.now += timedelta(seconds=_BETWEEN_SECONDS)
        self.end(name, states[-1])
        return name

    def repeated(self, name: str, state: str, after: str | None = None) -> str:
        """A node that something hangs on, and its first attempt; gives the attempt."""
        if after is not None:
            self.child(after, name)
        attempt = self.add(f"{name}(0)", state)
        self.child(self.add(name, state), attempt)
        if state != "RUNNING":
            self.now += timedelta(seconds=_DRIVER_SECONDS)
            self.end(name, state)
            self.end(attempt, state)
        return attempt

    def in_scope(self, scope: str) -> list[str]:
        """Names directly in it, without attempts."""
        return [n for n in self.entries if n.rpartition(".")[0] == scope and n[-1] != ")"]

    def add(self, name: str, state: str | None) -> str:
        """An entry that starts now; without a state it was left out, and ends too."""
        self.entries[name] = {
            "task_id": str(uuid.uuid4()),
            "display_name": name.rpartition(".")[2],
            "create_time": _BEGIN.isoformat(),
            "start_time": self.now.isoformat(),
            "end_time": NOT_YET if state else self.now.isoformat(),
            **({"state": state} if state else {}),
            "child_tasks": [],
        }
        return name

    def end(self, name: str, state: str) -> None:
        """It ends now, unless it goes on."""
        state = {"CACHED": "SUCCEEDED", "BACKOFF": "RUNNING"}.get(state, state)
        self.entries[name]["state"] = state
        if state not in ("RUNNING", "PENDING"):
            self.entries[name]["end_time"] = self.now.isoformat()

    def child(self, parent: str, name: str) -> None:
        """Note a child of a node, by its id."""
        self.entries[parent]["child_tasks"].append({"pod_name": node_id(WORKFLOW, name)})


def _rounds(said: str | list[str] | Rounds) -> Rounds:
    if isinstance(said, str):
        return [[said]]
    return [said] if isinstance(said[0], str) else said  # type: ignore[list-item]
