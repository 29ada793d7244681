"""The training's pod, and what else is asked of Kubernetes' API with a kubeconfig."""

from __future__ import annotations

import re
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import stream

from tests.cluster.settings import SAVE_INTERVAL
from tests.cluster.table import Failed, Skipped
from tests.deploy.argo_retries import CONFIG_MAP, Policy

SYSTEM = "kubeflow"  # where Kubeflow Pipelines' own pods are
_NODE_NAME = "workflows.argoproj.io/node-name"
# `(N)` stands there where the policy of retries reaches the DAGs.
_TRAINING = re.compile(r"\.distil-student(-on-nodes)?(\(\d+\))?\.executor")
_STEP = re.compile(r"(?:\bstep (\d+)/|validation after step (\d+):)")
_RESUMED = re.compile(r"resuming after step (\d+)")
# The step's container is Argo's emissary, KFP's launcher below it, and the step below that. Of
# these the launcher's end is the container's; 1 is the first process, which nothing inside kills.
_KILL = """\
import glob, os, signal
for path in glob.glob("/proc/[0-9]*/cmdline"):
    words = open(path, "rb").read().split(b"\\0")
    if words[0].endswith(b"/launch") and path != "/proc/1/cmdline":
        os.kill(int(path.split("/")[2]), signal.SIGKILL)
        print("killed")
"""


class Pods:
    """Kubernetes' API, as the kubeconfig in KUBECONFIG reaches it."""

    def __init__(self, namespace: str) -> None:
        config.load_kube_config()
        self.namespace = namespace
        self.core = client.CoreV1Api()

    def policy(self) -> Policy:
        """The retries that every template gets."""
        try:
            found = self.core.read_namespaced_config_map(CONFIG_MAP, SYSTEM)
        except ApiException as error:
            if error.status == 403:
                raise Skipped(f"this account may not read ConfigMap {CONFIG_MAP}") from None
            raise
        return Policy.read(found.data)

    def has_trainer(self) -> bool:
        """Whether Kubeflow Trainer is installed."""
        groups = client.ApisApi().get_api_versions().groups
        return "trainer.kubeflow.org" in {group.name for group in groups}

    def of_training(self, run_id: str) -> list[Any]:
        """The pods of the training step, the newest last."""
        listed = self.core.list_namespaced_pod(
            self.namespace, label_selector=f"pipeline/runid={run_id}"
        )
        found = [p for p in listed.items if _TRAINING.search(_node_name(p))]
        return sorted(found, key=lambda p: p.metadata.creation_timestamp)

    def log(self, pod: Any) -> str:
        """What the step has said so far; empty where the pod is gone or not begun."""
        try:
            return str(
                self.core.read_namespaced_pod_log(
                    pod.metadata.name, self.namespace, container="main", tail_lines=500
                )
            )
        except ApiException as error:
            if error.status in (400, 404):
                return ""
            raise

    def saved(self, run_id: str) -> Any:
        """The running pod of the training once it has a checkpoint behind it, else None."""
        running = [p for p in self.of_training(run_id) if p.status.phase == "Running"]
        if not running:
            return None
        steps = [int(a or b) for a, b in _STEP.findall(self.log(running[-1]))]
        return running[-1] if steps and max(steps) > SAVE_INTERVAL else None

    def delete(self, pod: Any) -> str:
        """Take the pod away, as a node that is drained does."""
        self.core.delete_namespaced_pod(pod.metadata.name, self.namespace)
        return f"deleted {pod.metadata.name}"

    def kill(self, pod: Any) -> str:
        """End the pod's main process with -9, as a node in want of memory may.

        Raises:
            Skipped: no command can be run in the pod.
        """
        try:
            said = stream(
                self.core.connect_get_namespaced_pod_exec,
                pod.metadata.name,
                self.namespace,
                container="main",
                command=["python3", "-c", _KILL],
                stdout=True,
                stderr=True,
            )
        except ApiException as error:
            raise Skipped(f"no command can be run in pods here: {error.reason}") from None
        if "killed" not in said:
            raise Failed(f"no process of KFP's launcher in {pod.metadata.name}: {said}")
        return f"killed the launcher in {pod.metadata.name}"

    def resumed(self, run_id: str) -> int | None:
        """The step after which the newest attempt at the training went on; None: from 0."""
        pods = self.of_training(run_id)
        found = _RESUMED.search(self.log(pods[-1])) if pods else None
        return int(found[1]) if found else None


def _node_name(pod: Any) -> str:
    return str((pod.metadata.annotations or {}).get(_NODE_NAME, ""))
