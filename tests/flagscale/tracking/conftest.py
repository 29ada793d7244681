"""A real tracking server, and an environment without anybody's tracking."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

_OURS = ("MLFLOW_", "KFP_", "FLAGSCALE_")


@pytest.fixture(autouse=True)
def no_inherited_tracking(nothing_left_behind: None) -> None:
    for name in [name for name in os.environ if name.startswith(_OURS)]:
        del os.environ[name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def client(runs: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")


@pytest.fixture(scope="session")
def made_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to make, and nothing in it."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def empty_store(made_store: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(made_store, tmp_path / "mlflow.db"))


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(server_folder: Path) -> Iterator[str]:
    """A real tracking server, with all that it keeps in `server_folder`."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", uri.rsplit(":", 1)[1]]
    command += ["--backend-store-uri", f"sqlite:///{server_folder}/mlflow.db", "--workers", "1"]
    command += ["--artifacts-destination", str(server_folder / "artifacts")]
    quick = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, env=quick, stdout=null, stderr=null)
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except (urllib.error.URLError, OSError):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    yield uri
    process.terminate()
    process.wait(timeout=120)
