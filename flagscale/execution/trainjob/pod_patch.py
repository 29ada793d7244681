"""What Trainer is to change of its runtime's pods, so that they are as their launcher's pod is."""

from __future__ import annotations

from typing import Any

from flagscale.execution.trainjob.nodes import NodePods
from flagscale.run_values.network import Network

KUEUE = "kueue.x-k8s.io/"
_NODE = "node"  # Trainer's name for the training's container
_LABELS_OF_OTHERS = ("pipelines.kubeflow.org/", "pipeline/", "workflows.argoproj.io/")
# A sidecar would stand between the ranks, and keep the pod from ending.
_NO_SIDECAR = {"sidecar.istio.io/inject": "false"}


def pod_patch(
    launcher: dict[str, Any],
    main: dict[str, Any],
    mounts: list[dict[str, Any]],
    pods: NodePods,
    grace_seconds: int,
) -> dict[str, Any]:
    """The patch of a TrainJob for its nodes' pods.

    Args:
        launcher: this pod.
        main: its container.
        mounts: of `own_mounts`.
        pods: what the nodes have beside that.
        grace_seconds: between SIGTERM and SIGKILL.
    """
    spec = launcher["spec"]
    used = {mount["name"] for mount in mounts}
    volumes = [volume for volume in spec.get("volumes", []) if volume["name"] in used]
    of_the_host, there = _host_folders(pods.network)
    container: dict[str, Any] = {
        "name": _NODE,
        "volumeMounts": mounts + there,
        "securityContext": _with_capabilities(main.get("securityContext"), pods.network),
    }
    pod = {
        "containers": [_filled(container)],
        "volumes": volumes + of_the_host,
        "nodeSelector": spec.get("nodeSelector"),
        "tolerations": [one for one in spec.get("tolerations", []) if not _is_everyones(one)],
        "imagePullSecrets": spec.get("imagePullSecrets"),
        "securityContext": spec.get("securityContext"),
        "affinity": spec.get("affinity"),
        "terminationGracePeriodSeconds": grace_seconds,
    }
    labels = {
        key: value
        for key, value in launcher["metadata"].get("labels", {}).items()
        if not key.startswith((*_LABELS_OF_OTHERS, KUEUE))
    }
    annotations = {**pods.annotations, **pods.network.annotations, **_NO_SIDECAR}
    template = {
        "metadata": {"labels": labels | _NO_SIDECAR, "annotations": annotations},
        "spec": _filled(pod),
    }
    job = {"name": _NODE, "template": {"spec": {"template": template}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}


def _with_capabilities(context: dict[str, Any] | None, network: Network) -> dict[str, Any] | None:
    """The launcher's security context, and what the network needs beside it."""
    if not network.capabilities:
        return context
    before = (context or {}).get("capabilities", {})
    added = [*before.get("add", []), *network.capabilities]
    return {**(context or {}), "capabilities": {**before, "add": added}}


def _host_folders(network: Network) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes, and where they are mounted, to read."""
    volumes, mounts = [], []
    for number, (outside, inside) in enumerate(network.host_folders.items()):
        name = f"host-folder-{number}"
        volumes.append({"name": name, "hostPath": {"path": outside, "type": "Directory"}})
        mounts.append({"name": name, "mountPath": inside, "readOnly": True})
    return volumes, mounts


def _is_everyones(toleration: dict[str, Any]) -> bool:
    """Whether Kubernetes itself adds it to every pod."""
    key = toleration.get("key", "")
    return key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


def own_mounts(launcher: dict[str, Any], main: dict[str, Any]) -> list[dict[str, Any]]:
    """The mounts that the platform file asked for, which are those of the step alone.

    Argo mounts what a step's template has in its own containers too, beside what it brings itself;
    only then does KFP add what a platform asks for. A service account's token is everybody's.
    """
    spec = launcher["spec"]
    others = [c for c in (*spec.get("initContainers", []), *spec["containers"]) if c is not main]
    theirs = {mount["name"] for other in others for mount in other.get("volumeMounts", [])}
    return [mount for mount in main.get("volumeMounts", []) if mount["name"] not in theirs]


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value}
