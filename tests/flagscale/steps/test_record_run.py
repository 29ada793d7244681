"""The last step of a run on a cluster, beside what `tests/flagscale/tracking` shows of trees."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from flagscale.artifacts import new_artifact, write_json
from flagscale.execution.metrics_file import read_metrics, write_metrics
from flagscale.steps.record_many import record_many
from flagscale.steps.record_run import record_run
from flagscale.tracking import CACHED_TAG, kfp_run
from flagscale.tracking import step as tracking_step
from tests.flagscale.tracking.kfp_plugin import below, pod, roots, tree


@pytest.fixture
def client(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[mlflow.MlflowClient]:
    """Of the store that the steps track to, in a pod of the KFP run `second`."""
    monkeypatch.setattr(kfp_run, "_SETTLE_SECONDS", 0.05)
    uri = f"sqlite:///{empty_store}"
    given = {"KFP_RUN_ID": "second", "FLAGSCALE_MLFLOW_TRACKING_URI": uri}
    with pod(given):
        yield mlflow.MlflowClient(uri)


def reported(path: Path, kfp_run_id: str | None, run_id: str | None = None) -> Path:
    """The file of a step that was run in a KFP run."""
    told = {"mlflow_run_id": run_id, "kfp_run_id": kfp_run_id}
    write_json(path, {"kl": 0.5, "made in": told})
    return path


def test_a_report_says_in_which_run_it_was_made(tmp_path: Path) -> None:
    with pod({"KFP_RUN_ID": "of this one"}):
        written = write_metrics(tmp_path / "new" / "m", {"kl": 1, "speed": float("inf")})
        found = read_metrics(tmp_path / "new" / "m", "evaluate")
    assert written == found.figures == {"kl": 1.0}
    assert found.step == "evaluate"
    assert (found.run_id, found.kfp_run_id) == (None, "ofthisone")


def test_work_that_was_never_tracked_is_shown_with_the_figures_of_its_file(
    client: mlflow.MlflowClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = {
        "prepare-data": [reported(tmp_path / "data", "first")],
        "prepare-teacher": [tmp_path / "not there"],  # KFP's cache names what is gone
        "evaluate": [reported(tmp_path / "evaluate", "second")],
    }
    record_run(metrics)
    (root,) = roots(client)
    assert root.data.metrics == {"kl": 0.5}
    data, teacher = below(client, root.info.run_id)
    assert (data.info.run_name, data.data.metrics) == ("prepare-data", {"kl": 0.5})
    assert data.data.tags[CACHED_TAG] == "unknown"
    assert data.data.tags["flagscale.cached_from_kfp_run"] == "first"
    assert (teacher.info.run_name, teacher.data.metrics) == ("prepare-teacher", {})
    assert "prepare-teacher: its figures are gone" in caplog.text


def test_tried_again_it_adds_nothing(client: mlflow.MlflowClient, tmp_path: Path) -> None:
    shared = [reported(tmp_path / "a", "first"), reported(tmp_path / "b", "first")]
    metrics = {"convert-student": shared, "evaluate": [reported(tmp_path / "c", "first")]}
    record_run(metrics)
    record_run(metrics)
    (root,) = roots(client)
    names = [run.info.run_name for run in below(client, root.info.run_id)]
    assert names == ["convert-student", "evaluate"]


def test_outside_of_kfp_and_without_a_server_it_does_nothing(tmp_path: Path) -> None:
    with pod({"KFP_RUN_ID": "second"}):
        record_run({"evaluate": [reported(tmp_path / "a", "first")]})
    with pod({"FLAGSCALE_MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}):
        record_run({"evaluate": [reported(tmp_path / "a", "first")]})


def test_a_server_that_is_away_fails_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking_step, "_PAUSES_ON_A_CLUSTER", ())
    given = {
        "KFP_RUN_ID": "second",
        "FLAGSCALE_MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    with pod(given):
        record_run({"evaluate": [reported(tmp_path / "a", "first")]})
    assert "the run is not recorded" in caplog.text


@pytest.mark.parametrize(("made_in", "variants"), [("first", 2), ("second", 0)])
def test_a_cached_leaderboards_variants_are_shown_in_this_run(
    client: mlflow.MlflowClient, tmp_path: Path, made_in: str, variants: int
) -> None:
    figures = {"kl": {"value": 0.25, "low": 0.2, "high": 0.3}}
    sizes = {"rank": 1, "parameters": 9, "tokens_per_second": 2.0}
    rows = [
        {"name": n, "changes": {"lr": n}, "digests": {"evaluation": n}, "figures": figures, **sizes}
        for n in ("warm", "cold")
    ]
    with new_artifact(tmp_path / "board", "leaderboard", {}) as staging:
        (staging.path / "leaderboard.json").write_text(json.dumps({"rows": rows}))
    record_many({}, reported(tmp_path / "m", made_in), tmp_path / "board")
    (root,) = roots(client)
    expected = "second FINISHED\n"
    if variants:
        expected += "  warm FINISHED\n  cold FINISHED\n  leaderboard FINISHED  from the cache\n"
    assert tree(client, root) == expected
    assert root.data.metrics == {"kl": 0.5}


def test_a_cached_searchs_candidates_are_shown_in_this_run(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    points = [{"step": n, "loss": {"value": 1 / n}, "forecasts": []} for n in (2, 4)]
    costs = {"tokens": 64.0, "rank_seconds": 1.0, "tokens_per_second": 64.0}
    rest = {"changes": {}, "student": None, "status": "dropped", "why": "", "made": {}, **costs}
    with new_artifact(tmp_path / "board", "search", {}) as staging:
        candidates = [{"name": "even", "points": points, **rest}]
        write_json(staging.path / "search.json", {"candidates": candidates})
    record_many({}, reported(tmp_path / "m", "first"), tmp_path / "board")
    (root,) = roots(client)
    even, _ = below(client, root.info.run_id)
    assert even.data.tags["flagscale.candidate_status"] == "dropped"
    assert even.data.metrics == {"held-out loss": 0.25, "rank": 1.0, **costs}
    expected = "second FINISHED\n  even FINISHED\n  rank-candidates FINISHED  from the cache\n"
    assert tree(client, root) == expected
