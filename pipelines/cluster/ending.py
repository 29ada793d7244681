"""What is said when a run has ended: how it went, and of a failure what, why and how often."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby

from flagscale.errors import UserError
from pipelines.cluster.following import State
from pipelines.cluster.logs import last_pod, last_words, read_log
from pipelines.cluster.retry_policy import RetryPolicy, read_retry_policy
from pipelines.cluster.server import Server
from pipelines.cluster.steps import Attempt, Step
from pipelines.cluster.tracked_end import end_in_mlflow
from pipelines.outcome import StepFailed, duration

_FAILED = "FAILED"
_SHOWN_ROUNDS = 3
_READ = "docs/cluster.md, retries"


def check_ended(server: Server, state: State, url: str) -> None:
    """Every run that has ended comes by here, whoever followed it or looked at it.

    What a killed step left RUNNING in MLflow ends with it.

    Args:
        server: has the logs of failed steps.
        state: of the run.
        url: of its page.

    Raises:
        StepFailed: it ended badly; with the failing steps, their last words and attempts.
    """
    end_in_mlflow(state.run_id, state.state)
    if state.state in (_FAILED, "CANCELED"):
        raise StepFailed("\n".join([*_failure(server, state), url]))


def _failure(server: Server, state: State) -> list[str]:
    lines = [f"the run {state.state.lower()}"]
    # A terminated run's steps did not fail: they were stopped with it.
    failed = [step for step in state.steps if step.state == _FAILED == state.state]
    # The cause first: what is begun anew after it may fail in other ways.
    failed.sort(key=lambda step: step.attempts[0].end or step.start)
    policy = read_retry_policy(server.connection) if failed else None
    groups: dict[tuple[str, ...], list[tuple[Step, str]]] = {}
    for step in failed:
        words, rest = _words(server, state, step)
        groups.setdefault(words, []).append((step, rest))
    for words, steps in groups.items():
        lines.append(f"  {', '.join(step.label for step, _ in steps)}: {words[0]}")
        lines += [f"    {text}" for text in words[1:]]
        for step, rest in steps:
            whose = f"{step.label}: " if len(steps) > 1 else ""
            lines.append(f"    {whose}{_tries(step)}; {_why_no_more(step, policy)}")
            lines.append(f"    {rest}")
    if state.error:
        lines.append(f"  {state.error}")
    elif not failed and state.state == _FAILED:
        lines.append("  KFP tells of no step that failed")
    return lines


def _words(server: Server, state: State, step: Step) -> tuple[tuple[str, ...], str]:
    """What is known of why a step failed, and what shows the rest."""
    said = (step.error,) if step.error else ()
    pod = last_pod(server, step)
    if pod is None:
        return said or ("KFP does not tell which pod was its",), "its log: on the run's page"
    try:
        log = read_log(server, state.run_id, pod)
    except UserError as error:
        unread = f"KFP has no log of it that can be read ({error})"
        return (*said, unread), f"its log, while its pod is there: {pod.kubectl()}"
    command = f"python -m pipelines status {state.run_id} --log {shlex.quote(step.label)}"
    words = tuple(last_words(log, step.name)) or ("its log is empty",)
    return said + words, f"the whole log: {command}"


def _tries(step: Step) -> str:
    """Which attempts were made, and what each ended with."""
    rounds = [_round(attempts) for attempts in step.rounds]
    if len(rounds) > _SHOWN_ROUNDS:
        rounds = [rounds[0], f"{len(rounds) - 2} more times", rounds[-1]]
    number = len(step.attempts)
    what = "KFP's driver was tried" if step.by_driver else "tried"
    times = "once" if number == 1 else f"{number} times"
    return f"{what} {times} ({'; anew: '.join(rounds)})"


def _round(attempts: Sequence[Attempt]) -> str:
    """`FAILED after 33 s, 19 s, SUCCEEDED after 2 min 05 s`."""
    said = []
    for (state, error), some in groupby(attempts, lambda attempt: (attempt.state, attempt.error)):
        taken = [duration(attempt.seconds) for attempt in some if attempt.seconds is not None]
        after = f" after {', '.join(taken)}" if taken else ""
        said.append(f"{state}{after}{': ' if error else ''}{error}")
    return ", ".join(said)


def _why_no_more(step: Step, policy: RetryPolicy | None) -> str:
    if step.by_driver:
        return f"the step itself did not begin ({_READ})"
    danger = policy.danger if policy else None
    if len(step.rounds) > 1:
        allowed = f"its own retries allow {step.allowed}, but " if step.allowed else ""
        reason = (
            f": the cluster's retry policy {danger}"
            if danger
            else ", as a retry policy without an expression makes it"
        )
        return f"{allowed}KFP began anew what the step is in{reason} ({_READ})"
    if step.allowed is None:
        return f"how often its retries allow is not known ({_READ})"
    if len(step.attempts) >= step.allowed:
        return f"its retries allow no more: {step.allowed} attempts (retries of the platform file)"
    return f"its retries allow {step.allowed}, but {_not_repeated(policy, danger)} ({_READ})"


def _not_repeated(policy: RetryPolicy | None, danger: str | None) -> str:
    if danger:
        return f"the cluster's retry policy {danger}"
    if policy:
        return (
            "the cluster's retry policy repeats a pod that was stopped, killed or lost, and not "
            "one that ran out of memory or ended with an error of its own"
        )
    return (
        "KFP's retry policy did not repeat it: a good one leaves alone what ended with an error of "
        "its own, that of KFP 2.17 what was stopped or killed too"
    )
