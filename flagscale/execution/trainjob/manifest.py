"""The TrainJob of a training, made of the launcher's own pod.

KFP has put the launcher's pod where the platform file and the run's parameters say: image, node
selector, tolerations, volumes, secrets. The nodes get the same, so that each of them holds for
both with nothing said twice. What KFP and Argo add for themselves stays behind: a volume is
declared exactly if the step alone mounts it.

The kubeflow SDK's `train` takes environment variables as plain values only, which would write
secrets into the TrainJob, and no owner: so the object is built here, and checked by Trainer's own
models.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flagscale import variables
from flagscale.errors import UserError
from flagscale.execution.trainjob.nodes import NodePods
from flagscale.execution.trainjob.pod_patch import KUEUE, own_mounts, pod_patch
from flagscale.execution.trainjob.rights import GROUP, VERSION

_CONTAINER = "main"  # the step's, in a pod of Argo
_MANAGER = "flagscale.distillation/launcher"
_ENVIRONMENT_OF_KFP = ("KFP_POD_", "ARGO_", "ML_PIPELINE_", "METADATA_", "PET_")
_QUEUE_LABELS = (f"{KUEUE}queue-name", f"{KUEUE}priority-class")


@dataclass(frozen=True)
class Nodes:
    """What is to be started.

    Attributes:
        count: pods.
        processes: ranks on each.
        accelerator_count: of each pod.
        pods: their resources.
    """

    count: int
    processes: int
    accelerator_count: int
    pods: NodePods


def train_job(
    name: str,
    runtime_kind: str,
    launcher: dict[str, Any],
    shared: Path,
    nodes: Nodes,
    command: list[str],
    environment: Mapping[str, str],
    defaults: Mapping[str, str],
    grace_seconds: int,
) -> dict[str, Any]:
    """The TrainJob, as Kubernetes' API takes it.

    Args:
        name: of the TrainJob.
        runtime_kind: ClusterTrainingRuntime or TrainingRuntime.
        launcher: this pod.
        shared: the folder that all nodes need.
        nodes: how many, with what.
        command: of each node's container.
        environment: variables set beside the launcher's.
        defaults: variables set where the launcher has none.
        grace_seconds: between SIGTERM and SIGKILL when it is deleted.

    Raises:
        UserError: the nodes would not see `shared`; or Trainer's own models refuse it, e.g. a
            field of this cluster's pods.
    """
    main = _main(launcher)
    mounts = own_mounts(launcher, main)
    if not any(shared.is_relative_to(mount["mountPath"]) for mount in mounts):
        raise UserError(
            f"{variables.SHARED}={shared}: no volume that the platform file gives this pod is "
            f"mounted there, but {[mount['mountPath'] for mount in mounts]}; nodes would not see it"
        )
    queue = _labels(launcher, _QUEUE_LABELS)
    spec: dict[str, Any] = {
        "runtimeRef": {
            "apiGroup": GROUP,
            "kind": runtime_kind,
            "name": nodes.pods.runtime,
        },
        "trainer": {
            "image": main["image"],
            "command": command[:1],
            "args": command[1:],
            "env": _environment(
                main,
                _told(nodes) | dict(environment),
                {**defaults, **nodes.pods.network.env},
            ),
            "numNodes": nodes.count,
            "numProcPerNode": nodes.processes,
            "resourcesPerNode": _resources(nodes),
        },
        "runtimePatches": [
            {
                "manager": _MANAGER,
                "trainingRuntimeSpec": pod_patch(launcher, main, mounts, nodes.pods, grace_seconds),
            }
        ],
    }
    if nodes.pods.timeout_seconds is not None:
        spec["activeDeadlineSeconds"] = nodes.pods.timeout_seconds
    owner = {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": launcher["metadata"]["name"],
        "uid": launcher["metadata"]["uid"],
    }
    return checked(
        {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": "TrainJob",
            "metadata": {
                "name": name,
                "labels": {"app.kubernetes.io/managed-by": "flagscale-distillation", **queue},
                "ownerReferences": [owner],  # Kubernetes deletes it with the launcher's pod
            },
            "spec": spec,
        }
    )


def checked(manifest: dict[str, Any]) -> dict[str, Any]:
    """The same, if Trainer's models know every field of it.

    Raises:
        UserError: a field is unknown or has a wrong type.
    """
    from kubeflow_trainer_api import models
    from pydantic import ValidationError

    try:
        known = models.TrainerV1alpha1TrainJob.from_dict(manifest)
    except ValidationError as error:
        raise UserError(f"TrainJob: {error}") from error
    assert known is not None
    lost = _lost(manifest, known.to_dict(), "TrainJob")
    if lost:
        raise UserError(f"Kubeflow Trainer does not know: {', '.join(lost)}")
    return manifest


def _lost(given: Any, kept: Any, where: str) -> list[str]:  # noqa: ANN401 - JSON values
    """Fields that a model did not keep: it drops what it does not know, and says nothing."""
    if isinstance(given, dict) and isinstance(kept, dict):
        pairs = [(f"{where}.{key}", value, kept.get(key)) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        pairs = [(f"{where}[{i}]", one, kept[i]) for i, one in enumerate(given)]
    else:
        return [] if given == kept else [where]
    return [lost for name, ours, theirs in pairs for lost in _lost(ours, theirs, name)]


def _main(pod: dict[str, Any]) -> dict[str, Any]:
    containers: list[dict[str, Any]] = pod["spec"]["containers"]
    named = [container for container in containers if container["name"] == _CONTAINER]
    return (named or containers)[0]


def _told(nodes: Nodes) -> dict[str, str]:
    """The launcher's pod has no accelerators, and is told of none."""
    count = nodes.accelerator_count
    return {variables.ACCELERATORS: str(count)} if count else {}


def _environment(
    main: dict[str, Any], given: Mapping[str, str], defaults: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The launcher's variables; secrets stay references, what depends on its pod becomes a value.

    `given` wins over the launcher's, and they over `defaults`. In those the launcher's pod and a
    platform file write, Kubernetes replaces `$(NAME)`; what this process found out is as it is.
    """
    found: dict[str, dict[str, Any]] = {
        name: {"name": name, "value": value} for name, value in defaults.items()
    }
    for variable in main.get("env", []):
        name, source = variable["name"], variable.get("valueFrom", {})
        if name.startswith(_ENVIRONMENT_OF_KFP):
            continue
        if "fieldRef" in source or "resourceFieldRef" in source:
            if name in os.environ:
                found[name] = {"name": name, "value": _escaped(os.environ[name])}
        elif source:
            found[name] = {"name": name, "valueFrom": source}
        else:
            found[name] = {"name": name, "value": variable.get("value", "")}
    found |= {name: {"name": name, "value": _escaped(value)} for name, value in given.items()}
    return list(found.values())


def _escaped(value: str) -> str:
    """As Kubernetes reads a `$` that is one, and no reference to another variable."""
    return value.replace("$", "$$")


def _resources(nodes: Nodes) -> dict[str, dict[str, str]]:
    pods = nodes.pods
    limits = {"memory": pods.memory}
    if nodes.accelerator_count:
        limits[pods.accelerator_type] = str(nodes.accelerator_count)
    limits |= {name: str(count) for name, count in pods.network.resources.items()}
    return {"requests": {"cpu": pods.cpu, **limits}, "limits": limits}


def _labels(pod: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
    labels = pod["metadata"].get("labels", {})
    return {name: labels[name] for name in names if name in labels}
