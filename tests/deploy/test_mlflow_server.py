"""The MLflow server of deploy/, with the manifest's own command and variables.

Real PostgreSQL with passwords, a real S3 API (moto's server), real clients. What differs from the
cluster: addresses, and that no container runs (tests/containers has those).
"""

import contextlib
import glob
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from manifests import DEPLOY, Manifest, build, containers, documents, environment, of_kind, pod
from postgres_server import free_port, needs_postgres, postgres

pytestmark = needs_postgres


@pytest.fixture(scope="module")
def password() -> str:
    return secrets.token_urlsafe(16) + "/@:%"  # what a URL could not hold


@pytest.fixture(scope="module")
def database(password: str) -> Iterator[int]:
    """A PostgreSQL server's port; its user `mlflow` has the password."""
    with postgres(password) as port:
        yield port


@pytest.fixture(scope="module")
def bucket_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def built() -> list[Manifest]:
    return build("base")


@pytest.fixture(scope="module")
def server(
    built: list[Manifest],
    database: int,
    bucket_server: str,
    password: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """The server's URL; the pod's containers run one after the other, as processes."""
    known = {
        "mlflow-postgres": {"password": password},
        "object-store": {
            "access-key": "planted-access",
            "secret-key": "planted-secret",
            "endpoint": bucket_server,
        },
    }
    [config] = of_kind(built, "ConfigMap").values()
    folder = tmp_path_factory.mktemp("mlflow-pod")
    [main] = containers(of_kind(built, "Deployment")["mlflow"])
    [patch] = documents(DEPLOY / "components/object-store/create-bucket.yaml")
    [first] = pod(patch)["spec"]["initContainers"]

    def variables(container: Manifest) -> dict[str, str]:
        found = environment(container, known, config["data"])
        here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)}
        return {**found, **here, "TMPDIR": str(folder)}

    for _ in range(2):  # the bucket is there when the pod starts again
        command = [*first["command"], *first["args"]]
        subprocess.run(command, env=variables(first), cwd=folder, check=True, timeout=300)

    port = free_port()
    changes = {
        "--host=0.0.0.0": "--host=127.0.0.1",
        "--port=5000": f"--port={port}",
        "@mlflow-postgres:5432/": f"@127.0.0.1:{database}/",
    }
    command = "\n".join([*main["command"], *main["args"]])
    for there, here in changes.items():
        assert there in command
        command = command.replace(there, here)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command.split("\n"), env=variables(main), cwd=folder, stdout=log, stderr=log
        )
        try:
            _wait_for(process, f"http://127.0.0.1:{port}{_probe(main)}", folder / "log")
            assert password not in (folder / "log").read_text()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(300)


def _probe(container: Manifest) -> str:
    path: str = container["startupProbe"]["httpGet"]["path"]
    return path


def _wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(1500):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            assert answer.status == 200
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text())


def test_a_run_goes_to_the_database_and_its_artifact_through_the_server_to_the_bucket(
    server: str, bucket_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3
    from mlflow import MlflowClient

    # A step knows the server alone: without keys it could not write to the bucket itself.
    for name in [n for n in os.environ if n.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    client = MlflowClient(tracking_uri=server)
    experiment = client.create_experiment("distillation")
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "kl", 0.25, step=3)
    path = tmp_path / "report.html"
    path.write_text("<p>fine</p>")
    client.log_artifact(run.info.run_id, str(path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    back = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path / ""))
    assert Path(back).read_text() == "<p>fine</p>"
    [point] = client.get_metric_history(run.info.run_id, "kl")
    assert (point.value, point.step) == (0.25, 3)
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    listed = boto3.client("s3", endpoint_url=bucket_server, **keys).list_objects_v2(Bucket="mlflow")
    [stored] = [found["Key"] for found in listed["Contents"]]
    assert stored.startswith("artifacts/")
    assert stored.endswith("/report.html")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("mlflow:5000", 200),
        ("mlflow.kubeflow.svc.cluster.local:5000", 200),
        ("localhost:8443", 200),  # any local port of a port-forward
        ("mlflow.attacker.example:5000", 403),
    ],
)
def test_the_server_answers_to_its_own_names_only(server: str, host: str, status: int) -> None:
    url = f"{server}/api/2.0/mlflow/experiments/search"
    request = urllib.request.Request(
        url,
        json.dumps({"max_results": 1}).encode(),
        {"Host": host, "Content-Type": "application/json"},
    )
    assert _status(request) == status


def _status(request: urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_password_stands_in_no_command_line(server: str, password: str) -> None:
    lines = [
        Path(path).read_bytes().decode(errors="replace")
        for path in glob.glob("/proc/[0-9]*/cmdline")
        if os.access(path, os.R_OK)
    ]
    port = urllib.parse.urlsplit(server).port
    assert any(f"--port={port}" in line for line in lines)
    assert not any(password in line for line in lines)
