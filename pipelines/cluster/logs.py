"""The log of a step's pod, wherever KFP still has it, and what it ends with.

Argo puts each pod's log into the object store, as artifact `main-logs` of the pod's node, and
KFP's API reads a node's artifacts. What KFP's launcher uploads beside it (`executor-logs-0`, ...)
is known to ML Metadata alone in KFP 2.17, under a path with a random part; a server whose API
knows it is asked for it too. Where nothing is archived, the UI's server reads the log of a pod that
is still there.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass

from flagscale.errors import UserError
from pipelines.cluster.client import TIMEOUT_SECONDS
from pipelines.cluster.connection_errors import NotKfp
from pipelines.cluster.following import State
from pipelines.cluster.server import Server
from pipelines.cluster.steps import Step

_LAST_LINES = 20
_NONE = "there is none"
_OURS = re.compile(r"\d\d:\d\d:\d\d (.*)")  # as flagscale.execution.logs writes
# What KFP's launcher (klog) and Argo's emissary write after the step's own last word.
_PUBLISHED = re.compile(r"\S+ is at ")  # a step's last word when all went well
_OF_LAUNCHER = re.compile(r"[EF]\d{4} (?!.*exit status)")  # an error that is not the step's
_OTHERS = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d.*|time=.*|Error: exit status \d+|\s*")


@dataclass(frozen=True)
class Pod:
    """The pod of an attempt.

    Attributes:
        node: the id of its node.
        name: Kubernetes'.
        namespace: that it runs in.
        attempt: of those that are counted together, from 0.
    """

    node: str
    name: str
    namespace: str
    attempt: int

    def kubectl(self) -> str:
        """The command that shows its log, as long as the pod is there."""
        return f"kubectl --namespace {self.namespace} logs {self.name} --container main"


def last_pod(server: Server, step: Step) -> Pod | None:
    """The pod of a step's last attempt; None: it never had one, or the server does not tell."""
    if not step.attempts or not step.attempts[-1].node:
        return None
    node = step.attempts[-1].node
    workflow, _, value = node.rpartition("-")
    # Argo names a pod by its template; KFP has one more for tasks with retries.
    template = "system-container-impl" if step.allowed == 1 else "retry-system-container-impl"
    template = "system-container-driver" if step.by_driver else template
    name = f"{workflow}-{template}-{value}"
    return Pod(node, name, server.namespace or "kubeflow", len(step.rounds[-1]) - 1)


def read_log(server: Server, run_id: str, pod: Pod) -> str:
    """The pod's log.

    Raises:
        UserError: KFP has none that can be read; the message says what it answered.
    """
    ways = (
        lambda: _archived(server, run_id, pod, "main-logs"),
        lambda: _archived(server, run_id, pod, f"executor-logs-{pod.attempt}"),
        lambda: _of_pod(server, run_id, pod),
    )
    problems = []
    for way in ways:
        try:
            return way()
        except UserError as error:
            problems.append(str(error))
    raise UserError("; ".join(problems))


def step_log(server: Server, state: State, label: str) -> str:
    """The log of a step's last attempt.

    Args:
        server: has it.
        state: of the run.
        label: of the step, as `status` shows it.

    Raises:
        UserError: the run has no such step, or KFP no log of it.
    """
    step = next((step for step in state.steps if step.label == label), None)
    if step is None:
        labels = ", ".join(step.label for step in state.steps) or "none"
        raise UserError(f"--log {label}: no step of this run; those that have begun: {labels}")
    pod = last_pod(server, step)
    if pod is None:
        why = "it was taken from the cache" if step.state == "CACHED" else "it has had no pod"
        raise UserError(f"--log {label}: there is none, {why}")
    try:
        return read_log(server, state.run_id, pod)
    except UserError as error:
        raise UserError(f"--log {label}: {error}; try {pod.kubectl()}") from None


def last_words(log: str, step: str) -> list[str]:
    """What a step's log ends with: its error, without what tells where; else its last lines.

    Args:
        log: whole.
        step: the name of its task.
    """
    lines = log.rstrip().splitlines()
    own = list(lines)
    while own and _OTHERS.fullmatch(own[-1]):
        own.pop()
    if any(_OF_LAUNCHER.match(line) for line in lines[len(own) :]):
        return lines[-_LAST_LINES:]  # the step had done its work, and KFP could not take it
    return _error(own, step) or (own or lines)[-_LAST_LINES:]


def _error(lines: list[str], step: str) -> list[str] | None:
    """The error at the end of a log, if it is there in the form in which steps tell one."""
    more: list[str] = []
    for line in reversed(lines):
        found = _OURS.fullmatch(line)
        if found is None:
            more.insert(0, line)
            continue
        if found[1].startswith("MLflow "):
            more = []  # it is told of the error, and may not listen
            continue
        name, _, message = found[1].partition(": ")
        # The task of a training on several nodes has the name of the step, and more.
        is_error = message and step.startswith(name) and not _PUBLISHED.match(message)
        return [message, *more] if is_error else None
    return None


def _archived(server: Server, run_id: str, pod: Pod, name: str) -> str:
    path = f"/apis/v2beta1/runs/{run_id}/nodes/{pod.node}/artifacts/{name}:read"
    doing = f"reading artifact {name}"
    answer = server.read(doing, lambda: _get(server, path, "application/json"), _NONE)
    try:
        return _text(base64.b64decode(json.loads(answer)["data"], validate=True))
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{doing}: the answer is broken") from None


def _of_pod(server: Server, run_id: str, pod: Pod) -> str:
    query = [("podname", pod.name), ("runid", run_id), ("podnamespace", pod.namespace)]
    return _text(
        server.read(
            "reading the pod's log",
            lambda: _get(server, "/k8s/pod/logs", "text/plain", query),
            _NONE,
        )
    )


def _get(server: Server, path: str, kind: str, query: list[tuple[str, str]] | None = None) -> bytes:
    """A body as it is: KFP's client would take a log for JSON or for a text of valid UTF-8."""
    response = server.client.runs.api_client.call_api(
        path,
        "GET",
        query_params=query,
        auth_settings=["Bearer"],
        _preload_content=False,
        _request_timeout=TIMEOUT_SECONDS,
    )
    try:
        if not response.headers.get("content-type", "").startswith(kind):
            raise NotKfp  # the page of a UI that does not know the path, most often
        body: bytes = response.data
    finally:
        response.release_conn()
    return body


def _text(log: bytes) -> str:
    return log.decode(errors="replace")
