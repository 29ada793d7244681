"""A search in containers, on teacher outputs, killed once in the middle of its second rung."""

import json
import re
import signal
from pathlib import Path

import mlflow
import pytest
from engine import Engine
from runs import TRAINED, Containers, Tracking

pytestmark = pytest.mark.timeout(1800)

END, RUNGS = 80, (4, 60)
EXPERIMENT = "a-search"
CANDIDATES = (
    "{vary: {student.layer_importance: [kl, block_influence]}},"
    " {name: by hand, vary: {student.keep_layers: [[0, 2]]}}"
)
CHANGES = (
    f"search.candidates=[{CANDIDATES}]",
    f"search.rungs=[{{steps: {RUNGS[0]}}}, {{steps: {RUNGS[1]}}}]",
    f"training.train_iters={END}",
    "distillation.teacher_outputs=cached",
    f"tracking.experiment={EXPERIMENT}",
)
CUT = f"{TRAINED}-4"  # three candidates in the first rung, two in the second: its first
STUDENT = "distilled_student"


@pytest.fixture(scope="module")
def searched(
    place: Path,
    engine: Engine,
    images: dict[str, str],
    sets: tuple[str, ...],
    tracked: dict[str, str],
) -> Containers:
    """Killed with -9, then let be."""
    files = tuple(text for text in sets if ".source=" in text)
    runs = Containers(
        place / "search",
        (*files, *CHANGES),
        tracked,
        images["cpu"],
        "recipes/tiny-search.yaml",
        engine=engine,
    )
    process = runs.start()
    runs.wait_for_checkpoint(process, CUT).send_signal(signal.SIGKILL)
    for again in (False, True):
        process = runs.start() if again else process
        runs.exits.append(runs.end(process))
        runs.left.append(len(runs.steps()))
    return runs


def test_it_goes_on_in_the_middle_of_the_rung(searched: Containers) -> None:
    killed, finished = searched.outputs
    assert searched.exits == [1, 0], finished
    assert f"{TRAINED} (rung 2, slot 1) failed: it ended without a word" in killed
    # Nothing that was done is done again: what all candidates share, and the first rung.
    for step in ("prepare-data", "prepare-teacher", "cache-teacher", "measure-layers"):
        assert f"{step} reused from cache" in finished, finished
    assert finished.count("rank-candidates reused from cache") == 1
    assert len(re.findall(r"\(rung 1, .*\) reused from cache", finished)) == 2 * 3
    assert "resuming after step" in finished
    assert searched.left == [0, 0]


def test_every_candidate_is_measured_at_the_end_of_its_rungs(searched: Containers) -> None:
    board = json.loads((searched.output("search-2") / "search.json").read_text())
    steps = [[point["step"] for point in one["points"]] for one in board["candidates"]]
    assert steps == [list(RUNGS), list(RUNGS), [RUNGS[0]]]
    assert [one["status"] for one in board["candidates"]] == ["goes on", "dropped", "dropped"]


def test_the_winners_curve_has_each_step_once(searched: Containers) -> None:
    lines = (searched.output(f"{STUDENT}-6") / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, END + 1))


def test_mlflow_has_the_killed_run_and_the_candidates(
    searched: Containers, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in searched.environment.items():
        if name.startswith("MLFLOW_"):
            monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(tracking.uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.status for run in parents] == ["FAILED", "FINISHED"]
    children = [
        run for run in found if run.data.tags.get("mlflow.parentRunId") == parents[-1].info.run_id
    ]
    assert {run.info.status for run in children} == {"FINISHED"}
    candidates = {run.data.tags.get("flagscale.candidate") for run in children} - {None}
    assert len(candidates) == 3
