"""Megatron-Core running, also on ranks; an object store (moto's, which speaks S3); a web server
with troubles."""

import logging
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.flagscale.fork_server import ForkServer
from tests.flagscale.web_server import WebServer


@pytest.fixture(scope="module")
def runtime() -> Iterator[None]:
    """Megatron-Core with its process groups, of this process alone."""
    from flagscale.megatron import platform

    with platform.runtime():
        yield


@pytest.fixture(scope="module", autouse=True)
def forked_ranks(fork_server: ForkServer) -> Iterator[None]:
    """Ranks of steps are forks; `execution/` has its own."""

    def rank_command(step: str, function: str, processes: int, *_: str) -> list[str]:
        return fork_server.command(processes, "-m", "flagscale.execution.launch", step, function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flagscale.execution.launch.rank_command", rank_command)
        yield


@pytest.fixture(scope="session")
def torchrun(fork_server: ForkServer) -> Callable[..., object]:
    """Runs a script in so many ranks: `torchrun(2, SCRIPT, "argument")`."""

    def run(processes: int, *what: object, **more: object) -> object:
        return subprocess.run(fork_server.command(processes, *what), check=True, **more)

    return run


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """URL of the server; what it decides before a write still holds when it writes, as in S3."""
    from moto.s3.responses import S3Response
    from moto.server import ThreadedMotoServer

    put, one_at_a_time = S3Response.put_object, threading.Lock()

    def put_object(self: S3Response) -> object:
        with one_at_a_time:
            return put(self)

    S3Response.put_object = put_object

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://...` of a new bucket; the environment knows server and credentials."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[WebServer]:
    """A web server of a new folder, which has troubles when asked to."""
    folder = tmp_path / "served"
    folder.mkdir()
    found = WebServer(folder)
    yield found
    found.close()


@pytest.fixture
def in_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are patient, but not for minutes."""
    monkeypatch.setenv("KFP_RUN_ID", "run-1")
    monkeypatch.setenv("FLAGSCALE_PATIENCE_SECONDS", "0.5")
