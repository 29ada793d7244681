"""What a TrainJob and its pods say of themselves, read from the API's objects."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

_NODE = "node"
_INDEX = "batch.kubernetes.io/job-completion-index"
_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGTERM)


def is_complete(job: dict[str, Any]) -> bool:
    """Whether every node has ended well."""
    return _condition(job, "Complete") is not None


def failure(job: dict[str, Any]) -> str | None:
    """Why Trainer calls it failed; None if it does not."""
    found = _condition(job, "Failed")
    return None if found is None else f"{found.get('reason', '')}: {found.get('message', '')}"


def lasting(job: dict[str, Any], pods: list[dict[str, Any]]) -> str | None:
    """What another start would not mend: it took too long, or memory did not suffice; else None."""
    found = _condition(job, "Failed")
    if found is not None and found.get("reason") == "DeadlineExceeded":
        return failure(job)
    for pod in pods:
        if any(ended.get("reason") == "OOMKilled" for ended in _ends(pod)):
            return f"pod {pod['metadata']['name']} ran out of memory (OOMKilled)"
    return None


def dead_pod(pods: list[dict[str, Any]]) -> str | None:
    """A pod whose training was ended, and why: Evicted, OOMKilled, an exit code; None if all live.

    A pod that was started anew is told by what ended it before.
    """
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for ended in _ends(pod):
            if ended["exitCode"] != 0:
                reason = ended.get("reason", "Error")
                return f"pod {name} ended: {reason}, exit code {ended['exitCode']}"
        if status.get("phase") == "Failed":
            told = ": ".join(filter(None, (status.get("reason"), status.get("message"))))
            return f"pod {name} failed: {told or 'no reason given'}"
    return None


def is_lost(pods: list[dict[str, Any]]) -> bool:
    """Whether a pod is taken away, or was killed, rather than that its training failed."""
    for pod in pods:
        for condition in pod.get("status", {}).get("conditions", []):
            if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
                return True
        if any(ended["exitCode"] in _KILLED for ended in _ends(pod)):
            return True
    return False


def all_ended(pods: list[dict[str, Any]]) -> bool:
    """Whether there were pods, and none of them lives."""
    phases = [pod.get("status", {}).get("phase") for pod in pods]
    return bool(pods) and all(phase in ("Succeeded", "Failed") for phase in phases)


def waiting(job: dict[str, Any], pods: list[dict[str, Any]], nodes: int) -> str | None:
    """What a TrainJob waits for; None if as many pods run as it has nodes."""
    phases = [pod.get("status", {}).get("phase") for pod in pods]
    if sum(phase in ("Running", "Succeeded") for phase in phases) >= nodes:
        return None
    for pod in pods:
        reason = _pending(pod)
        if reason:
            return f"pod {pod['metadata']['name']}: {reason}"
    suspended = _condition(job, "Suspended")
    if suspended is not None or job.get("spec", {}).get("suspend"):
        return f"suspended, e.g. queued by Kueue: {(suspended or {}).get('message', '')}"
    return f"{len(pods)} of {nodes} pods made"


def first_node(pods: list[dict[str, Any]]) -> str | None:
    """Name of the newest pod of node 0, None if there is none."""
    found = [p for p in pods if p["metadata"].get("labels", {}).get(_INDEX) == "0"]
    newest = sorted(found, key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
    return newest[-1]["metadata"]["name"] if newest else None


def _ends(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How the training's container ended, now and before it was started anew."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        for state in (container.get("state", {}), container.get("lastState", {})):
            if container["name"] == _NODE and state.get("terminated"):
                yield state["terminated"]


def _pending(pod: dict[str, Any]) -> str | None:
    status = pod.get("status", {})
    for container in status.get("containerStatuses", []):
        state = container.get("state", {}).get("waiting")
        if state:
            return ": ".join(filter(None, (state.get("reason"), state.get("message"))))
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] != "True":
            return ": ".join(filter(None, (condition.get("reason"), condition.get("message"))))
    return None


def _condition(job: dict[str, Any], kind: str) -> dict[str, Any] | None:
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] == kind and condition["status"] == "True":
            found: dict[str, Any] = condition
            return found
    return None
