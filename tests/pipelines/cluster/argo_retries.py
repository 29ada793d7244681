"""How often Argo tries a step: its controller's rules, for one step and the DAG that it is in.

The step's executor has a limit of its own, and everything else of the controller's retry strategy.
The DAG around it has that strategy whole; levels above it would begin anew in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

from pipelines.cluster.retry_policy import RetryPolicy
from tests.deploy.argo_retries import KINDS, Attempt, Policy

MOST = 8  # rounds, of what would go on without end
DONE = Attempt("Succeeded", "0")


def rounds(policy: RetryPolicy, limit: int, ends: Callable[[int], Attempt]) -> list[list[str]]:
    """KFP's states of a step's attempts, a list for each time that its DAG is begun.

    Args:
        policy: the controller's.
        limit: of repetitions, the step's own.
        ends: how an attempt ends, by its number among all of them.
    """
    most = None if policy.limit is None else int(policy.limit)
    argos = Policy(policy.is_set, most, KINDS[policy.policy], policy.expression or None)
    found: list[list[str]] = []
    made = 0
    while True:
        states, repeated = [], True
        while repeated:
            last = ends(made)
            made += 1
            states.append("SUCCEEDED" if last is DONE else "FAILED")
            repeated = len(states) <= limit and argos.repeats(last)
        found.append(states)
        of_dag = Attempt(last.status)  # a DAG has no exit code
        is_left = most is None or len(found) <= most
        if not (argos.given and is_left and len(found) < MOST and argos.repeats(of_dag)):
            return found
