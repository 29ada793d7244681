"""Runs of processes that were killed are ended by whoever comes next: on a real store."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from flagscale import tracking
from flagscale.errors import UserError
from flagscale.tracking import kfp_run
from tests.flagscale.tracking.kfp_plugin import Plugin, below, is_killed, pod, roots, tree


@pytest.fixture
def uri(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kfp_run, "_SETTLE_SECONDS", 0.05)
    return f"sqlite:///{empty_store}"


@pytest.fixture
def client(uri: str) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(uri)


def pod_of(uri: str, kfp_run_id: str) -> dict[str, str]:
    return {
        "KFP_RUN_ID": kfp_run_id,
        "FLAGSCALE_RUN_NAME": kfp_run_id,
        "FLAGSCALE_MLFLOW_TRACKING_URI": uri,
    }


def finishes(environment: dict[str, str], step: str, training: str | None = None) -> None:
    with pod(environment), tracking.step_run(step, {"lr": 1}, training):
        pass


@pytest.fixture
def killed(uri: str, python: Callable[..., list[str]]) -> str:
    """A KFP run whose training was killed: its id."""
    finishes(pod_of(uri, "first"), "prepare-data")
    is_killed(python, pod_of(uri, "first"))
    return "first"


def test_a_resubmission_ends_what_the_run_before_it_left(
    uri: str, client: mlflow.MlflowClient, killed: str
) -> None:
    (first,) = roots(client)
    open_ = "first RUNNING\n  prepare-data FINISHED\n  distil-student RUNNING\n"
    assert tree(client, first) == open_
    finishes(pod_of(uri, "other"), "distil-student", "/checkpoints/of another training")
    assert tree(client, client.get_run(first.info.run_id)) == open_
    finishes(pod_of(uri, "second"), "distil-student", "/checkpoints/1")
    first, _other, second = roots(client)
    ended = open_.replace("RUNNING", "KILLED")
    assert tree(client, first) == ended
    assert tree(client, second) == "second RUNNING\n  distil-student FINISHED\n"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("FAILED", "first FAILED\n  prepare-data FINISHED\n  distil-student KILLED\n"),
        ("CANCELED", "first KILLED\n  prepare-data FINISHED\n  distil-student KILLED\n"),
        ("SUCCEEDED", "first FINISHED\n  prepare-data FINISHED\n  distil-student FINISHED\n"),
        ("RUNNING", "first RUNNING\n  prepare-data FINISHED\n  distil-student RUNNING\n"),
    ],
)
def test_who_sees_kfps_end_of_a_run_ends_it_in_mlflow(
    uri: str, client: mlflow.MlflowClient, killed: str, state: str, expected: str
) -> None:
    finishes(pod_of(uri, "beside"), "prepare-data")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    ended = tracking.close_ended(killed, state)
    assert ended == (0 if state == "RUNNING" else 2)
    first, beside = roots(client)
    assert tree(client, first) == expected
    assert tree(client, beside) == "beside RUNNING\n  prepare-data FINISHED\n"
    assert tracking.close_ended(killed, state) == 0


def test_a_killed_attempt_at_what_then_succeeded_stays_killed(
    uri: str, client: mlflow.MlflowClient, python: Callable[..., list[str]]
) -> None:
    environment = pod_of(uri, "tried-again")
    lost = """
import os
from flagscale import tracking
with tracking.step_run("evaluate", {"lr": 1}):
    os.kill(os.getpid(), 9)
"""
    with pod(environment):
        subprocess.run(python("-c", lost), timeout=300, check=False)
    (root,) = roots(client)
    assert tree(client, root) == "tried-again RUNNING\n  evaluate RUNNING\n"
    finishes(environment, "evaluate")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    assert tracking.close_ended("tried-again", "SUCCEEDED") == 2
    (root,) = roots(client)
    assert tree(client, root) == "tried-again FINISHED\n  evaluate KILLED\n  evaluate FINISHED\n"


def test_a_run_below_an_ended_task_of_kfps_plugin_is_found(
    uri: str, client: mlflow.MlflowClient, python: Callable[..., list[str]]
) -> None:
    """The launcher ends its task's run; the API server looks only below those that are open."""
    plugin = Plugin("with-plugin", uri, "of KFP", injects=True)
    is_killed(python, plugin.starts("distil-student"))
    plugin.ends("distil-student", {}, "FAILED")
    plugin.finishes("FAILED")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    assert tracking.close_ended("with-plugin", "FAILED") == 1
    (root,) = roots(client)
    expected = "of KFP FAILED\n  distil-student FAILED\n    distil-student KILLED\n"
    assert tree(client, root) == expected


@pytest.mark.parametrize("injects", [True, False])
def test_the_step_itself_ends_its_killed_rank_below_kfps_plugin(
    uri: str, client: mlflow.MlflowClient, python: Callable[..., list[str]], injects: bool
) -> None:
    plugin = Plugin("ranks", uri, "of KFP", injects)
    environment = {**plugin.starts("distil-student"), "FLAGSCALE_MLFLOW_TRACKING_URI": uri}
    is_killed(python, environment)
    with pod(environment):
        tracking.step_failed("distil-student", "FAILED")
    (task,) = below(client, plugin.parent)
    (own,) = below(client, task.info.run_id)
    assert own.info.status == "FAILED"
    assert task.info.status == "RUNNING"  # which is KFP's to end


def test_without_a_server_nothing_is_done() -> None:
    assert tracking.close_ended("any", "FAILED") == 0


def test_a_server_that_is_away_is_named() -> None:
    os.environ |= {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    with pytest.raises(UserError, match="no usable tracking server there"):
        tracking.close_ended("any", "FAILED")
