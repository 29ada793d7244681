"""How often Argo tries a step: its controller's rules, for one step and the DAG that it is in.

The step's executor has a limit of its own, and everything else of the controller's retry strategy.
The DAG around it has that strategy whole; levels above it would begin anew in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from pipelines.cluster.retry_policy import RetryPolicy

MOST = 8  # rounds, of what would go on without end


@dataclass(frozen=True)
class Ending:
    """How an attempt ended: the phase of its node, its exit code, the message."""

    phase: str
    exit_code: int = -1
    message: str = ""


MISTAKE = Ending("Failed", 1, "Error (exit code 1)")
OUT_OF_MEMORY = Ending("Failed", 137, "OOMKilled (exit code 137)")
KILLED = Ending("Failed", 137, "Error (exit code 137)")
STOPPED = Ending("Failed", 143, "Error (exit code 143)")
VANISHED = Ending("Error", message="pod deleted")
DONE = Ending("Succeeded", 0)


def rounds(policy: RetryPolicy, limit: int, ends: Callable[[int], Ending]) -> list[list[str]]:
    """KFP's states of a step's attempts, a list for each time that its DAG is begun.

    Args:
        policy: the controller's.
        limit: of repetitions, the step's own.
        ends: how an attempt ends, by its number among all of them.
    """
    found: list[list[str]] = []
    made = 0
    while True:
        states, repeated = [], True
        while repeated:
            last = ends(made)
            made += 1
            states.append("SUCCEEDED" if last is DONE else "FAILED")
            repeated = len(states) <= limit and _repeats(policy, last)
        found.append(states)
        of_dag = Ending(last.phase)  # a DAG has no exit code
        is_left = policy.limit is None or len(found) <= int(policy.limit)
        if not (policy.is_set and is_left and len(found) < MOST and _repeats(policy, of_dag)):
            return found


def _repeats(policy: RetryPolicy, last: Ending) -> bool:
    phases = {"Always": ("Failed", "Error"), "OnFailure": ("Failed",), "OnError": ("Error",)}
    if last.phase not in phases.get(policy.policy, ()):
        return False
    return not policy.expression or _holds(policy.expression, last)


def _holds(expression: str, last: Ending) -> bool:
    """The expression's value; its language is Python's but for a few words."""
    text = re.sub(r'([\w.]+) contains ("\w+")', r"\2 in \1", expression)
    for theirs, ours in (("||", " or "), ("&&", " and "), ("!(", "not ("), ("\n", " ")):
        text = text.replace(theirs, ours)
    retry = SimpleNamespace(
        status=last.phase, exitCode=str(last.exit_code), message=last.message, duration="1"
    )
    return bool(eval(text, {"lastRetry": retry, "asInt": int}))
