"""Tracking against a real SQLite store and a real `mlflow server`."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from tracked_runs import RECIPE, child_of

from flagscale import tracking
from flagscale.errors import Interrupted, UserError


def test_without_a_server_a_step_tracks_nothing() -> None:
    with tracking.step_run("evaluate", {"a": 1}) as run:
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_text("x", "x.txt")
        run.set_tag("a", "b")
        assert run.log_model("/nowhere", "m") is None
    assert run.run_id is None


def test_files_are_kept_with_the_run_of_a_process_that_has_ended(
    runs: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    """Such as the log of a rank that was killed; without secrets, and whatever bytes it holds."""
    os.environ["MLFLOW_TRACKING_PASSWORD"] = "planted-7c1e"
    log = tmp_path / "stdout.log"
    log.write_bytes(b"step 1\nplanted-7c1e\n\xff killed\n")
    with tracking.pipeline_run(RECIPE, runs) as parent:
        os.environ.update(parent.environment)
        with pytest.raises(UserError), tracking.step_run("distil-student", {}) as step:
            raise UserError("a rank was killed")
        assert step.run_id
        tracking.keep_files(step.run_id, {"failed-ranks/rank-1.log": log})
    (found,) = client.list_artifacts(step.run_id, "failed-ranks")
    assert found.path == "failed-ranks/rank-1.log"
    kept = Path(client.download_artifacts(step.run_id, found.path, str(tmp_path))).read_text()
    assert kept == "step 1\n***\n\ufffd killed\n"
    assert client.get_run(step.run_id).info.status == "FAILED"
    tracking.keep_files("no such run", {"a": log})  # told, not raised


def test_parent_and_child(runs: Path, client: mlflow.MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file.txt").write_text("x")
    with tracking.pipeline_run(RECIPE, runs) as parent:
        os.environ.update(parent.environment)
        with tracking.step_run("distil-student", {"training": {"lr": 1e-3}, "pairs": [1]}) as step:
            for i in range(1500):
                step.log_metrics({"logits distillation loss (T=2)": 1.0 / (i + 1)}, step=i)
            step.log_artifact(tmp_path / "sub", "folder")
            step.log_artifact(tmp_path / "sub" / "file.txt")
        child = child_of(client, parent, "distil-student")
    assert child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent.run_id
    assert child.data.params == {"training.lr": "0.001", "pairs": "[1]"}
    curve = client.get_metric_history(child.info.run_id, "logits distillation loss _T_2_")
    assert [(m.step, m.value) for m in curve[:2]] == [(0, 1.0), (1, 0.5)]
    assert len(curve) == 1500
    stored = {f.path for f in client.list_artifacts(child.info.run_id)}
    assert stored == {"folder", "file.txt"}

    assert parent.run_id
    whole = client.get_run(parent.run_id)
    assert whole.info.status == "FINISHED"
    assert whole.data.params["student.num_layers"] == "2"
    assert whole.data.params["evaluation.prompts"].endswith("…")  # longer than MLflow takes
    text = client.download_artifacts(parent.run_id, "recipe.yaml", str(tmp_path))
    assert Path(text).read_text() == tracking.recipe_yaml(RECIPE)
    assert not os.environ.get("MLFLOW_RUN_ID") or mlflow.active_run() is None


def test_an_experiment_of_the_environment_is_told_not_to_be_the_runs(
    runs: Path, client: mlflow.MlflowClient, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.pipeline_run(RECIPE, runs):
        pass
    assert not caplog.records
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "mine"
    with tracking.pipeline_run(RECIPE, runs) as parent:
        pass
    (record,) = caplog.records
    assert record.getMessage() == (
        "MLFLOW_EXPERIMENT_NAME=mine is not followed: the run is tracked in the recipe's "
        "experiment, tracking.experiment=flagscale-distillation"
    )
    assert client.get_experiment(parent.experiment_id).name == "flagscale-distillation"


def test_a_manifest_comes_with_the_most_memory_a_rank_held(
    runs: Path, client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.json"
    held = {"host": [1_000_000_000, 3_000_000_000], "device": [5_000_000_000, 4_000_000_000]}
    manifest.write_text(json.dumps({"peak_memory": held}))
    with tracking.pipeline_run(RECIPE, runs) as parent:
        os.environ.update(parent.environment)
        with tracking.step_run("evaluate", {}) as step:
            step.log_manifest(manifest)
        child = child_of(client, parent, "evaluate")
    assert child.data.metrics == {"peak host memory GB": 3.0, "peak device memory GB": 5.0}
    assert [file.path for file in client.list_artifacts(child.info.run_id)] == ["manifest.json"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError(), "FAILED"), (Interrupted(), "KILLED"), (KeyboardInterrupt(), "KILLED")],
)
def test_the_status_tells_what_happened(
    runs: Path, client: mlflow.MlflowClient, error: BaseException, status: str
) -> None:
    found = []

    def work() -> None:
        with tracking.pipeline_run(RECIPE, runs) as parent:
            os.environ.update(parent.environment)
            with tracking.step_run("evaluate", {}) as step:
                found.extend([parent.run_id, step.run_id])
                raise error

    with pytest.raises(type(error)):
        work()
    assert [client.get_run(run_id).info.status for run_id in found] == [status, status]


def test_a_step_that_could_not_end_its_run_gets_the_parents_status(
    runs: Path, client: mlflow.MlflowClient
) -> None:
    def work() -> None:
        with tracking.pipeline_run(RECIPE, runs) as parent:
            child = client.create_run(
                parent.experiment_id, tags={tracking.PARENT_TAG: str(parent.run_id)}
            )
            children.append(child.info.run_id)
            raise RuntimeError

    children: list[str] = []
    with pytest.raises(RuntimeError):
        work()
    assert client.get_run(children[0]).info.status == "FAILED"


def test_runs_of_dead_processes_are_marked_at_the_next_run(
    runs: Path, client: mlflow.MlflowClient
) -> None:
    with tracking.pipeline_run(RECIPE, runs) as parent:
        experiment = parent.experiment_id
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    tags = {
        "dead": f"{here}:{ended.pid}:{time.time():.0f}",
        "reused number": f"{here}:{os.getpid()}:1",
        "elsewhere": f"not-{here}:{ended.pid}:{time.time():.0f}",
        "not ours": None,
    }
    made = {
        name: client.create_run(experiment, tags={tracking.PROCESS_TAG: tag} if tag else {})
        for name, tag in tags.items()
    }
    with tracking.pipeline_run(RECIPE, runs) as parent:
        assert client.get_run(str(parent.run_id)).info.status == "RUNNING"
    statuses = {name: client.get_run(run.info.run_id).info.status for name, run in made.items()}
    assert statuses == {
        "dead": "KILLED",
        "reused number": "KILLED",
        "elsewhere": "RUNNING",
        "not ours": "RUNNING",
    }


def test_kfps_own_run_is_a_parent_that_stays_open(runs: Path, client: mlflow.MlflowClient) -> None:
    with tracking.pipeline_run(RECIPE, runs) as other:
        experiment = other.experiment_id
    injected = client.create_run(experiment, run_name="kfp task").info.run_id
    os.environ |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{runs}/mlflow.db",
        "MLFLOW_RUN_ID": injected,
        "MLFLOW_EXPERIMENT_ID": experiment,
    }
    with tracking.step_run("evaluate", {"code_version": "1"}) as step:
        pass
    found = client.get_run(injected)
    assert (found.info.status, found.info.run_name) == ("RUNNING", "kfp task")
    assert found.data.params == {}
    assert client.get_run(str(step.run_id)).data.tags["mlflow.parentRunId"] == injected
    assert os.environ["MLFLOW_RUN_ID"] == injected


def test_a_reused_step_repeats_its_figures(runs: Path, client: mlflow.MlflowClient) -> None:
    with tracking.pipeline_run(RECIPE, runs) as parent:
        os.environ.update(parent.environment)
        with tracking.step_run("evaluate", {"a": 1}) as original:
            original.log_metrics({"kl": 0.25})
        parent.reuse("evaluate", original.run_id, {})
        parent.reuse("prepare-data", "0" * 32, {"tokens": 7})
        copy, lost = (child_of(client, parent, n) for n in ("evaluate", "prepare-data"))
    assert (copy.data.params, copy.data.metrics) == ({"a": "1"}, {"kl": 0.25})
    assert copy.data.tags[tracking.CACHED_TAG] == original.run_id
    assert lost.data.metrics == {"tokens": 7.0}
    assert copy.info.status == lost.info.status == "FINISHED"


def test_a_model_comes_back_from_the_registry(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with tracking.pipeline_run(RECIPE, runs) as run:
        uris = [run.log_model(tmp_path, "students") for _ in range(2)]
    assert uris == ["models:/students/1", "models:/students/2"]
    folder = mlflow.artifacts.download_artifacts(uris[1], tracking_uri=run.uri)
    assert (Path(folder) / "config.json").read_text() == "{}"


def test_a_real_server(server: str, tmp_path: Path) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = server
    (tmp_path / "report.html").write_text("<p>")
    recipe = RECIPE.model_copy(
        update={"tracking": RECIPE.tracking.model_copy(update={"experiment": "served"})}
    )
    with tracking.pipeline_run(recipe, tmp_path / "unused") as parent:
        os.environ.update(parent.environment)
        with tracking.step_run("evaluate", {}) as step:
            step.log_metrics({"kl": 0.5})
            step.log_artifact(tmp_path / "report.html")
            assert step.log_model(tmp_path, "served-student") == "models:/served-student/1"
    client = mlflow.MlflowClient(server)
    found = client.get_run(str(step.run_id))
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"kl": 0.5})
    assert [f.path for f in client.list_artifacts(str(step.run_id))] == ["report.html"]
    [output] = found.outputs.model_outputs
    assert {f.path for f in client.list_logged_model_artifacts(output.model_id)} == {"report.html"}
    assert not (tmp_path / "unused").exists()


def test_flatten() -> None:
    values = {"a": {"b": {"c": 1}, "d": None}, "e": (1, "x"), "f": True}
    assert tracking.flatten(values) == {"a.b.c": "1", "e": '[1, "x"]', "f": "True"}
