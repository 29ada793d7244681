"""A real tracking server, and an environment without anybody's tracking."""

import os
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow_server import served
from postgres_server import free_port

from flagscale.tracking import delivery, outbox, step

_OURS = ("MLFLOW_", "KFP_", "FLAGSCALE_")


@pytest.fixture(autouse=True)
def no_inherited_tracking(nothing_left_behind: None) -> None:
    for name in [name for name in os.environ if name.startswith(_OURS)]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little pauses; but what is told arrives before it is looked for, on a busy machine too."""
    monkeypatch.setattr(delivery, "_FIRST_PAUSE", 0.02)
    monkeypatch.setattr(delivery, "_LONGEST_PAUSE", 0.2)
    monkeypatch.setattr(delivery.Patience, "left", 300.0)
    monkeypatch.setattr(outbox, "_BATCH_SECONDS", 0.2)
    monkeypatch.setattr(outbox, "_GLANCE_SECONDS", 60.0)
    monkeypatch.setattr(step, "_START_SECONDS", 120.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def client(runs: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")


@pytest.fixture(scope="session")
def server_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="session")
def server(server_folder: Path) -> Iterator[str]:
    """A real tracking server, with all that it keeps in `server_folder`."""
    store = f"sqlite:///{server_folder}/mlflow.db"
    with served(store, server_folder, free_port()) as process:
        yield process.uri
