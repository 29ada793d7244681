"""The leaderboard step: finds out which evaluation is whose, and tells MLflow."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import mlflow
import numpy as np
import pytest

from flagscale.artifacts import Manifest, new_artifact, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.evaluation import METRICS, PER_DOCUMENT
from flagscale.evaluation.fidelity import FIGURES, Fidelity
from flagscale.evaluation.figures import summarise
from flagscale.execution.absent import write_absent
from flagscale.recipe import Recipe
from flagscale.recipe.sweep import Metric
from flagscale.steps.export_winner import export_winner
from flagscale.steps.leaderboard import rank_variants

SWEEP = Recipe.model_validate(
    {
        "name": "r",
        "teacher": {"source": "t"},
        "student": {"num_layers": 2},
        "training": {"train_iters": 5, "lr": 1e-3},
        "sweep": {"vary": {"distillation.temperature": [1.0, 2.0, 4.0]}},
    }
)
KL = {1.0: 2.0, 2.0: 1.5, 4.0: 2.5}


def as_kfp_gives_them(values: Any) -> Any:
    """Whole numbers arrive as floats."""
    if isinstance(values, dict):
        return {key: as_kfp_gives_them(value) for key, value in values.items()}
    whole = isinstance(values, int) and not isinstance(values, bool)
    return float(values) if whole else values


VARIANTS = [as_kfp_gives_them(variant.sections) for variant in SWEEP.variants]


def write_student(folder: Path, name: str) -> Manifest:
    with new_artifact(folder, "distilled-student", {"name": name}) as staging:
        (staging.path / "weights").write_text(name)
    assert staging.manifest
    return staging.manifest


def write_evaluation(folder: Path, recipe: Recipe, student: Manifest, kl: float) -> Path:
    tokens_d = np.arange(10, 22)
    generator = np.random.default_rng(1)

    def sums(value: float) -> dict[str, np.ndarray]:
        return {f: tokens_d * value * generator.gamma(50, 1 / 50, 12) for f in FIGURES}

    documents = tuple(str(d) for d in range(12))
    models = {"teacher": sums(0.5), "student": sums(9.0), "distilled": sums(kl)}
    fidelity = Fidelity(documents, tokens_d, models)
    metrics = summarise(fidelity, 200, 0.95, 0) | {"seq_length": 8}
    metrics["parameters"] = {"teacher": 9, "student": 3, "distilled": 3}
    sections = recipe.model_dump(mode="json", include={"student", "distillation", "training"})
    with new_artifact(folder, "evaluation", {}, {"distilled": student}) as staging:
        write_json(staging.path / METRICS, metrics)
        lines = [json.dumps(row) + "\n" for row in fidelity.rows()]
        (staging.path / PER_DOCUMENT).write_text("".join(lines))
        speed = {"median tokens per second": 100.0 / kl}
        staging.facts = {"measured": {"recipe": sections, "training": speed}}
    return folder


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    found = []
    for variant in SWEEP.variants:
        student = write_student(tmp_path / f"student {variant.name}", variant.name)
        kl = KL[variant.recipe.distillation.temperature]
        folder = tmp_path / f"evaluation {variant.name}"
        found.append(write_evaluation(folder, variant.recipe, student, kl))
    return found


def test_every_order_of_the_results_gives_the_same_artifact(
    results: list[Path], tmp_path: Path
) -> None:
    found = set()
    for number, order in enumerate(itertools.permutations(results)):
        output = tmp_path / f"leaderboard {number}"
        rank_variants(VARIANTS, "kl", order, output)
        found.add(open_artifact(output, "leaderboard").digest)
    assert len(found) == 1


def test_numbers_and_names_are_those_of_the_evaluations(
    results: list[Path], tmp_path: Path
) -> None:
    figures = rank_variants(VARIANTS, "kl", results, tmp_path / "board")
    board = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    names = ["temperature=2.0", "temperature=1.0", "temperature=4.0"]
    assert [row["name"] for row in board["rows"]] == names
    assert [row["changes"] for row in board["rows"]] == [
        {"distillation.temperature": t} for t in ("2.0", "1.0", "4.0")
    ]
    for row in board["rows"]:
        own = json.loads((results[row["number"] - 1] / METRICS).read_text())
        for figure, interval in own["models"]["distilled"].items():
            assert row["figures"][figure] == pytest.approx(interval, rel=1e-12)
    assert figures["distilled/kl"] == board["rows"][0]["figures"]["kl"]["value"]
    assert (figures["winner"], figures["variants"]) == (2, 3)
    assert board["rows"][0]["tokens_per_second"] == 100 / 1.5


def test_what_does_not_fit_together_is_refused(results: list[Path], tmp_path: Path) -> None:
    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(UserError, match=message):
            rank_variants(*arguments, tmp_path / "board")  # type: ignore[call-arg]
        assert not (tmp_path / "board").exists()

    refused("no evaluation of variant 'temperature=4.0'", VARIANTS, "kl", results[:2])
    refused("are both of variant 'temperature=1.0'", VARIANTS, "kl", [*results, results[0]])
    refused("of no variant of this sweep", VARIANTS[:2], "kl", results)
    twice = {**VARIANTS[0], "name": "again"}
    refused("'temperature=1.0' and 'again' are the same", [*VARIANTS, twice], "kl", results)
    refused("each needs a name of its own", [*VARIANTS, VARIANTS[0]], "kl", results)
    refused("must hold name, student, distil", [{**VARIANTS[0], "x": 1}], "kl", results)
    wrong = {**VARIANTS[0], "training": {"lr": "fast"}}
    refused(r"variant 'temperature=1.0': training: 2 error", [wrong, *VARIANTS[1:]], "kl", results)
    refused("metric='speed': must be one of", VARIANTS, "speed", results)


def test_mlflow_has_a_child_for_each_variant(
    results: list[Path], empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{empty_store}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "store"))
    parent = client.create_run(experiment, run_name="r").info.run_id
    for name, value in (("TRACKING_URI", uri), ("EXPERIMENT_ID", experiment), ("RUN_ID", parent)):
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    rank_variants(VARIANTS, "kl", results, tmp_path / "board")
    rank_variants(VARIANTS, "kl", results, tmp_path / "again")  # a retry: no second set
    runs = client.search_runs([experiment], 'tags."flagscale.variant" != ""')
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent}
    assert {run.info.run_name: run.data.params for run in runs} == {
        f"temperature={t}": {"distillation.temperature": t} for t in ("1.0", "2.0", "4.0")
    }
    assert len(runs) == 3
    winners = [run for run in runs if run.data.tags.get("flagscale.winner") == "true"]
    assert [run.info.run_name for run in winners] == ["temperature=2.0"]
    board = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    for run in runs:
        row = next(row for row in board["rows"] if row["name"] == run.info.run_name)
        assert run.info.status == "FINISHED"
        assert run.data.metrics["kl"] == row["figures"]["kl"]["value"]
        assert run.data.metrics["rank"] == row["rank"]


def test_a_winner_that_was_not_given_is_missed(results: list[Path], tmp_path: Path) -> None:
    rank_variants(VARIANTS, "kl", results, tmp_path / "board")
    others = [tmp_path / "student temperature=1.0", tmp_path / "student temperature=4.0"]
    with pytest.raises(UserError, match="none of 2 distilled-student artifacts is the leaderboard"):
        export_winner(
            SWEEP.export, others, results, tmp_path / "board", tmp_path / "out", tmp_path / "its"
        )


def test_variants_that_failed_come_last_with_their_errors(
    results: list[Path], tmp_path: Path
) -> None:
    sections = SWEEP.variants[1].recipe.model_dump(mode="json")
    own = {name: sections[name] for name in ("student", "distillation", "training")}
    write_absent(tmp_path / "failed", "distil-student", "<no room>", {**own, "data": {}})
    given = [results[0], tmp_path / "failed", results[2]]
    figures = rank_variants(VARIANTS, "kl", given, tmp_path / "board")
    board = json.loads((tmp_path / "board" / "leaderboard.json").read_text())
    assert [row["name"] for row in board["rows"]] == ["temperature=1.0", "temperature=4.0"]
    assert (figures["winner"], figures["variants"], figures["failed"]) == (1, 2, 1)
    assert board["failed"] == [
        {
            "number": 2,
            "name": "temperature=2.0",
            "changes": {"distillation.temperature": "2.0"},
            "error": "distil-student: <no room>",
        }
    ]
    page = (tmp_path / "board" / "report.html").read_text()
    assert "distil-student: &lt;no room&gt;" in page
    lines = (tmp_path / "board" / "leaderboard.csv").read_text().splitlines()
    assert lines[-1].startswith(",temperature=2.0,2.0,")
    assert {line.count(",") for line in lines} == {lines[0].count(",")}
    # The winner's students are found among those that are not there.
    students = [tmp_path / "failed", tmp_path / "student temperature=4.0"]
    with pytest.raises(UserError, match="none of 2 distilled-student artifacts is the leaderboard"):
        export_winner(
            SWEEP.export, students, given, tmp_path / "board", tmp_path / "out", tmp_path / "its"
        )


def test_a_sweep_of_failures_is_told_with_all_of_them(tmp_path: Path) -> None:
    given = []
    for variant in SWEEP.variants:
        sections = variant.recipe.model_dump(mode="json")
        own = {name: sections[name] for name in ("student", "distillation", "training")}
        given.append(tmp_path / variant.name)
        write_absent(given[-1], "convert-student", f"of {variant.name}", own)
    with pytest.raises(UserError) as caught:
        rank_variants(VARIANTS, "kl", given, tmp_path / "board")
    for variant in SWEEP.variants:
        assert f"{variant.name}: convert-student: of {variant.name}" in str(caught.value)


def test_a_recipe_may_name_every_figure_that_is_paired() -> None:
    assert set(get_args(Metric)) == set(FIGURES)
