"""A TrainJob as Kubernetes and Trainer would take and run it, on one machine.

Checked, field by field, against Trainer's own models and by the rules of its webhook; each node is
a process group of this machine. Objects look as those of Kubernetes 1.36 and Trainer 2.3 did.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from kubeflow_trainer_api import models

NAMESPACE = "kubeflow"
POD_OF_TRAINJOB = Path(__file__).with_name("pod-of-trainjob.json")
OTHER = "distil-student-91256733a1dd"  # the TrainJob whose pod that was
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
    """A pod of a TrainJob: its container, which is started anew in place when it fails.

    Attributes:
        process: the container, a process group.
        disrupted: whether the node is taken away.
        removed: whether the pod's object is gone.
    """

    def __init__(self, job: "Job", index: int, environment: dict[str, str], folder: Path) -> None:
        self.index, self.job = index, job
        self.name = f"{job.name}-node-0-{index}-{os.urandom(3).hex()[:5]}"
        self.made = now()
        self.restarts = 0
        self.disrupted = self.removed = False
        self._environment, self._folder = environment, folder
        self._last: dict[str, Any] = {}
        self._start()

    def _start(self) -> None:
        self._started = time.monotonic()
        self.log = self._folder / f"{self.name}-{self.restarts}.log"
        trainer = self.job.manifest["spec"]["trainer"]
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [*trainer["command"], *trainer["args"]],
                env=self._environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_due(self) -> bool:
        """Whether its container is started anew: at once, later with longer and longer pauses."""
        pause = 10 * 2 ** (self.restarts - 1) if self.restarts else 0
        return self.has_failed and time.monotonic() - self._started > pause

    def restart(self) -> None:
        """`restartPolicy: OnFailure`: the same pod, its container anew."""
        self._last = self._state()
        self.restarts += 1
        self._start()

    @property
    def has_failed(self) -> bool:
        return self.process.poll() not in (None, 0)

    def _state(self) -> dict[str, Any]:
        code = self.process.poll()
        if code is None:
            return {"running": {"startedAt": self.made}}
        reason = {0: "Completed"}.get(code, "Error")
        return {"terminated": {"exitCode": code if code >= 0 else 128 - code, "reason": reason}}

    def pod(self) -> dict[str, Any]:
        """The object; only a pod that is not started anew has failed."""
        found: dict[str, Any] = json.loads(
            POD_OF_TRAINJOB.read_text().replace(OTHER, self.job.name)
        )
        found["metadata"] |= {"name": self.name, "creationTimestamp": self.made}
        for where in ("labels", "annotations"):
            found["metadata"][where]["batch.kubernetes.io/job-completion-index"] = str(self.index)
        found["spec"]["hostname"] = f"{self.job.name}-node-0-{self.index}"
        ended = self.job.has_failed or self.disrupted or self.process.poll() == 0
        phase = {None: "Running", 0: "Succeeded"}.get(self.process.poll(), "Failed")
        status = found["status"] | {"phase": phase if ended else "Running"}
        status["containerStatuses"][0] |= {
            "restartCount": self.restarts,
            "ready": self.process.poll() is None,
            "lastState": self._last,
            "state": self._state(),
        }
        if self.disrupted:
            found["metadata"]["deletionTimestamp"] = self.made
            status["conditions"].append(
                {
                    "type": "DisruptionTarget",
                    "status": "True",
                    "reason": "EvictionByEvictionAPI",
                    "message": "Eviction API: evicting",
                }
            )
        return {**found, "status": status}

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
    """A TrainJob.

    Attributes:
        nodes: all its pods, also those that are gone.
        port: of its rendezvous, which nobody else can get while this lives.
    """

    def __init__(self, manifest: dict[str, Any]) -> None:
        self.manifest, self.name = manifest, manifest["metadata"]["name"]
        self.nodes: list[Node] = []
        self.restarts = 0
        self.deleted = self.has_failed = self.timed_out = False
        self._holder = socket.socket()
        # Bound, not listening: the kernel gives the port to nobody, and torch's store may have it.
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind(("127.0.0.1", 0))
        self.port = int(self._holder.getsockname()[1])

    def is_complete(self) -> bool:
        codes = [node.process.poll() for node in self.pods()]
        return len(codes) == self.count and all(code == 0 for code in codes)

    @property
    def count(self) -> int:
        return int(self.manifest["spec"]["trainer"]["numNodes"])

    def pods(self) -> list[Node]:
        return [node for node in self.nodes if not node.removed]

    def object(self) -> dict[str, Any]:
        """As the API shows it: what is missing in the request is filled in, and has a status."""
        spec = {**self.manifest["spec"], "suspend": False}
        spec["managedBy"] = "trainer.kubeflow.org/trainjob-controller"
        spec["runtimePatches"] = [{**one, "time": now()} for one in spec.get("runtimePatches", [])]
        active = sum(node.process.poll() is None for node in self.pods())
        told = {"name": "node", "active": active, "ready": active, "suspended": 0}
        told |= {"failed": int(self.has_failed), "succeeded": int(self.is_complete())}
        status: dict[str, Any] = {"jobsStatus": [told]}
        condition = self._condition()
        if condition:
            status["conditions"] = [{"status": "True", "lastTransitionTime": now(), **condition}]
        return {**self.manifest, "spec": spec, "status": status}

    def _condition(self) -> dict[str, str] | None:
        if self.timed_out:
            message = "TrainJob exceeded its active deadline"
            return {"type": "Failed", "reason": "DeadlineExceeded", "message": message}
        if self.has_failed:
            message = "jobset failed due to one or more job failures"
            return {"type": "Failed", "reason": "FailedJobs", "message": message}
        if self.is_complete():
            message = "jobset completed successfully"
            return {"type": "Complete", "reason": "AllJobsCompleted", "message": message}
        return None


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
