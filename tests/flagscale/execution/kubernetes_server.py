"""Kubernetes' API over HTTP: what the kubernetes client and the kubeflow SDK ask of `trainer`.

A node's log is served while it is written.
"""

import json
import time
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from trainjob_nodes import NAMESPACE, ApiError

if TYPE_CHECKING:
    from trainer import Cluster

LOST = "lost"
TRAINER = "/apis/trainer.kubeflow.org/v1alpha1"
JOBS = f"{TRAINER}/namespaces/{NAMESPACE}/trainjobs"
VERSION = "/api/v1/namespaces/kubeflow-system/configmaps/kubeflow-trainer-public"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


class Handler(BaseHTTPRequestHandler):
    """Of one request."""

    protocol_version = "HTTP/1.1"
    cluster: "Cluster"

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
            trouble = self.cluster.troubles.pop(0) if self.cluster.troubles else None
            if isinstance(trouble, int) and trouble != 200:
                raise ApiError(trouble, "the API server is being upgraded")
            answer = self._route(verb, url.path, query, body)
            if trouble == LOST:
                self.close_connection = True
            else:
                self._send(200, answer)
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
            account = f"system:serviceaccount:{NAMESPACE}:pipeline-runner"
            raise ApiError(403, f'configmaps is forbidden: User "{account}" cannot get resource')
        if path.startswith(TRAINER) and not cluster.has_trainer:
            raise ApiError(404, "")
        if path == JOBS:
            if verb == "create":
                self._allow("create", "trainjobs")
                return cluster.create(body).object()
            self._allow("list", "trainjobs")
            return {"items": [job.object() for job in cluster.jobs.values()]}
        if path.startswith(JOBS):
            self._allow(verb, "trainjobs")
            if verb == "delete":
                cluster.delete(name)
                return {"kind": "Status", "status": "Success"}
            return cluster.find(name).object()
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
