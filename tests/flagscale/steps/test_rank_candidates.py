"""The end of a rung: whose results are whose, what becomes of them, and what the next rung gets."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from flagscale.artifacts import new_artifact, open_artifact, write_json
from flagscale.errors import UserError
from flagscale.execution.absent import absent, is_empty, write_absent
from flagscale.recipe import StudentRecipe, TrainingRecipe
from flagscale.recipe.search import RankingRecipe
from flagscale.shared import Pointer, fetch, read_pointer
from flagscale.steps.pick_candidate import pick_candidate
from flagscale.steps.rank_candidates import rank_candidates
from flagscale.steps.search.rung import SAMPLE_LOSSES

KL = {1: 0.5, 2: 0.3, 3: 0.4, 4: 0.9}
CANDIDATES = [
    {"name": f"layers={n}", "student": {"num_layers": float(n)}}  # as KFP gives whole numbers
    for n in KL
]


def section(number: int) -> dict[str, Any]:
    return StudentRecipe(num_layers=number).model_dump(mode="json")


def student(folder: Path, number: int) -> Pointer:
    path = folder / f"student {number}"
    if not path.exists():
        with new_artifact(path, "student", {"student": section(number)}) as staging:
            (staging.path / "weights").write_text(str(number))
    return Pointer("student", open_artifact(path, "student").digest, str(path), 1)


def result(folder: Path, number: int, rung: int, kl: float) -> Path:
    path = folder / f"candidate {number} {rung}"
    hard = np.random.default_rng(1).gamma(9, 0.1, 20)
    own = np.random.default_rng(number).normal(0, 0.05, 20)
    losses = {str(n): (64 * (kl + hard[n] + own[n]), 64.0) for n in range(20)}
    training = TrainingRecipe(train_iters=20, lr=1e-3, global_batch_size=8).model_dump(mode="json")
    with new_artifact(path, "candidate", {"training": training}) as staging:
        write_json(
            staging.path / SAMPLE_LOSSES,
            {
                "logits distillation loss": losses,
                "lm loss": {k: (v[0] * 2, v[1]) for k, v in losses.items()},
                "heldout_cloze": {str(n): (float(n % 5 < number), 1.0) for n in range(20)},
            },
        )
        record = {"step": 1, "logits distillation loss": kl, "lm loss": 2 * kl}
        (staging.path / "training.jsonl").write_text(json.dumps(record) + "\n")
        (staging.path / "validation.jsonl").write_text(json.dumps(record | {"step": 0}) + "\n")
        staging.facts = {
            "steps": 4.0 * rung,
            "tokens": 100 * rung,
            "rank seconds": 3.0,
            "median tokens per second": 50.0,
            "checkpoints": f"training{number}",
            "student": asdict(student(folder, number)),
            "student recipe": section(number),
            "made": {"parameters": 1e6 * number},
        }
    return path


def ranking(rung: int, slots: int) -> RankingRecipe:
    return RankingRecipe(rung=rung, slots=slots, bootstrap_samples=200, confidence=0.95, margin=1.0)


def search(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "search.json").read_text())
    return found


@pytest.fixture
def first(tmp_path: Path) -> Path:
    results = [result(tmp_path, number, 1, kl) for number, kl in KL.items()]
    for number in KL:
        (tmp_path / "checkpoints" / f"training{number}").mkdir(parents=True)
    where, output = str(tmp_path / "checkpoints"), tmp_path / "first"
    decides = (ranking(1, 2), "distillation_loss")
    figures = rank_candidates(*decides, CANDIDATES, results[::-1], None, where, output)
    assert (figures["going_on"], figures["dropped"], figures["best"]) == (2, 2, 2)
    return tmp_path / "first"


def test_the_best_go_on_and_the_checkpoints_of_the_others_go(first: Path) -> None:
    board = search(first)
    assert [one["name"] for one in board["candidates"]] == [
        "layers=2", "layers=3", "layers=1", "layers=4",
    ]  # fmt: skip
    assert [one["status"] for one in board["candidates"]] == ["goes on"] * 2 + ["dropped"] * 2
    assert board["candidates"][0]["changes"] == {"student.num_layers": "2"}
    left = {path.name for path in (first.parent / "checkpoints").iterdir()}
    assert left == {"training2", "training3"}
    assert (first / "report.html").read_text().startswith("<!doctype html>")


def test_a_slot_gets_the_student_itself_and_one_too_many_nothing(
    first: Path, tmp_path: Path
) -> None:
    for slot, number in ((1, 2), (2, 3)):
        pick_candidate(slot, first, tmp_path / f"slot {slot}")
        pointer = read_pointer(tmp_path / f"slot {slot}")
        assert pointer is not None
        assert fetch(pointer, tmp_path / "x") == tmp_path / f"student {number}"
    pick_candidate(3, first, tmp_path / "slot 3")
    manifest = absent(tmp_path / "slot 3")
    assert manifest is not None
    assert is_empty(manifest)
    assert manifest.facts["error"] == "nothing to do: 2 candidate(s) go on, and this is slot 3"


def test_a_failure_comes_last_with_its_error_and_an_empty_slot_is_nobodys(
    first: Path, tmp_path: Path
) -> None:
    write_absent(tmp_path / "failed", "distil-student", "no room", {"student": section(2)})
    write_absent(tmp_path / "empty", "pick-candidate", "nothing to do", {}, empty=True)
    results = [tmp_path / "failed", result(tmp_path, 3, 2, 0.35), tmp_path / "empty"]
    output = tmp_path / "second"
    figures = rank_candidates(
        ranking(2, 1), "distillation_loss", CANDIDATES, results, first, str(tmp_path), output
    )
    assert (figures["best"], figures["failed"]) == (3, 1)
    board = search(output)
    assert [one["number"] for one in board["candidates"]] == [3, 1, 4, 2]
    last = board["candidates"][-1]
    assert (last["status"], last["why"]) == ("failed", "distil-student: no room")
    assert [point["rung"] for point in board["candidates"][0]["points"]] == [1, 2]
    assert "no room" in (output / "report.html").read_text()


def test_a_candidate_that_goes_on_and_is_not_there_is_told_as_lost(
    first: Path, tmp_path: Path
) -> None:
    """Whatever lost it: it must neither win by its losses of the rung before, nor vanish."""
    output = tmp_path / "second"
    results = [result(tmp_path, 3, 2, 0.35)]
    rank_candidates(
        ranking(2, 1), "distillation_loss", CANDIDATES, results, first, str(tmp_path), output
    )
    last = search(output)["candidates"][-1]
    assert (last["number"], last["status"]) == (2, "failed")
    assert last["why"] == "rung 2: no result of it was given"


def test_what_cannot_be_ranked_is_refused(first: Path, tmp_path: Path) -> None:
    other = result(tmp_path, 9, 1, 0.2)
    for number in (1, 2):
        write_absent(
            tmp_path / f"f{number}", "convert-student", "odd", {"student": section(number)}
        )
    one = result(tmp_path, 1, 3, 0.2)
    for results, metric, message in (
        ([other], "distillation_loss", "is of no candidate of this search"),
        (
            [tmp_path / "f1", tmp_path / "f2"],
            "distillation_loss",
            "no candidate is left:\n  layers=1",
        ),
        ([one], "speed", "has no 'speed' to rank by; it has"),
        ([one, one], "lm_loss", "are both of candidate 'layers=1'"),
    ):
        with pytest.raises(UserError, match=message):
            rank_candidates(
                ranking(1, 1), metric, CANDIDATES[:2], results, None, "", tmp_path / "out"
            )
        assert not (tmp_path / "out").exists()


def test_mlflow_has_a_child_for_each_candidate_with_its_losses(
    empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{empty_store}"
    client = mlflow.MlflowClient(uri)
    experiment = client.create_experiment("e", artifact_location=str(tmp_path / "store"))
    parent = client.create_run(experiment, run_name="r").info.run_id
    for name, value in (("TRACKING_URI", uri), ("EXPERIMENT_ID", experiment), ("RUN_ID", parent)):
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    results = [result(tmp_path, number, 1, KL[number]) for number in (1, 2)]
    rank_candidates(
        ranking(1, 2), "distillation_loss", CANDIDATES[:2], results, None, "", tmp_path / "1"
    )
    results = [result(tmp_path, number, 2, KL[number] / 2) for number in (1, 2)]
    rank_candidates(
        ranking(2, 1),
        "distillation_loss",
        CANDIDATES[:2],
        results,
        tmp_path / "1",
        "",
        tmp_path / "2",
    )
    runs = client.search_runs([experiment], 'tags."flagscale.candidate" != ""')
    assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {parent}
    assert len(runs) == 2
    for run in runs:
        one = next(
            c for c in search(tmp_path / "2")["candidates"] if c["name"] == run.info.run_name
        )
        curve = client.get_metric_history(run.info.run_id, "held-out loss")
        assert {(m.step, m.value) for m in curve} == {
            (point["step"], point["loss"]["value"]) for point in one["points"]
        }
        assert run.data.params == one["changes"]
        assert run.data.tags["flagscale.candidate_status"].startswith(one["status"])


def test_a_task_ranks_by_what_is_missing_of_its_score_and_is_not_forecast(tmp_path: Path) -> None:
    """Candidate 1 misses one question of five, candidate 4 four; by the losses it is the last."""
    results = [result(tmp_path, number, 1, kl) for number, kl in KL.items()]
    where, output = str(tmp_path / "checkpoints"), tmp_path / "by task"
    rank_candidates(ranking(1, 2), "heldout_cloze", CANDIDATES, results, None, where, output)
    board = search(output)
    assert [one["number"] for one in board["candidates"]] == [1, 2, 3, 4]
    assert [one["points"][0]["loss"]["value"] for one in board["candidates"]] == [
        0.2,
        0.4,
        0.6,
        0.8,
    ]
    assert all(one["points"][0]["forecasts"] == [] for one in board["candidates"])
    assert "1 - heldout_cloze" in (output / "report.html").read_text()
    with pytest.raises(UserError, match="has no 'arc_easy' to rank by; it has"):
        rank_candidates(ranking(1, 2), "arc_easy", CANDIDATES, results, None, where, tmp_path / "x")


def test_the_next_rung_and_the_end_are_forecast(first: Path) -> None:
    one = search(first)["candidates"][0]
    (made,) = one["points"][0]["forecasts"]  # the last rung: of the end alone
    assert (made["made_at"], made["step"]) == (4, 20)
    assert made["low"] < made["value"] < made["high"]
    assert "What was forecast, and what came" in (first / "report.html").read_text()
