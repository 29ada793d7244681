"""A TrainJob as Kubernetes and Trainer would take and run it, on one machine.

Checked, field by field, against Trainer's own models and by the rules of its webhook; each node is
a process group of this machine.
"""

import json
import os
import re
import signal
import socket
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from kubeflow_trainer_api import models

NAMESPACE = "kubeflow"
POD_OF_STEP = Path(__file__).with_name("pod-of-step.json")  # KFP 2.17, Argo 4.0.8; texts cut
SECRET = "planted-5f1c"
RUNTIME = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "ClusterTrainingRuntime",
    "metadata": {
        "name": "torch-distributed",
        "labels": {"trainer.kubeflow.org/framework": "torch"},
    },
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {
            "spec": {
                "replicatedJobs": [
                    {
                        "name": "node",
                        "template": {
                            "metadata": {
                                "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
                            },
                            "spec": {
                                "template": {
                                    "spec": {
                                        "containers": [{"name": "node", "image": "pytorch/pytorch"}]
                                    }
                                }
                            },
                        },
                    }
                ]
            }
        },
    },
}


class ApiError(Exception):
    """What the API refuses, as Kubernetes tells it."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class Node:
    """A pod of a TrainJob: a process group, its log, and how it ended."""

    def __init__(
        self, job: "Job", index: int, incarnation: int, environment: dict, folder: Path
    ) -> None:
        self.index = index
        self.name = f"{job.name}-node-0-{index}-{os.urandom(2).hex()}"
        self.log = folder / f"{self.name}.log"
        self.made = now()
        trainer = job.manifest["spec"]["trainer"]
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*trainer["command"], *trainer["args"]],
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.incarnation = incarnation

    def pod(self, job: "Job") -> dict[str, Any]:
        code = self.process.poll()
        phase = {None: "Running", 0: "Succeeded"}.get(code, "Failed")
        state: dict[str, Any] = {"running": {"startedAt": self.made}}
        if code is not None:
            reason = {0: "Completed", -9: "OOMKilled"}.get(code, "Error")
            code = code if code >= 0 else 128 - code
            state = {"terminated": {"exitCode": code, "reason": reason}}
        container = {"name": "node", "image": "i", "imageID": "", "ready": True, "restartCount": 0}
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "namespace": NAMESPACE,
                "creationTimestamp": self.made,
                "labels": {
                    "jobset.sigs.k8s.io/jobset-name": job.name,
                    "jobset.sigs.k8s.io/replicatedjob-name": "node",
                    "batch.kubernetes.io/job-completion-index": str(self.index),
                },
            },
            "spec": {"containers": [{"name": "node", "image": "i"}]},
            "status": {"phase": phase, "containerStatuses": [{**container, "state": state}]},
        }

    def kill(self, number: int) -> None:
        """To the container's first process; SIGKILL to everything in it."""
        if self.process.poll() is not None and number != signal.SIGKILL:
            return
        try:
            if number == signal.SIGKILL:
                if self.process.poll() is None:
                    for rank in psutil.Process(self.process.pid).children(recursive=True):
                        rank.kill()  # each is a process group of its own
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass


class Job:
    """A TrainJob."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.manifest, self.name = manifest, manifest["metadata"]["name"]
        self.nodes: list[Node] = []
        self.restarts = 0
        self.deleted = False

    def finished(self) -> str | None:
        codes = [node.process.poll() for node in self.newest()]
        if len(codes) == self.count and all(code == 0 for code in codes):
            return "Complete"
        return None

    @property
    def count(self) -> int:
        return int(self.manifest["spec"]["trainer"]["numNodes"])

    def newest(self) -> list[Node]:
        return list({node.index: node for node in self.nodes}.values())


def refuse(manifest: dict[str, Any]) -> None:
    """What Trainer's models do not know, and what its webhook forbids.

    Raises:
        ApiError: why.
    """
    try:
        kept = models.TrainerV1alpha1TrainJob.from_dict(manifest).to_dict()
    except ValueError as error:
        raise ApiError(422, str(error)) from error
    if kept != manifest:
        raise ApiError(422, "unknown fields")
    name = manifest["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > 63 - len("-node-0-00"):
        raise ApiError(422, f"metadata.name: {name}")
    for variable in manifest["spec"]["trainer"].get("env", []):
        if variable["name"].startswith("PET_"):
            raise ApiError(422, f"spec.trainer.env: {variable['name']} is reserved")
        if ("value" in variable) == ("valueFrom" in variable):
            raise ApiError(422, f"spec.trainer.env: {variable['name']}")
    for patch in manifest["spec"].get("runtimePatches", []):
        for job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            pod = job["template"]["spec"]["template"]["spec"]
            volumes = {volume["name"] for volume in pod.get("volumes", [])}
            for container in pod["containers"]:
                if container["name"] == "node" and "env" in container:
                    raise ApiError(422, "env of node belongs into spec.trainer.env")
                if not {one["name"] for one in container.get("volumeMounts", [])} <= volumes:
                    raise ApiError(422, "volumeMounts: no such volume")


def pending(job: Job, index: int) -> dict[str, Any]:
    labels = {
        "jobset.sigs.k8s.io/jobset-name": job.name,
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
    }
    return {
        "metadata": {"name": f"{job.name}-node-0-{index}-x", "labels": labels},
        "spec": {"containers": [{"name": "node", "image": "i"}]},
        "status": {"phase": "Pending", "conditions": [unschedulable]},
    }


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


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
