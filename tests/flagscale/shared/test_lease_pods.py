"""Leases of pods that Kubernetes can be asked for."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from flagscale.errors import UserError
from flagscale.shared import lease
from flagscale.shared.lease import leased
from flagscale.shared.store import ObjectStore


class Kubernetes(ThreadingHTTPServer):
    """Answers for one pod.

    Attributes:
        status: of the answer.
        phase: of the pod.
        uid: of the pod.
        asked: paths.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.phase, self.uid = 200, "Running", "uid-1"
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Kubernetes

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        status = self.server.status
        body = {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {"name": "training", "uid": self.server.uid},
            "spec": {"containers": [{"name": "main"}]},
            "status": {"phase": self.server.phase},
        }
        refusal = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status}
        content = json.dumps(body if status == 200 else refusal).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubernetes]:
    server = Kubernetes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, folder: Path, url: str, namespace: str = "team") -> None:
    context = {"cluster": "here", "user": "me", "namespace": namespace}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": context}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))


def become(monkeypatch: pytest.MonkeyPatch, run: str, name: str, uid: str) -> None:
    variables = {"KFP_RUN_ID": run, "KFP_POD_NAME": name, "KFP_POD_UID": uid}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)


@pytest.fixture
def left(bucket: str, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place whose lease a pod of another run has just renewed; this process is a pod, too."""
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    become(monkeypatch, "run-1", "training", "uid-1")
    dead = lease._Lease(f"{bucket}/checkpoints")
    dead.take(0.0)
    become(monkeypatch, "run-2", "training-of-another", "uid-2")
    return f"{bucket}/checkpoints"


def is_taken(place: str) -> bool:
    try:
        with leased(place, patience_seconds=0.0):
            return False
    except UserError as error:
        return "pod training (KFP run run-1) writes there" in str(error)


@pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
def test_a_pod_that_has_ended_holds_nothing(left: str, kubernetes: Kubernetes, phase: str) -> None:
    kubernetes.phase = phase
    assert not is_taken(left)
    assert kubernetes.asked == ["/api/v1/namespaces/team/pods/training"]


def test_a_pod_that_is_gone_holds_nothing(left: str, kubernetes: Kubernetes) -> None:
    kubernetes.status = 404
    assert not is_taken(left)


def test_nor_does_one_whose_name_another_has_now(left: str, kubernetes: Kubernetes) -> None:
    kubernetes.uid = "uid-3"
    assert not is_taken(left)


@pytest.mark.parametrize("phase", ["Pending", "Running", "Unknown"])
def test_a_pod_that_may_live_holds_it(left: str, kubernetes: Kubernetes, phase: str) -> None:
    kubernetes.phase = phase
    assert is_taken(left)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_where_kubernetes_does_not_say_the_time_decides(
    left: str, kubernetes: Kubernetes, status: int
) -> None:
    kubernetes.status = status
    assert is_taken(left)


def test_of_another_namespace_or_cluster_nothing_is_known(
    left: str, kubernetes: Kubernetes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket may be shared between clusters: no such pod here says nothing of there."""
    kubernetes.status = 404
    url = f"http://127.0.0.1:{kubernetes.server_port}"
    use(monkeypatch, tmp_path, url, namespace="another")
    assert is_taken(left)
    use(monkeypatch, tmp_path, url.replace("127.0.0.1", "localhost"))
    assert is_taken(left)
    monkeypatch.delenv("KUBECONFIG")
    assert is_taken(left)
    assert kubernetes.asked == []


def test_kubernetes_is_asked_now_and_then(
    left: str, kubernetes: Kubernetes, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def look(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 5:
            monkeypatch.setattr(lease, "_TELL_SECONDS", 0.0)  # as if they had passed
            kubernetes.phase = "Failed"
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(lease.time, "sleep", look)
    with leased(left):
        assert looks == 5
        assert len(kubernetes.asked) == 2
    assert ObjectStore(left.removesuffix("/checkpoints")).read("checkpoints.lease") is None
