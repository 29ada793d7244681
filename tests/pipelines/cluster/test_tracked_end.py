"""`status` and `--wait` end in MLflow what a run that was killed on the cluster left open there."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import kfp_server_api as api
import mlflow
import pytest

from pipelines.__main__ import main
from tests.flagscale.tracking.kfp_plugin import is_killed, roots, tree
from tests.pipelines.cluster.kfp_server import KfpServer

STATUS = ["status", "run-1"]
WAIT = [*STATUS, "--wait", "--poll-seconds", "0.1"]
SUBMIT = ["submit", "recipes/tiny.yaml", "--platform", "cpu-only", *WAIT[2:]]


@pytest.fixture(autouse=True)
def no_inherited_tracking(monkeypatch: pytest.MonkeyPatch, nothing_left_behind: None) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def client(
    kfp: KfpServer, empty_store: Path, python: Callable[..., list[str]]
) -> mlflow.MlflowClient:
    """Of a store in which the training of KFP's run `run-1` still reads RUNNING."""
    kfp.runs["run-1"] = api.V2beta1Run(
        run_id="run-1", display_name="one", created_at=datetime.now(UTC)
    )
    uri = f"sqlite:///{empty_store}"
    is_killed(python, {"KFP_RUN_ID": "run-1", "FLAGSCALE_MLFLOW_TRACKING_URI": uri})
    return mlflow.MlflowClient(uri)


@pytest.mark.parametrize("command", [STATUS, WAIT])
def test_the_end_is_told_to_mlflow(
    kfp: KfpServer,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    kfp.outcome = "FAILED"
    (root,) = roots(client)
    open_ = "run-1 RUNNING\n  distil-student RUNNING\n"
    assert main(command) == 1
    assert tree(client, root) == open_
    said = capsys.readouterr().out
    assert said.count("MLFLOW_TRACKING_URI=... python -m pipelines status run-1 ends them") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    assert main(command) == 1
    assert "MLflow: 2 runs of it still read RUNNING, and were ended" in capsys.readouterr().out
    (root,) = roots(client)
    assert tree(client, root) == "run-1 FAILED\n  distil-student KILLED\n"
    assert main(command) == 1
    assert "MLflow" not in capsys.readouterr().out


def test_a_run_that_went_well_says_nothing_of_mlflow(
    kfp: KfpServer, client: mlflow.MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(WAIT) == 0
    assert "MLflow" not in capsys.readouterr().out


def test_a_server_that_is_away_changes_no_exit_code(
    kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(SUBMIT) == 0
    assert "MLflow was not told that the run has ended: MLFLOW_TRACKING_URI=http://127.0.0.1:9" in (
        capsys.readouterr().out
    )
