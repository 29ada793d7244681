"""A cluster of one machine: its objects, and a Trainer that really starts the nodes.

A TrainJob is checked (`trainjob_nodes`) and acted on: each node is a process of this machine, with
the command, the secrets and the PET_* variables that Trainer would give it. Deletion sends SIGTERM.
`kubernetes_server` is its API.
"""

import os
import re
import signal
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml
from kubernetes_server import Handler
from trainjob_nodes import NAMESPACE, RUNTIME, ApiError, Job, Node, now, pending, refuse


class Cluster:
    """The server and what it holds.

    Attributes:
        jobs: TrainJobs by name.
        gone: those that were deleted.
        pods: other pods, e.g. a launcher's.
        secrets: name -> key -> value.
        denied: (verb, resource) that the account may not.
        has_trainer: whether Trainer is installed.
        schedulable: whether nodes are found for pods.
        backoff_limit: how often Kubernetes starts failed containers anew.
        troubles: of the next requests, one each: a status, or LOST, which does as asked and breaks
            the connection.
        break_log_after: lines after which a followed log breaks off, once.
        log_hangs: whether a log is never answered, as that of a pod whose node is lost.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.jobs: dict[str, Job] = {}
        self.gone: list[Job] = []
        self.pods: dict[str, dict[str, Any]] = {}
        self.secrets: dict[str, dict[str, str]] = {}
        self.denied: set[tuple[str, str]] = set()
        self.has_trainer = True
        self.reviews = True
        self.schedulable = True
        self.backoff_limit = 6
        self.troubles: list[int | str] = []
        self.break_log_after: int | None = None
        self.log_hangs = False
        self.runtimes = {"torch-distributed": RUNTIME}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (Handler,), {"cluster": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.open = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        threading.Thread(target=self._control, daemon=True).start()

    @property
    def kubeconfig(self) -> Path:
        path = self.folder / "kubeconfig"
        server = f"http://127.0.0.1:{self.server.server_port}"
        context = {"cluster": "c", "user": "u", "namespace": NAMESPACE}
        values = {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": server}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "c", "context": context}],
        }
        path.write_text(yaml.safe_dump(values))
        return path

    def close(self) -> None:
        self.open = False
        for job in [*self.jobs.values(), *self.gone]:
            for node in job.nodes:
                node.kill(signal.SIGKILL)
        self.server.shutdown()

    def create(self, manifest: dict[str, Any]) -> Job:
        with self.lock:
            name = manifest.get("metadata", {}).get("name", "")
            if name in self.jobs:
                raise ApiError(409, f'trainjobs.trainer.kubeflow.org "{name}" already exists')
            refuse(manifest)
            job = self.jobs[name] = Job(manifest)
            made = {"generation": 1, "uid": f"uid-of-{name}", "resourceVersion": "10041"}
            manifest["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": now(), **made}
            return job

    def delete(self, name: str) -> None:
        with self.lock:
            job = self.find(name)
            is_first, job.deleted = not job.deleted, True
        if is_first:
            threading.Thread(target=self._end, args=(job,), daemon=True).start()

    def find(self, name: str) -> Job:
        if name not in self.jobs:
            raise ApiError(404, f'trainjobs.trainer.kubeflow.org "{name}" not found')
        return self.jobs[name]

    def drain(self, pod: str) -> None:
        """Take a pod's node away, with time to save; its Job makes another pod."""
        with self.lock:
            node = self.node(pod)
            node.disrupted = True
            node.kill(signal.SIGTERM)

    def lose(self, pod: str) -> None:
        """A pod's node is gone, and so is its object."""
        with self.lock:
            node = self.node(pod)
            node.disrupted = True
            node.kill(signal.SIGKILL)

    def time_out(self, name: str) -> None:
        """`activeDeadlineSeconds` have passed: Trainer deletes the pods."""
        with self.lock:
            job = self.find(name)
            job.timed_out = True
            for node in job.pods():
                node.kill(signal.SIGTERM)

    def all_pods(self, selector: str) -> list[dict[str, Any]]:
        name = re.search(r"jobset-name=([\w-]+)", selector)
        assert name
        with self.lock:
            job = self.jobs.get(name[1])
            if job is None:
                return []
            if not self.schedulable:
                return [pending(job, index) for index in range(job.count)]
            return [node.pod() for node in job.pods()]

    def node(self, pod: str) -> Node:
        with self.lock:
            found = [n for job in self.jobs.values() for n in job.pods() if n.name == pod]
        if not found:
            raise ApiError(404, f'pods "{pod}" not found')
        return found[0]

    def _start(self, job: Job, index: int) -> None:
        trainer = job.manifest["spec"]["trainer"]
        kept = ("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        for variable in trainer.get("env", []):
            value = self._value(variable)
            if value is not None:
                environment[variable["name"]] = value
        environment |= {
            "PET_NNODES": str(job.count),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(index),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(job.port),
        }
        job.nodes.append(Node(job, index, environment, self.folder))

    def _value(self, variable: dict[str, Any]) -> str | None:
        source = variable.get("valueFrom", {}).get("secretKeyRef")
        if source is None:
            return str(variable["value"])
        value = self.secrets.get(source["name"], {}).get(source["key"])
        if value is None and not source.get("optional"):
            raise ApiError(500, f"no key {source['key']} in secret {source['name']}")
        return value

    def _control(self) -> None:
        """What the controllers do, which comes a little later than what they are asked for."""
        while self.open:
            time.sleep(0.1)
            with self.lock:
                for job in self.jobs.values():
                    self._reconcile(job)

    def _reconcile(self, job: Job) -> None:
        for node in job.pods():
            ended = node.process.poll() is not None
            if ended and (node.disrupted or job.timed_out):
                node.removed = True
            elif node.has_failed and not job.deleted and not job.has_failed:
                if job.restarts >= self.backoff_limit:
                    job.has_failed = True
                elif node.is_due():
                    job.restarts += 1
                    node.restart()
        there = {node.index for node in job.pods()}
        if self.schedulable and not (job.deleted or job.has_failed or job.timed_out):
            for index in set(range(job.count)) - there:
                self._start(job, index)

    def _end(self, job: Job) -> None:
        """SIGTERM, the grace period, SIGKILL; then the object goes."""
        patch = job.manifest["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
        pod = patch["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
        deadline = time.monotonic() + pod.get("terminationGracePeriodSeconds", 30)
        for node in job.nodes:
            node.kill(signal.SIGTERM)
        while time.monotonic() < deadline and any(n.process.poll() is None for n in job.nodes):
            time.sleep(0.1)
        for node in job.nodes:
            node.kill(signal.SIGKILL)
            node.process.wait()
        with self.lock:
            self.gone.append(self.jobs.pop(job.name))
