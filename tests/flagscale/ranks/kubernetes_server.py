"""A cluster of one machine: Kubernetes' API over HTTP, and a Trainer that really starts the nodes.

It answers what the kubernetes client and the kubeflow SDK ask. A TrainJob is checked
(`trainjob_nodes`) and acted on: each node is a process of this machine, with the command, the
secrets and the PET_* variables that Trainer would give it. Its log is served while it is written;
deletion sends SIGTERM.
"""

import json
import os
import re
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from trainjob_nodes import (
    NAMESPACE,
    RUNTIME,
    ApiError,
    Job,
    Node,
    free_port,
    now,
    pending,
    refuse,
)

TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"
JOBS = f"{TRAINER}/namespaces/{NAMESPACE}/trainjobs"
VERSION = "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


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
        backoff_limit: how often Kubernetes starts failed pods anew.
        refusals: how many of the next requests for a TrainJob are answered with 503.
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
        self.backoff_limit = 2
        self.refusals = 0
        self.break_log_after: int | None = None
        self.log_hangs = False
        self.runtimes = {"torch-distributed": RUNTIME}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"cluster": self})
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
                raise ApiError(409, f'trainjobs "{name}" already exists')
            refuse(manifest)
            job = self.jobs[name] = Job(manifest)
            manifest["metadata"] |= {"namespace": NAMESPACE, "creationTimestamp": now()}
            if self.schedulable:
                port = free_port()
                job.nodes = [self._start(job, i, 0, port) for i in range(job.count)]
                job.port = port
            return job

    def delete(self, name: str) -> None:
        with self.lock:
            job = self.find(name)
            job.deleted = True
        threading.Thread(target=self._end, args=(job,), daemon=True).start()

    def find(self, name: str) -> Job:
        if name not in self.jobs:
            raise ApiError(404, f'trainjobs "{name}" not found')
        return self.jobs[name]

    def status(self, job: Job) -> dict[str, Any]:
        with self.lock:
            kind = job.finished()
            failed = [node for node in job.newest() if node.process.poll() not in (None, 0)]
            if failed and job.restarts >= self.backoff_limit:
                kind = "Failed"
        told = {"status": "True", "reason": "JobsCompleted" if kind == "Complete" else "JobsFailed"}
        told |= {"message": "as said", "lastTransitionTime": now()}
        conditions = [{"type": kind, **told}] if kind else []
        return {**job.manifest, "status": {"conditions": conditions}}

    def all_pods(self, selector: str) -> list[dict[str, Any]]:
        name = re.search(r"jobset-name=([\w-]+)", selector)
        assert name
        with self.lock:
            job = self.jobs.get(name[1])
            if job is None:
                return []
            if not self.schedulable:
                return [pending(job, index) for index in range(job.count)]
            return [node.pod(job) for node in job.nodes]

    def node(self, pod: str) -> Node:
        with self.lock:
            found = [n for job in self.jobs.values() for n in job.nodes if n.name == pod]
        if not found:
            raise ApiError(404, f'pods "{pod}" not found')
        return found[0]

    def _start(self, job: Job, index: int, incarnation: int, port: int) -> Node:
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
            "PET_MASTER_PORT": str(port),
        }
        return Node(job, index, incarnation, environment, self.folder)

    def _value(self, variable: dict[str, Any]) -> str | None:
        source = variable.get("valueFrom", {}).get("secretKeyRef")
        if source is None:
            return str(variable["value"])
        value = self.secrets.get(source["name"], {}).get(source["key"])
        if value is None and not source.get("optional"):
            raise ApiError(500, f"no key {source['key']} in secret {source['name']}")
        return value

    def _control(self) -> None:
        """Start failed pods anew, as a Job of Kubernetes does."""
        while self.open:
            with self.lock:
                for job in self.jobs.values():
                    for node in job.newest():
                        failed = node.process.poll() not in (None, 0)
                        if failed and not job.deleted and job.restarts < self.backoff_limit:
                            job.restarts += 1
                            again = self._start(job, node.index, node.incarnation + 1, job.port)
                            job.nodes.append(again)
            time.sleep(0.1)

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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("get")

    def do_POST(self) -> None:
        self._answer("create")

    def do_DELETE(self) -> None:
        self._answer("delete")

    def _answer(self, verb: str) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.cluster.requests.append((verb, url.path))
        try:
            if url.path.endswith("/log"):
                self._log(url.path.split("/")[-2], query)
                return
            self._send(200, self._route(verb, url.path, query, body))
        except ApiError as error:
            if error.message:
                status = {"kind": "Status", "code": error.code, "message": error.message}
                self._send(error.code, status)
            else:
                self._send_text(error.code, "404 page not found\n")

    def _route(self, verb: str, path: str, query: dict[str, str], body: Any) -> Any:
        cluster = self.cluster
        name = path.rsplit("/", 1)[-1]
        if path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            return self._review(body)
        if path == VERSION:
            return {"data": {"kubeflow_trainer_version": "2.3.0"}}
        if path.startswith(TRAINER) and not cluster.has_trainer:
            raise ApiError(404, "")
        if path == JOBS:
            if verb == "create":
                self._allow("create", "trainjobs")
                return cluster.status(cluster.create(body))
            self._allow("list", "trainjobs")
            return {"items": [cluster.status(job) for job in cluster.jobs.values()]}
        if path.startswith(JOBS):
            self._allow(verb, "trainjobs")
            if verb == "delete":
                cluster.delete(name)
                return {"kind": "Status", "status": "Success"}
            if cluster.refusals:
                cluster.refusals -= 1
                raise ApiError(503, "the API server is being upgraded")
            return cluster.status(cluster.find(name))
        if path.startswith(f"{TRAINER}/clustertrainingruntimes/"):
            if name not in cluster.runtimes:
                raise ApiError(404, f'clustertrainingruntimes "{name}" not found')
            return cluster.runtimes[name]
        if path == PODS:
            self._allow("list", "pods")
            return {"items": cluster.all_pods(query["labelSelector"])}
        if path.startswith(PODS):
            self._allow("get", "pods")
            return cluster.pods[name]
        raise ApiError(404, f"{path} not found")

    def _review(self, body: Any) -> Any:
        if not self.cluster.reviews:
            raise ApiError(403, "selfsubjectaccessreviews is forbidden")
        wanted = body["spec"]["resourceAttributes"]
        allowed = (wanted["verb"], wanted["resource"]) not in self.cluster.denied
        return {**body, "status": {"allowed": allowed}}

    def _allow(self, verb: str, resource: str) -> None:
        if (verb, resource) in self.cluster.denied:
            raise ApiError(403, f'{resource} is forbidden: cannot {verb} resource "{resource}"')

    def _log(self, pod: str, query: dict[str, str]) -> None:
        while self.cluster.log_hangs and self.cluster.open:
            time.sleep(0.1)
        node = self.cluster.node(pod)
        follow = query.get("follow") == "true"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        lines = 0
        with node.log.open("rb") as stream:
            while True:
                line = stream.readline()
                if line:
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                    lines += 1
                    if follow and lines == self.cluster.break_log_after:
                        self.cluster.break_log_after = None
                        self.close_connection = True
                        return  # no last chunk: the stream breaks
                elif not follow or node.process.poll() is not None:
                    break
                else:
                    time.sleep(0.05)
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, code: int, value: Any) -> None:
        self._send_text(code, json.dumps(value), "application/json")

    def _send_text(self, code: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
