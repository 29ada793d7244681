"""A KFP server of version 2 for tests, over real HTTP; see kfp_api.py and kfp_runs.py."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api as api

from tests.pipelines.cluster import kfp_api, kfp_runs
from tests.pipelines.cluster.kfp_api import CLIENT, Broken, Refused, Request, Text

_BY_KUBERNETES = "/api/v1/namespaces/kubeflow/services/ml-pipeline:http/proxy"
BROKEN = 200  # a failure that says nothing of itself
CUT_OFF = 0  # no answer: the connection ends


@dataclass
class KfpServer:
    """The server's state; tests set what it refuses and read what arrived."""

    token: str | None = None
    namespaces: tuple[str, ...] | None = None  # None: one user
    health: dict[str, Any] = field(default_factory=lambda: {"apiServerTagName": "2.17.0"})
    old_tag: str | None = None  # of version 1's healthz, where there is one
    failures: list[tuple[str, int]] = field(default_factory=list)  # part of `METHOD path`, status
    page: str | None = None  # HTML in place of every answer
    frames: list[list[dict[str, Any]]] = field(default_factory=list)  # of every run, in turn
    outcome: str = "SUCCEEDED"
    error: str | None = None
    requests: list[Request] = field(default_factory=list)
    pipelines: dict[str, api.V2beta1Pipeline] = field(default_factory=dict)
    versions: dict[str, api.V2beta1PipelineVersion] = field(default_factory=dict)
    experiments: dict[str, api.V2beta1Experiment] = field(default_factory=dict)
    runs: dict[str, api.V2beta1Run] = field(default_factory=dict)
    schedules: dict[str, api.V2beta1RecurringRun] = field(default_factory=dict)
    packages: dict[str, bytes] = field(default_factory=dict)  # by version
    looks: dict[str, int] = field(default_factory=dict)
    logs: dict[str, bytes] = field(default_factory=dict)  # that Argo has archived, by node
    log_artifact: str = "main-logs"
    pod_logs: dict[str, str] = field(default_factory=dict)  # of pods that are there, by name
    # Of its cluster, by namespace and name; None: the caller may see none.
    config_maps: dict[tuple[str, str], dict[str, str]] | None = None
    on_look: Callable[[int], None] = lambda number: None
    url: str = ""

    @property
    def written(self) -> list[str]:
        """What was asked to be created or deleted."""
        return [f"{r.method} {r.path}" for r in self.requests if r.method != "GET"]

    @property
    def run(self) -> api.V2beta1Run:
        """The only run."""
        (run,) = self.runs.values()
        return run

    @contextmanager
    def serving(self) -> Iterator[KfpServer]:
        """Serve on a free port."""
        handler = type("Handler", (_Handler,), {"kfp": self})
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        self.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()
            thread.join()

    def answer(self, request: Request) -> Any:
        """What the API answers; raises `Refused`."""
        self.requests.append(request)
        for failure in self.failures:
            if failure[0] in f"{request.method} {request.path}":
                self.failures.remove(failure)
                if failure[1] in (BROKEN, CUT_OFF):
                    raise Broken(failure[1])
                raise Refused(failure[1], f"injected {failure[1]}")
        if (
            self.token is not None
            and request.headers.get("authorization") != f"Bearer {self.token}"
        ):
            raise Refused(401, "Unauthenticated: Request header error: there is no user identity")
        for method, pattern, do in [*kfp_api.ROUTES, *kfp_runs.ROUTES]:
            found = re.fullmatch(pattern, request.path)
            if found and method == request.method:
                return do(self, request, *map(unquote, found.groups()))
        raise Refused(404, f"Not Found: {request.path}")

    def namespace(self, given: str | None, needed: bool = True) -> str:
        """The namespace of an object; with one user there are none."""
        if self.namespaces is None:
            return ""
        if not given:
            if needed:
                raise Refused(400, "Namespace cannot be empty in multi-user mode")
            return ""
        if given not in self.namespaces:
            raise Refused(403, f"PermissionDenied: user is not authorized in namespace {given}")
        return given


class _Handler(BaseHTTPRequestHandler):
    kfp: KfpServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def handle(self) -> None:
        """Answer, until who asks goes away, at whatever moment."""
        with suppress(ConnectionError):
            super().handle()

    def _handle(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        data = self.rfile.read(length)
        parts = urlsplit(self.path)
        request = Request(
            method=self.command,
            path="/" + parts.path.removeprefix(_BY_KUBERNETES).lstrip("/"),
            query={name: values[0] for name, values in parse_qs(parts.query).items()},
            headers={name.lower(): value for name, value in self.headers.items()},
            by_kubernetes=parts.path.startswith(_BY_KUBERNETES),
        )
        kind = request.headers.get("content-type", "")
        if kind.startswith("multipart/form-data"):
            message = message_from_bytes(b"content-type: " + kind.encode() + b"\r\n\r\n" + data)
            (part,) = message.get_payload()
            assert part.get_param("name", header="content-disposition") == "uploadfile"
            request.file = part.get_payload(decode=True)
        elif data:
            request.body = json.loads(data)
        if self.kfp.page is not None:
            return self._send(200, self.kfp.page.encode(), "text/html")
        try:
            answer = self.kfp.answer(request)
        except Refused as refused:
            # Endpoints that take or give files have errors of another shape.
            of_file = request.file or request.path.endswith(":read")
            names = ("error_message", "error_details") if of_file else ("error", "message")
            body = dict.fromkeys(names, str(refused)) | ({} if of_file else {"code": 1})
            return self._send(refused.status, json.dumps(body).encode())
        except Broken as broken:
            if broken.args == (CUT_OFF,):
                self.close_connection = True
                return None
            return self._send(200, b'{"run_id": "run-1", "sta')
        if isinstance(answer, Text):
            kind = "application/json" if answer.text.startswith("{") else "text/plain"
            return self._send(answer.status, answer.text.encode(), kind)
        body = CLIENT.sanitize_for_serialization(answer)
        return self._send(200, json.dumps(body if body is not None else {}).encode())

    do_GET = do_POST = do_DELETE = _handle  # noqa: N815 - http.server's names

    def _send(self, status: int, data: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
