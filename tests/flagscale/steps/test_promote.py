"""The gate as a step: what it takes, what becomes of the alias, and when it is an error."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from flagscale import tracking
from flagscale.artifacts import Manifest, new_artifact, open_artifact, read_manifest, write_json
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT
from flagscale.evaluation.fidelity import FIGURES, Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.evaluation.tasks.scores import KIND, TaskScores, save_scores
from flagscale.execution.metrics_file import write_metrics
from flagscale.recipe import PromoteRecipe
from flagscale.steps.promote import promote
from flagscale.tracking import aliases

HOLDS, DOES_NOT = "distilled/kl <= 1.5 * teacher/lm_loss", "distilled/kl <= 0.1 at 90%"


@dataclass
class Student:
    """What the steps before leave of one."""

    folder: Path

    def gate(self, *conditions: str, tasks: Path | None = None) -> dict[str, float]:
        return promote(
            PromoteRecipe(conditions=conditions),
            self.folder / "evaluation",
            self.exported,
            self.folder / "export_metrics",
            self.folder / "promotion",
            tasks,
        )

    @property
    def exported(self) -> Manifest:
        return read_manifest(self.folder / "export")

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "promotion" / "gate.json").read_text())
        return found


def make(folder: Path, kl: float = 0.8) -> Student:
    """An evaluation, and an export that registers the student where MLflow is there."""
    tokens_d = np.arange(20, 40)
    shared = {f: tokens_d * 1.0 for f in FIGURES}
    models = {name: dict(shared) for name in ("teacher", "student", "distilled")}
    models["distilled"]["kl"] = tokens_d * kl
    fidelity = Fidelity(tuple(map(str, range(20))), tokens_d, models)
    with new_artifact(folder / "evaluation", "evaluation", {}) as staging:
        write_json(staging.path / METRICS, summarise(fidelity, 300, 0.95, 0))
        lines = [json.dumps(row) + "\n" for row in fidelity.rows()]
        (staging.path / PER_DOCUMENT).write_text("".join(lines))
    parents = {"evaluation": open_artifact(folder / "evaluation", "evaluation")}
    with new_artifact(folder / "export", "export", {}, parents) as staging:
        (staging.path / "config.json").write_text("{}")
    with tracking.step_run("export-student", {}) as run:
        run.log_model(folder / "export", "tiny")
    write_metrics(folder / "export_metrics", {})
    return Student(folder)


@pytest.fixture
def registry(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> mlflow.MlflowClient:
    uri = f"sqlite:///{empty_store}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "store"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    return client


def champion(client: mlflow.MlflowClient) -> aliases.Version:
    found = client.get_model_version_by_alias("tiny", "champion")
    return aliases.Version(found.name, str(found.version))


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step is a process of its own, whose first run its figures name."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("flagscale.tracking.step._Process.run", None)


def test_the_alias_goes_to_the_student_that_passes_and_to_no_other(
    registry: mlflow.MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(tmp_path / "first")
    assert first.gate(HOLDS) == {"promoted": 1, "conditions": 1, "hold": 1}
    assert champion(registry).number == "1"
    assert first.told["outcome"] == "Promoted: models:/tiny/1 is the champion"

    monkeypatch.setattr("flagscale.tracking.step._Process.run", None)
    second = make(tmp_path / "second")
    assert second.gate(HOLDS, DOES_NOT) == {"promoted": 0, "conditions": 2, "hold": 1}
    assert champion(registry).number == "1"
    tags = registry.get_model_version("tiny", "2").tags
    assert tags["flagscale.gate"] == f"does not hold: {DOES_NOT}"
    assert second.told["outcome"] == "Not promoted: 1 of 2 conditions do not hold"

    assert second.gate(HOLDS)["promoted"] == 1
    assert champion(registry).number == "2"
    assert registry.get_model_version("tiny", "2").tags["flagscale.gate"] == "all conditions hold"
    assert (
        second.told["outcome"] == "Promoted: models:/tiny/2 is the champion, after models:/tiny/1"
    )
    assert second.told["before"] == "models:/tiny/1"

    assert first.gate(HOLDS)["promoted"] == 1  # an earlier run's student, which the cache has
    assert champion(registry).number == "1"


def test_mlflow_shows_what_was_asked_and_found(
    registry: mlflow.MlflowClient, tmp_path: Path
) -> None:
    student = make(tmp_path / "one")
    student.gate(HOLDS, DOES_NOT)
    experiment = registry.get_experiment_by_name("e").experiment_id
    (run,) = registry.search_runs([experiment], "attributes.run_name = 'promote'")
    assert run.info.status == "FINISHED"
    assert run.data.metrics["promoted"] == 0
    assert json.loads(run.data.params["promote.conditions"]) == [HOLDS, DOES_NOT]
    files = {file.path for file in registry.list_artifacts(run.info.run_id)}
    assert {"gate.json", "gate.md", "manifest.json"} <= files
    manifest = open_artifact(student.folder / "promotion", "promotion")
    assert manifest.parents["export"] == student.exported.digest
    assert [one["holds"] for one in student.told["conditions"]] == [True, False]


def test_without_a_server_the_conditions_are_judged_all_the_same(tmp_path: Path) -> None:
    student = make(tmp_path / "one")
    assert student.gate(HOLDS)["promoted"] == 1
    assert "there is no MLflow whose champion it could be" in student.told["outcome"]
    assert student.gate(DOES_NOT)["promoted"] == 0


def test_a_student_that_passes_and_is_not_registered_is_an_error(
    registry: mlflow.MlflowClient, tmp_path: Path
) -> None:
    student = make(tmp_path / "one")
    write_metrics(student.folder / "export_metrics", {})
    told = json.loads((student.folder / "export_metrics").read_text())
    told["made in"]["mlflow_run_id"] = "f" * 32  # of another server
    write_json(student.folder / "export_metrics", told)
    with pytest.raises(UserError, match="has no version of this student for the alias champion"):
        student.gate(HOLDS)
    assert not (student.folder / "promotion").exists()
    assert student.gate(DOES_NOT)["promoted"] == 0  # nothing is to be moved


def write_tasks(folder: Path, student: Student, evaluation: Manifest | None = None) -> Path:
    parents = {
        "evaluation": evaluation or open_artifact(student.folder / "evaluation", "evaluation")
    }
    values = {"teacher": np.ones(20), "distilled": np.arange(20) % 10 > 0}
    reported = {"teacher": (1.0, 0.0), "distilled": (0.9, 0.07)}
    names = tuple(map(str, range(20)))
    with new_artifact(folder, KIND, {}, parents) as staging:
        save_scores(staging.path, [TaskScores("arc_easy", "acc", True, names, values, reported)])
    return folder


def test_tasks_are_figures_like_others(tmp_path: Path) -> None:
    student = make(tmp_path / "one")
    tasks = write_tasks(tmp_path / "tasks", student)
    keeps = "distilled/arc_easy >= {} * teacher/arc_easy at 90%"
    assert student.gate(HOLDS, keeps.format(0.7), tasks=tasks)["promoted"] == 1
    assert student.gate(HOLDS, keeps.format(0.89), tasks=tasks)["promoted"] == 0
    with pytest.raises(UserError, match="distilled/arc_easy: was not measured"):
        student.gate(keeps.format(0.7))


def test_what_belongs_to_another_student_is_refused(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "other", kl=0.1)
    mixed = Student(tmp_path / "mixed")
    mixed.folder.mkdir()
    (mixed.folder / "evaluation").symlink_to(other.folder / "evaluation")
    (mixed.folder / "export").symlink_to(one.folder / "export")
    with pytest.raises(UserError, match="export: was made from another evaluation"):
        mixed.gate(HOLDS)
    of_other = open_artifact(other.folder / "evaluation", "evaluation")
    with pytest.raises(UserError, match="tasks: was made from another evaluation"):
        one.gate(HOLDS, tasks=write_tasks(tmp_path / "tasks", one, of_other))


@pytest.mark.parametrize("uri", ["models:/tiny", "runs:/a/1", "models:/tiny/champion"])
def test_an_alias_goes_to_a_version_alone(registry: mlflow.MlflowClient, uri: str) -> None:
    with pytest.raises(UserError, match="must read models:/<name>/<version>"):
        aliases.promote(uri)


def test_an_alias_that_cannot_be_moved_is_an_error(registry: mlflow.MlflowClient) -> None:
    with pytest.raises(UserError, match="cannot move the alias champion to models:/none/1"):
        aliases.promote("models:/none/1")
