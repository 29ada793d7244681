"""Models in MLflow: kept checkpoints, the student, the registry; what is of which data."""

import json
import os
import sys
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import LoggedModel, Run

from flagscale import tracking
from flagscale.artifacts import new_artifact
from flagscale.errors import UserError
from flagscale.tracking import Model, Point, Split, aliases, models

SPLIT = Split("test", "sha256:" + "0123456789abcdef" * 4, {"source": "s3://data"}, {"documents": 7})
DIGEST = "sha256:" + "f" * 64


@pytest.fixture
def experiment(runs: Path, client: mlflow.MlflowClient, request: pytest.FixtureRequest) -> str:
    """One of the test's own; steps track there."""
    made = client.create_experiment(request.node.name, artifact_location=(runs / "files").as_uri())
    os.environ |= {
        "MLFLOW_TRACKING_URI": f"sqlite:///{runs}/mlflow.db",
        "MLFLOW_EXPERIMENT_ID": made,
    }
    return made


def logged(client: mlflow.MlflowClient, experiment: str) -> dict[str, LoggedModel]:
    return {model.name: model for model in client.search_logged_models([experiment])}


def checkpoint(step: int, loss: float) -> Model:
    points = [Point("validation/lm loss", loss, 1_700_000_000_000 + step, step)]
    name = f"step-{step:08d}"
    return Model(name, step, f"/there/{name}", points=points, split=SPLIT, is_checkpoint=True)


def finished(client: mlflow.MlflowClient, run: tracking.StepRun) -> Run:
    found = client.get_run(str(run.run_id))
    assert found.info.status == "FINISHED"
    assert "flagscale.missing" not in found.data.tags
    return found


def test_kept_checkpoints_are_models_with_their_figures(
    client: mlflow.MlflowClient, experiment: str
) -> None:
    one, two, three = (checkpoint(step, 3.0 / step) for step in (1, 2, 3))
    with tracking.step_run("distil-student", {}) as run:
        run.keep_checkpoints([one])
        run.keep_checkpoints([one, two])
        run.keep_checkpoints([two, three])
        run.log_weights(Model("distilled", 3, "the artifact", DIGEST, points=three.points))
    found = logged(client, experiment)
    assert sorted(found) == ["distilled", "step-00000002", "step-00000003"]
    kept = found["step-00000002"]
    assert (kept.status, kept.source_run_id) == ("READY", run.run_id)
    assert kept.params == {"step": "2"}
    assert kept.tags["flagscale.weights"] == "/there/step-00000002"
    [figure] = kept.metrics
    assert (figure.key, figure.value, figure.step) == ("validation/lm loss", 1.5, 2)
    assert (figure.dataset_name, figure.dataset_digest) == ("test", ("0123456789abcdef" * 4)[:36])
    assert found["distilled"].tags["flagscale.artifact"] == DIGEST
    run_id = finished(client, run).info.run_id
    curve = client.get_metric_history(run_id, "validation/lm loss")
    assert [point.step for point in curve] == [1, 2, 3]  # those of models are the run's, once


def test_figures_of_another_step_are_the_models(
    client: mlflow.MlflowClient, experiment: str
) -> None:
    with tracking.step_run("distil-student", {}) as run:
        run.log_weights(Model("distilled", 3, "the artifact", DIGEST))
    with tracking.step_run("evaluate", {}) as evaluation:
        points = evaluation.log_metrics({"distilled/kl": 0.25})
        evaluation.log_figures_of(DIGEST, points, SPLIT)
        evaluation.log_figures_of("sha256:unknown", points, SPLIT)
        evaluation.log_inputs([SPLIT], ["test"])
    [figure] = logged(client, experiment)["distilled"].metrics
    assert (figure.key, figure.value, figure.dataset_name) == ("distilled/kl", 0.25, "test")
    found = finished(client, evaluation)
    assert len(client.get_metric_history(found.info.run_id, "distilled/kl")) == 1
    [read] = found.inputs.dataset_inputs
    assert (read.dataset.name, read.dataset.digest) == ("test", figure.dataset_digest)
    assert json.loads(read.dataset.source) == {"source": "s3://data"}
    assert json.loads(read.dataset.profile) == {"documents": 7}
    assert [(tag.key, tag.value) for tag in read.tags] == [("mlflow.data.context", "test")]


@pytest.mark.parametrize("is_large", [False, True])
def test_an_export_is_the_candidate_and_its_files_come_back(
    client: mlflow.MlflowClient,
    experiment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_large: bool,
) -> None:
    if is_large:
        monkeypatch.setattr(models, "_MOST_BYTES_UPLOADED", 4000)
        monkeypatch.setattr(models, "_SMALL", 8000)
    name = "large.student" if is_large else "small.student"
    with new_artifact(tmp_path / "export", "export", {}) as staging:
        (staging.path / "model.safetensors").write_bytes(b"w" * 9000)
        (staging.path / "config.json").write_text("{}")
        card = f"---\nlicense: mit\n---\n\n# {name}\n\n---\n\nIt is. " + "x" * 6000 * is_large
        (staging.path / "README.md").write_text(card)
    assert staging.manifest
    with tracking.step_run("export-student", {}) as run:
        points = run.log_metrics({"distilled/kl": 0.5})
        model = Model(name, 9, "s3://there", staging.manifest.digest, {"dtype": "float32"})
        shown = Model(**{**vars(model), "points": points, "split": SPLIT})
        uri = run.log_model(tmp_path / "export", name, shown)
    assert uri == f"models:/{name}/1"
    version = client.get_model_version(name, "1")
    assert version.aliases == ["candidate"]
    assert version.tags["flagscale.weights"] == "s3://there"
    text = f"# {name}\n\n---\n\nIt is. "
    assert version.description == (f"{text:x<4999}…" if is_large else text)
    [found] = logged(client, experiment).values()
    assert version.source == f"models:/{found.model_id}"
    assert found.params == {"step": "9", "dtype": "float32"}
    assert [(f.key, f.value, f.dataset_name) for f in found.metrics] == [
        ("distilled/kl", 0.5, "test")
    ]
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@candidate"))
    files = {path.name for path in folder.iterdir()}
    if not is_large:
        assert files == {"model.safetensors", "config.json", "manifest.json", "README.md"}
        return
    assert files == {"weights.json", "config.json", "manifest.json", "README.md"}
    hashes = staging.manifest.files
    assert json.loads((folder / "weights.json").read_text()) == {
        "weights": "s3://there",
        "files": {"model.safetensors": {"bytes": 9000, "hash": hashes["model.safetensors"]}},
    }

    assert aliases.promote(uri) is None  # nobody was it before
    assert str(client.get_model_version_by_alias(name, "champion").version) == "1"


@pytest.mark.parametrize("uri", ["models:/a", "models:/a@candidate", "runs:/a/1", "models:/a/b"])
def test_an_alias_moves_to_a_version(uri: str) -> None:
    with pytest.raises(UserError, match="must read models:/<name>/<version>"):
        aliases.promote(uri)


def test_without_a_server_nothing_is_promoted() -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI names no server"):
        aliases.promote("models:/a/1")


def test_a_machine_tells_of_itself_while_it_works(
    client: mlflow.MlflowClient, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node under its name; another attempt goes on counting; other ranks are quiet."""
    module = sys.modules[tracking.system_metrics.__module__]  # the room has a function of its name
    monkeypatch.setattr(module, "_FIRST_SECONDS", 0.02)
    os.environ |= {"KFP_RUN_ID": "watched", "GROUP_WORLD_SIZE": "2"}

    def work(samples: int) -> tracking.StepRun:
        with tracking.step_run("distil-student", {}, "watched") as run:
            os.environ |= {"GROUP_RANK": "0", "LOCAL_RANK": "0"}
            with tracking.system_metrics(run):
                arrives(run, "system/node-0/cpu_utilization_percentage", samples)
            os.environ |= {"GROUP_RANK": "1"}
            with tracking.attached(run.run_id) as theirs, tracking.system_metrics(theirs):
                arrives(run, "system/node-1/cpu_utilization_percentage", samples)
            os.environ |= {"LOCAL_RANK": "1"}
            with tracking.system_metrics(run):
                pass
        return run

    def arrives(run: tracking.StepRun, name: str, samples: int) -> None:
        while len(client.get_metric_history(str(run.run_id), name)) < samples:
            time.sleep(0.02)

    work(2)
    run = work(4)
    found = finished(client, run)
    names = {name.removeprefix("system/node-0/") for name in found.data.metrics}
    assert {"cpu_utilization_percentage", "system_memory_usage_megabytes"} <= names
    assert {name for name in found.data.metrics if not name.startswith("system/node-")} == set()
    points = client.get_metric_history(str(run.run_id), "system/node-0/cpu_utilization_percentage")
    steps = [point.step for point in points]
    assert len(steps) == len(set(steps)) >= 4
