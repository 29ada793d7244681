"""The steps of one KFP run find one parent, which tells the truth: against a real server."""

import logging
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from flagscale import tracking
from flagscale.artifacts import Manifest
from flagscale.errors import Interrupted
from flagscale.tracking import delivery, kfp_run, step

EXPERIMENT = "on a cluster"


@pytest.fixture
def pod(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The environment of a step's pod where KFP's plugin is off; gives the KFP run's id."""
    monkeypatch.setattr(kfp_run, "_SETTLE_SECONDS", 0.05)
    monkeypatch.setattr(step._Process, "run", None)
    kfp_run_id = f"kfp-{request.node.name[-30:]}"
    os.environ |= {
        "MLFLOW_TRACKING_URI": server,
        "MLFLOW_EXPERIMENT_NAME": EXPERIMENT,
        "KFP_RUN_ID": kfp_run_id,
    }
    return kfp_run_id


@pytest.fixture
def remote(server: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(server)


def parents(remote: mlflow.MlflowClient, kfp_run_id: str) -> list[Run]:
    experiment = remote.get_experiment_by_name(EXPERIMENT)
    assert experiment
    query = f"tags.`{tracking.KFP_RUN_TAG}` = '{kfp_run_id}'"
    return list(remote.search_runs([experiment.experiment_id], query))


def parent(remote: mlflow.MlflowClient, kfp_run_id: str) -> Run:
    (found,) = parents(remote, kfp_run_id)
    return found


def do(name: str, error: BaseException | None = None, **params: int) -> str:
    """A step that ends at once; gives its run."""
    found = ""
    with suppress(ValueError, Interrupted), tracking.step_run(name, {name: params}) as run:
        assert run.run_id
        found = run.run_id
        if error is not None:
            raise error
    return found


def test_the_parent_is_named_and_follows_its_steps(pod: str, remote: mlflow.MlflowClient) -> None:
    os.environ["FLAGSCALE_RUN_NAME"] = "tiny"

    def status() -> str:
        return parent(remote, pod).info.status

    data = do("prepare-data")
    assert parent(remote, pod).info.run_name == "tiny"
    assert remote.get_run(data).data.tags["mlflow.parentRunId"] == parent(remote, pod).info.run_id
    assert status() == "RUNNING"
    do("distil-student", ValueError(), lr=1)
    assert status() == "FAILED"
    assert parent(remote, pod).info.end_time
    with tracking.step_run("evaluate", {}):  # another branch, which makes nothing good
        assert status() == "FAILED"
    assert status() == "FAILED"
    with suppress(Interrupted), tracking.step_run("distil-student", {"distil-student": {"lr": 1}}):
        assert status() == "RUNNING"
        raise Interrupted
    assert status() == "KILLED"
    do("distil-student", lr=1)
    assert status() == "RUNNING"
    do("distil-student", ValueError(), lr=2)  # another variant: not another attempt
    do("distil-student", lr=3)
    assert status() == "FAILED"
    do("distil-student", lr=2)
    assert status() == "RUNNING"
    # Killed with -9, so that it never said so.
    lost = remote.create_run(
        parent(remote, pod).info.experiment_id,
        run_name="export-student",
        tags={"mlflow.parentRunId": parent(remote, pod).info.run_id},
    ).info.run_id
    do("export-student", ValueError())
    assert status() == "FAILED"
    do("export-student")
    assert status() == "RUNNING"
    tracking.record_run([], {"kl": 0.5})
    assert status() == "FINISHED"
    assert parent(remote, pod).data.metrics == {"kl": 0.5}
    assert remote.get_run(lost).info.status == "KILLED"


def test_a_variant_makes_no_other_variants_failure_good(
    pod: str, remote: mlflow.MlflowClient
) -> None:
    def end(name: str, variant: int, error: bool) -> str:
        made = Manifest("student", {"lr": variant}, {}, {}, {}, None, {})
        training = f"checkpoints/{variant}" if name == "distil-student" else None
        with suppress(ValueError), tracking.step_run(name, {"same": 1}, training, {"a": made}):
            if error:
                raise ValueError
        return parent(remote, pod).info.status

    for name in ("distil-student", "evaluate"):
        assert end(name, 1, error=True) == "FAILED"
        assert end(name, 2, error=False) == "FAILED"
        assert end(name, 1, error=False) == "RUNNING"  # it was tried again
        assert end(name, 2, error=True) == "FAILED"
        assert end(name, 2, error=False) == "RUNNING"


def test_headline_figures_are_the_parents_too(pod: str, remote: mlflow.MlflowClient) -> None:
    with tracking.step_run("evaluate", {}) as run:
        run.log_headline({"student after/kl": 2.5})
        run.log_metrics({"only here": 1.0})
    assert run.run_id
    assert parent(remote, pod).data.metrics == {"student after/kl": 2.5}
    assert remote.get_run(run.run_id).data.metrics == {"student after/kl": 2.5, "only here": 1.0}
    assert parent(remote, pod).data.params == {}


def test_without_a_name_the_parent_has_the_kfp_runs_id(
    pod: str, remote: mlflow.MlflowClient
) -> None:
    do("prepare-data")
    assert parent(remote, pod).info.run_name == pod


RACER = """
import os, sys, time
from pathlib import Path
from flagscale import tracking
from flagscale.tracking.server import make_client
make_client(os.environ["MLFLOW_TRACKING_URI"])  # what takes long
name, folder = sys.argv[1], Path(sys.argv[2])
(folder / name).touch()
while not (folder / "go").exists():
    time.sleep(0.001)
with tracking.step_run(name, {}) as run:
    print(run.run_id)
"""


def test_steps_that_come_at_once_have_one_parent(
    pod: str, remote: mlflow.MlflowClient, tmp_path: Path, python: Callable[..., list[str]]
) -> None:
    for attempt in range(5):
        os.environ["KFP_RUN_ID"] = f"{pod}-{attempt}"
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if race(f"{pod}-{attempt}", remote, folder, python):
            return
    pytest.fail("they never came at once, which shows nothing")


def race(
    pod: str, remote: mlflow.MlflowClient, folder: Path, python: Callable[..., list[str]]
) -> bool:
    """Whether several made a parent, of which one is left."""
    names = [f"step-{i}" for i in range(3)]
    processes = [
        subprocess.Popen(python("-c", RACER, name, folder), stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    deadline = time.monotonic() + 300
    while not all((folder / name).exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (folder / "go").touch()
    children = [process.communicate(timeout=300)[0].split()[0] for process in processes]
    one = parent(remote, pod).info
    for child in children:
        found = remote.get_run(child)
        assert found.data.tags["mlflow.parentRunId"] == one.run_id
        assert found.info.status == "FINISHED"
    assert one.status == "RUNNING"
    query = f"tags.`{tracking.KFP_RUN_TAG}` = '{pod}'"
    return bool(remote.search_runs([one.experiment_id], query, run_view_type=2))


def test_a_parent_that_was_seen_too_late_is_joined_at_the_end(
    pod: str, remote: mlflow.MlflowClient
) -> None:
    with tracking.step_run("prepare-data", {}) as run:
        mine = parent(remote, pod).info
        other = remote.create_run(
            mine.experiment_id,
            start_time=mine.start_time - 5000,
            tags={tracking.KFP_RUN_TAG: pod},
        ).info.run_id
    assert run.run_id
    assert parent(remote, pod).info.run_id == other
    assert remote.get_run(run.run_id).data.tags["mlflow.parentRunId"] == other
    assert remote.get_run(mine.run_id).info.lifecycle_stage == "deleted"


def test_a_deleted_parent_is_made_anew(pod: str, remote: mlflow.MlflowClient) -> None:
    with tracking.step_run("prepare-data", {}):
        first = parent(remote, pod).info.run_id
        remote.delete_run(first)
    assert parents(remote, pod) == []
    do("prepare-teacher")
    assert parent(remote, pod).info.run_id != first


def test_outputs_that_could_not_be_put_in_place_fail_the_step(
    pod: str, remote: mlflow.MlflowClient
) -> None:
    child = do("prepare-data")
    tracking.step_failed("prepare-data", "FAILED")
    assert remote.get_run(child).info.status == "FAILED"
    assert parent(remote, pod).info.status == "FAILED"


def test_an_end_before_tracking_is_told(pod: str, remote: mlflow.MlflowClient) -> None:
    do("prepare-data")
    step._Process.run = None  # a new process
    tracking.step_failed("evaluate", "FAILED")
    one = parent(remote, pod).info
    assert one.status == "FAILED"
    failed = f"tags.`flagscale.of_kfp_run` = '{pod}' and attributes.status = 'FAILED'"
    (child,) = remote.search_runs([one.experiment_id], failed)
    assert child.info.run_name == "evaluate"
    assert child.data.tags["mlflow.parentRunId"] == one.run_id
    do("evaluate")
    assert parent(remote, pod).info.status == "RUNNING"


def test_an_early_end_after_nothing_but_cached_steps_is_told(
    pod: str, remote: mlflow.MlflowClient
) -> None:
    tracking.step_failed("distil-student", "FAILED")
    assert parent(remote, pod).info.status == "FAILED"


def test_the_run_of_a_rank_that_was_killed_is_ended_by_its_launcher(
    pod: str, remote: mlflow.MlflowClient, python: Callable[..., list[str]]
) -> None:
    code = "import os\nfrom flagscale import tracking\nwith tracking.step_run('distil', {}):\n"
    subprocess.run(python("-c", f"{code}    os.kill(os.getpid(), 9)"), timeout=300)
    assert parent(remote, pod).info.status == "RUNNING"
    tracking.step_failed("distil", "FAILED")
    tracking.step_failed("distil", "FAILED")  # as often as one likes
    one = parent(remote, pod).info
    assert one.status == "FAILED"
    children = remote.search_runs(
        [one.experiment_id], f"tags.`mlflow.parentRunId` = '{one.run_id}'"
    )
    assert [child.info.status for child in children] == ["FAILED"]


def test_a_step_that_is_refused_its_inputs_fails_the_pipelines_run(
    pod: str, remote: mlflow.MlflowClient, python: Callable[..., list[str]]
) -> None:
    do("prepare-data")
    code = f"""
from flagscale.errors import UserError
from flagscale.execution.step_process import step_process
with step_process("evaluate", experiment="{EXPERIMENT}"):
    raise UserError("no dataset here")
"""
    del os.environ["MLFLOW_EXPERIMENT_NAME"]  # the component's argument names it
    ended = subprocess.run(python("-c", code), capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[0].endswith("evaluate: no dataset here")
    assert parent(remote, pod).info.status == "FAILED"


@pytest.fixture
def away(pod: str) -> None:
    os.environ |= {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }


def test_a_server_that_is_away_stops_nothing(
    away: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery.Patience, "left", 0.3)
    caplog.set_level(logging.INFO)
    with tracking.step_run("evaluate", {}, training="a") as run:
        run.log_headline({"kl": 1.0})
        run.mark_resumed()
    step._Process.run = None
    tracking.step_failed("evaluate", "FAILED")
    assert run.run_id is None
    assert "evaluate is tracked once MLflow at http://127.0.0.1:9 serves" in caplog.text
    assert "never will be: 1 figures, the pipeline's run, tags, the status" in caplog.text
    assert "was not told that evaluate failed" in caplog.text


def test_with_kfps_plugin_its_run_is_left_alone(pod: str, remote: mlflow.MlflowClient) -> None:
    do("prepare-data")  # another pod, without the plugin
    experiment_id = parent(remote, pod).info.experiment_id
    injected = remote.create_run(experiment_id, run_name="kfp task").info.run_id
    os.environ |= {"MLFLOW_RUN_ID": injected, "MLFLOW_EXPERIMENT_ID": experiment_id}
    child = do("evaluate", ValueError())
    step._Process.run = None
    tracking.step_failed("evaluate", "FAILED")
    found = remote.get_run(injected)
    assert (found.info.status, found.info.run_name) == ("RUNNING", "kfp task")
    assert remote.get_run(child).data.tags["mlflow.parentRunId"] == injected
    assert parent(remote, pod).info.status == "RUNNING"
