"""A training that goes on: in the same MLflow run, or in one that names the first."""

import os
from contextlib import suppress
from itertools import count
from typing import Any

import mlflow
import pytest

from flagscale import tracking
from flagscale.errors import Interrupted
from flagscale.recipe import TrainingRecipe
from flagscale.steps.training.observers import observer
from flagscale.tracking import kfp_run
from flagscale.train.checkpoints import TrainingState

TRAINING = TrainingRecipe(train_iters=6, lr=0.1, eval_interval=2, lr_warmup_iters=0)
PARAMS = {"training": {"lr": 0.1, "betas": [0.9, 0.95]}}
_NUMBERS = count()


@pytest.fixture
def remote(server: str) -> mlflow.MlflowClient:
    os.environ |= {"MLFLOW_TRACKING_URI": server, "MLFLOW_EXPERIMENT_NAME": "resumed"}
    return mlflow.MlflowClient(server)


@pytest.fixture(params=["kfp run", "plugin", "plugin, another task run"])
def retry(
    request: pytest.FixtureRequest, remote: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Makes the environment that of another attempt in the same KFP run."""
    monkeypatch.setattr(kfp_run, "_SETTLE_SECONDS", 0.05)
    found = remote.get_experiment_by_name("resumed")
    experiment = found.experiment_id if found else remote.create_experiment("resumed")
    number = next(_NUMBERS)

    def attempt() -> None:
        os.environ["KFP_RUN_ID"] = f"resume-{number}"
        if request.param == "kfp run" or (
            request.param == "plugin" and "MLFLOW_RUN_ID" in os.environ
        ):
            return
        injected = remote.create_run(experiment).info.run_id
        os.environ |= {"MLFLOW_RUN_ID": injected, "MLFLOW_EXPERIMENT_ID": experiment}

    return attempt


def state(steps: int) -> TrainingState:
    """As restored from a checkpoint after so many steps."""
    records = [
        {"step": float(i + 1), "loss": 1 / (i + 1), "learning rate": 0.1, "grad norm": 1.0}
        for i in range(steps)
    ]
    return TrainingState(step=steps, training=records, validation=records[1::2])


def train(first: int, last: int, training: str, stop: bool = False) -> tracking.StepRun:
    """Restored after step `first`, trained up to `last`, then stopped or ended."""
    with suppress(Interrupted), tracking.step_run("distil-student", PARAMS, training) as run:
        with observer(run, state(first), TRAINING, 6) as told:
            for record in state(last).training[first:]:
                told.trained({**record, "tokens per second": 1.0})
        if stop:
            raise Interrupted
    return run


def curve(remote: mlflow.MlflowClient, run_id: str | None, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in remote.get_metric_history(str(run_id), name)]


def test_a_retry_goes_on_in_the_same_run(retry: Any, remote: mlflow.MlflowClient) -> None:
    name = f"one {next(_NUMBERS)}"
    retry()
    first = train(0, 4, name, stop=True)
    assert remote.get_run(str(first.run_id)).info.status == "KILLED"
    ended = remote.get_run(str(first.run_id)).data.params
    retry()
    with tracking.step_run("distil-student", PARAMS, name) as again:
        assert remote.get_run(str(first.run_id)).info.status == "RUNNING"
    assert again.run_id == first.run_id
    retry()
    second = train(3, 6, name)  # the checkpoint is older than the last figures
    assert second.run_id == first.run_id
    found = remote.get_run(str(first.run_id))
    assert found.info.status == "FINISHED"
    assert found.data.params == ended
    assert tracking.RESUMED_TAG not in found.data.tags
    whole = [(i, pytest.approx(1 / i)) for i in range(1, 7)]
    assert curve(remote, first.run_id, "train/loss") == whole
    assert curve(remote, first.run_id, "validation/loss") == [whole[1]]
    if "MLFLOW_RUN_ID" in os.environ:
        assert found.data.tags["mlflow.parentRunId"] == os.environ["MLFLOW_RUN_ID"]


def test_another_kfp_run_makes_its_own_run(retry: Any, remote: mlflow.MlflowClient) -> None:
    name = f"two {next(_NUMBERS)}"
    retry()
    first = train(0, 4, name, stop=True)
    os.environ.pop("MLFLOW_RUN_ID", None)
    os.environ["KFP_RUN_ID"] = f"other-{next(_NUMBERS)}"
    second = train(4, 6, name)
    assert second.run_id != first.run_id
    assert remote.get_run(str(first.run_id)).info.status == "KILLED"
    found = remote.get_run(str(second.run_id))
    assert found.data.tags[tracking.RESUMED_TAG] == first.run_id
    assert [step for step, _ in curve(remote, second.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]


def test_from_the_beginning_nothing_was_resumed(remote: mlflow.MlflowClient) -> None:
    train(0, 2, "three", stop=True)
    second = train(0, 2, "three")  # no checkpoint was saved, or it is gone
    assert tracking.RESUMED_TAG not in remote.get_run(str(second.run_id)).data.tags


def test_another_training_of_the_same_kfp_run_is_another_run(remote: mlflow.MlflowClient) -> None:
    os.environ["KFP_RUN_ID"] = "variants"
    assert train(0, 1, "four a").run_id != train(0, 1, "four b").run_id


def test_a_run_that_the_server_forgot_is_made_anew(retry: Any, remote: mlflow.MlflowClient) -> None:
    name = f"five {next(_NUMBERS)}"
    retry()
    first = train(0, 4, name, stop=True)
    remote.delete_run(str(first.run_id))
    retry()
    second = train(4, 6, name)
    assert second.run_id not in (None, first.run_id)
    assert remote.get_run(str(second.run_id)).info.status == "FINISHED"
    assert [step for step, _ in curve(remote, second.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
