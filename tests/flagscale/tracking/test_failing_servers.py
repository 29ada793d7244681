"""Servers that are misconfigured, silent, away or unsteady, and what a run says is missing."""

import os
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from tracked_runs import RECIPE, child_of

from flagscale import tracking
from flagscale.errors import UserError
from flagscale.tracking import delivery, outbox


def test_a_deleted_experiment_is_named(runs: Path, client: mlflow.MlflowClient) -> None:
    client.delete_experiment(client.create_experiment("gone"))
    recipe = RECIPE.model_copy(
        update={"tracking": RECIPE.tracking.model_copy(update={"experiment": "gone"})}
    )
    with pytest.raises(UserError, match="experiment='gone' was deleted"):
        tracking.connect(recipe, runs)


@pytest.mark.parametrize("uri", ["nonsense://x", "sqlite:////proc/none/x.db"])
def test_a_misconfigured_server_is_named(uri: str, tmp_path: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = uri
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI={uri}: no usable"):
        tracking.connect(RECIPE, tmp_path)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never answers."""

    class Silence(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            over.wait(600)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    over = threading.Event()
    with Server(("127.0.0.1", 0), Silence) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        over.set()
        listener.shutdown()


def test_a_silent_server_is_refused_within_seconds(
    silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = silent_server
    monkeypatch.setitem(tracking.server._HTTP_LIMITS_AT_START, "MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    begin = time.monotonic()
    with pytest.raises(UserError, match="no usable tracking server"):
        tracking.connect(RECIPE, tmp_path)
    assert time.monotonic() - begin < 300  # the server would keep it waiting for longer


def test_a_server_that_stays_away_does_not_stop_a_step(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.Patience, "left", 0.3)
    (tmp_path / "report.html").write_text("<p>")
    os.environ |= {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    with tracking.step_run("evaluate", {}) as run:
        for i in range(3):
            run.log_metrics({"loss": 1.0}, step=i)
            run.log_artifact(tmp_path / "report.html")
            run.set_tag("a", "b")
        assert run.log_model(tmp_path, "m") is None
    assert run.run_id is None
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert "never will be: 3 figures, tags, tags, tags, " in errors[0]
    assert caplog.text.count("is asked again") == 1


def test_a_server_that_refuses_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = "nonsense://x"
    with tracking.step_run("evaluate", {}) as run:
        run.log_metrics({"loss": 1.0})
        run.log_text("x", "x.txt")
        run.set_tag("a", "b")
    assert run.run_id is None
    assert "nothing is tracked: " in caplog.text
    assert "ERROR" not in caplog.text


def test_what_is_missing_is_seen_on_the_run(
    runs: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    with tracking.pipeline_run(RECIPE, runs) as parent:
        os.environ.update(parent.environment)
        with tracking.step_run("evaluate", {}) as step:
            step.describe("Two **students**.")
            step.log_artifact(tmp_path / "report.html")  # there is none
            step.log_metrics({"x" * 250: 1.0, "y": 2.0})
            step.log_metrics({"": 3.0})  # MLflow takes no such name
        child = child_of(client, parent, "evaluate")
    assert child.info.status == "FINISHED"
    missing = child.data.tags["flagscale.missing"]
    assert missing.startswith("report.html: ")
    assert "; metrics: " in missing
    assert child.data.tags["mlflow.note.content"] == (
        f"Two **students**.\n\n**Missing here**, MLflow did not take it: {missing}"
    )
    assert child.data.metrics == {"x" * 250: 1.0, "y": 2.0}


def test_an_upload_is_tried_again(
    runs: Path, client: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that fails while the database serves: four times is no trouble, five times is."""
    (tmp_path / "report.html").write_text("<p>")
    monkeypatch.setattr(delivery, "_STRIKES", 5)
    sent, fail = mlflow.MlflowClient.log_artifact, [4]

    def unsteady(*args: object) -> None:
        fail[0] -= 1
        if fail[0] >= 0:
            raise OSError("busy")
        sent(*args)

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", unsteady)
    with tracking.pipeline_run(RECIPE, runs) as run:
        run.log_artifact(tmp_path / "report.html")
        fail[0] = 5
        run.log_artifact(tmp_path / "report.html", "again")
    found = client.get_run(str(run.run_id))
    stored = {file.path for file in client.list_artifacts(str(run.run_id))}
    assert stored == {"recipe.yaml", "report.html"}
    assert found.data.tags["flagscale.missing"] == "report.html: busy"


def test_figures_that_do_not_fit_are_spoken_of(
    runs: Path,
    client: mlflow.MlflowClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(outbox, "_MOST_POINTS", 3)
    monkeypatch.setattr(outbox, "_BATCH_SECONDS", 60.0)
    with tracking.pipeline_run(RECIPE, runs) as run:
        for i in range(5):
            run.log_metrics({"loss": 1.0}, step=i)
    assert caplog.text.count("MLflow was behind by 3 figures") == 1
    kept = client.get_metric_history(str(run.run_id), "loss")
    assert [point.step for point in kept] == [2, 3, 4]
