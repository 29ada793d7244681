"""A sweep of the tiny teacher as a user runs it: students, a leaderboard, the best one exported."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from flagscale.artifacts import open_artifact

ROOT = Path(__file__).parents[3]
OUTSIDE = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "FLAGSCALE_"))}
NAMES = ("temperature=1.0", "temperature=4.0")
SMALLEST = (
    "training.train_iters=5",
    "training.lr_warmup_iters=1",
    "data.max_documents=60",
    "distillation.teacher_outputs=cached",
    "sweep.vary={student.num_layers: [2], distillation.temperature: [1.0, 4.0]}",
)


@dataclass
class Swept:
    """A sweep that ended."""

    output: str
    folder: Path
    parent: Any
    children: list[Any]

    def board(self) -> dict[str, Any]:
        board: dict[str, Any] = json.loads(
            (self.folder / "leaderboard" / "leaderboard.json").read_text()
        )
        return board


def sweep(runs: Path, teacher: Path) -> Swept:
    sets = [f"--set={text}" for text in (f"teacher.source={teacher}", *SMALLEST)]
    recipe = ROOT / "recipes" / "tiny-sweep.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", recipe, "--runs", runs, *sets],
        cwd=ROOT,
        env=OUTSIDE,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")
    found = client.search_runs(
        [client.get_experiment_by_name("flagscale-distillation").experiment_id]
    )
    parent = next(run for run in found if "mlflow.parentRunId" not in run.data.tags)
    children = [
        run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    ]
    return Swept(done.stdout, (runs / "latest").resolve(), parent, children)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "runs"


@pytest.fixture(scope="module")
def first(runs: Path, tiny_teacher: Path) -> Swept:
    return sweep(runs, tiny_teacher)


def test_each_step_says_its_variant_and_the_end_ranks_them(first: Swept) -> None:
    for line in (
        "[4/12] cache-teacher done in",  # once, for both
        f"[6/12] distil-student ({NAMES[0]}) done in",
        f"[8/12] convert-student ({NAMES[1]}) reused from cache",  # the same student
        f"[10/12] evaluate ({NAMES[1]}) done in",
        "[12/12] export-winner done in",
        "leaderboard/report.html",
        "exported_student",
    ):
        assert line in first.output
    tail = first.output[first.output.index("Held-out test split") :]
    winner = first.board()["rows"][0]["name"]
    assert f"The best by KL to teacher is exported: {winner}." in tail


def test_the_leaderboard_has_the_evaluations_figures(first: Swept) -> None:
    board = first.board()
    values = [row["figures"]["kl"]["value"] for row in board["rows"]]
    assert values == sorted(values)
    assert {row["name"] for row in board["rows"]} == set(NAMES)
    for row in board["rows"]:
        results = first.folder / f"evaluation-{row['number']}"
        metrics = json.loads((results / "metrics.json").read_text())
        assert row["parameters"] == metrics["parameters"]["distilled"]
        assert {"kl", "lm_loss", "top1_agreement", "accuracy"} <= set(row["figures"])
        for figure, interval in row["figures"].items():
            assert interval == pytest.approx(metrics["models"]["distilled"][figure], rel=1e-9)
        manifest = open_artifact(results.resolve(), "evaluation")
        temperature = manifest.facts["measured"]["recipe"]["distillation"]["temperature"]
        assert row["name"] == f"temperature={temperature}"


def test_the_winner_is_exported(first: Swept) -> None:
    winner = first.board()["rows"][0]
    export = open_artifact((first.folder / "exported_student").resolve(), "export")
    assert export.parents == winner["digests"]


def test_mlflow_has_the_variants_beside_the_steps(first: Swept) -> None:
    variants = {
        run.info.run_name: run for run in first.children if "flagscale.variant" in run.data.tags
    }
    assert set(variants) == set(NAMES)
    steps = [run.info.run_name for run in first.children if run.info.run_name not in NAMES]
    assert steps.count("distil-student") == steps.count("evaluate") == 2
    for row in first.board()["rows"]:
        run = variants[row["name"]]
        assert run.data.params == row["changes"]
        assert run.data.metrics["kl"] == row["figures"]["kl"]["value"]
    best = first.board()["rows"][0]
    assert first.parent.data.metrics["distilled/kl"] == best["figures"]["kl"]["value"]
    tagged = [name for name, run in variants.items() if "flagscale.winner" in run.data.tags]
    assert tagged == [best["name"]]


def test_a_second_time_everything_is_reused(first: Swept, runs: Path, tiny_teacher: Path) -> None:
    second = sweep(runs, tiny_teacher)
    assert second.parent.info.run_id != first.parent.info.run_id
    assert second.output.count("reused from cache, made") == 11
    assert {
        run.info.run_name for run in second.children if "flagscale.variant" in run.data.tags
    } == set(NAMES)
    assert second.board() == first.board()
    assert not list((runs / "checkpoints").glob("*"))
