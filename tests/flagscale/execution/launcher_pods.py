"""The pod of a step, as Argo and KFP make it; this process is the launcher in it."""

import json
from pathlib import Path
from typing import Any

POD_OF_STEP = Path(__file__).with_name("pod-of-step.json")  # KFP 2.17, Argo 4.0.8; texts cut


def launcher_pod(shared: Path) -> dict[str, Any]:
    """A step's pod as it stood in a real cluster, with what a platform file may give it more."""
    pod: dict[str, Any] = json.loads(POD_OF_STEP.read_text())
    pod["metadata"]["labels"] |= {
        "team": "llm",
        "kueue.x-k8s.io/queue-name": "distillation",
        "kueue.x-k8s.io/priority-class": "training",
        "kueue.x-k8s.io/managed": "true",
    }
    spec = pod["spec"]
    spec["nodeSelector"] = {"pool": "h100"}
    spec["tolerations"].append(
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    )
    spec["imagePullSecrets"] = [{"name": "registry"}]
    spec["volumes"] += [
        {"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
        {"name": "kube-api-access-x", "projected": {"sources": []}},
    ]
    token = {"name": "kube-api-access-x", "mountPath": "/var/run/secrets/kubernetes.io"}
    for container in [*spec["initContainers"], *spec["containers"]]:
        container["volumeMounts"].append(token)
    main = main_of(pod)
    main["env"].append({"name": "NCCL_DEBUG", "value": "WARN"})
    for variable in main["env"]:
        if variable["name"] == "FLAGSCALE_SHARED":
            variable["value"] = str(shared)
    for mount in main["volumeMounts"]:
        if mount["name"] == "flagscale-shared":
            mount["mountPath"] = str(shared)
    main["volumeMounts"].append({"name": "dshm", "mountPath": "/dev/shm"})
    return pod


def main_of(pod: dict[str, Any]) -> dict[str, Any]:
    """The step's container, which is not the first one."""
    (main,) = [one for one in pod["spec"]["containers"] if one["name"] == "main"]
    return main
