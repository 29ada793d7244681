"""What KFP does of its own in a run: pods, retries, and its MLflow plugin where that is on.

The plugin acts as the backend's does: the API server makes a parent run, the driver a run below it
for each task, cached ones included, which the launcher ends with the task's figures; at the KFP
run's end the API server ends what is open, but does not look below what has ended already.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlflow
import pytest
from mlflow.entities import Metric, Run

from flagscale.tracking import step

_TOLD = ("MLFLOW_", "KFP_", "FLAGSCALE_")
_KILLED = """
import os
from flagscale import tracking
with tracking.step_run("distil-student", {"lr": 1}, "/checkpoints/1"):
    os.kill(os.getpid(), 9)
"""


@contextmanager
def pod(environment: dict[str, str]) -> Iterator[None]:
    """A new process in a pod with these variables and no others that tell of tracking."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(_TOLD)]:
            patch.delenv(name)
        patch.setattr(step._Process, "run", None)
        patch.setattr(step._Process, "run_of_ranks", None)
        for name, value in environment.items():
            patch.setenv(name, value)
        before = dict(os.environ)
        yield
        for name in set(os.environ) - set(before):
            del os.environ[name]


def is_killed(python: Callable[..., list[str]], environment: dict[str, str]) -> None:
    """A training in a pod, whose process SIGKILL ends; `python` is the fixture."""
    with pod(environment):
        ended = subprocess.run(python("-c", _KILLED), timeout=300, check=False)
    assert ended.returncode == -9


class NoPlugin:
    """KFP without the plugin: its pods know the KFP run's id, and nothing is done in MLflow."""

    def __init__(self, kfp_run_id: str) -> None:
        self._kfp_run_id = kfp_run_id

    def starts(self, task: str) -> dict[str, str]:
        """A task that is run: the variables of its pod."""
        return {"KFP_RUN_ID": self._kfp_run_id}

    def ends(self, task: str, figures: dict[str, float], status: str = "FINISHED") -> None:
        """The task's end, as its launcher sees it."""

    def serves_from_cache(self, task: str, figures: dict[str, float]) -> None:
        """A task that is not run."""

    def finishes(self, status: str) -> None:
        """The KFP run's end."""


class Plugin(NoPlugin):
    """KFP with the plugin."""

    def __init__(self, kfp_run_id: str, uri: str, experiment: str, injects: bool) -> None:
        super().__init__(kfp_run_id)
        self._client = mlflow.MlflowClient(uri)
        self._uri, self._injects = uri, injects
        found = self._client.get_experiment_by_name(experiment)
        self._experiment = (
            found.experiment_id if found else self._client.create_experiment(experiment)
        )
        tags = {
            "kfp.pipeline_run_id": kfp_run_id,
            "kfp.pipeline_run_url": f"/#/runs/details/{kfp_run_id}",
        }
        made = self._client.create_run(self._experiment, run_name="of KFP", tags=tags)
        self.parent: str = made.info.run_id
        self._tasks: dict[str, str] = {}

    def starts(self, task: str) -> dict[str, str]:
        if task not in self._tasks:  # a retry of the pod has the driver's run of the first attempt
            self._tasks[task] = self._nested(task)
        config = {
            "endpoint": self._uri,
            "parentRunId": self.parent,
            "experimentId": self._experiment,
            "authType": "basic-auth",
            "timeout": "30s",
            "injectUserEnvVars": self._injects,
        }
        found = {**super().starts(task), "KFP_MLFLOW_CONFIG": json.dumps(config)}
        # The credentials reach every pod, for the launcher.
        found |= {
            "MLFLOW_TRACKING_USERNAME": "kfp",
            "MLFLOW_TRACKING_PASSWORD": "of kfp's server",
        }
        if self._injects:
            found |= {
                "MLFLOW_RUN_ID": self._tasks[task],
                "MLFLOW_TRACKING_URI": self._uri,
                "MLFLOW_EXPERIMENT_ID": self._experiment,
            }
        return found

    def ends(self, task: str, figures: dict[str, float], status: str = "FINISHED") -> None:
        self._log(self._tasks[task], figures)
        self._client.set_terminated(self._tasks[task], status)

    def serves_from_cache(self, task: str, figures: dict[str, float]) -> None:
        run_id = self._nested(task)
        self._log(run_id, figures)
        self._client.set_terminated(run_id, "FINISHED")

    def finishes(self, status: str) -> None:
        self._client.set_terminated(self.parent, status)
        self._close_below(self.parent, status)

    def _close_below(self, run_id: str, status: str) -> None:
        for run in below(self._client, run_id):
            if run.info.status == "RUNNING":
                self._close_below(run.info.run_id, status)
                self._client.set_terminated(run.info.run_id, status)

    def _nested(self, task: str) -> str:
        tags = {"mlflow.parentRunId": self.parent}
        made = self._client.create_run(self._experiment, run_name=task, tags=tags)
        return str(made.info.run_id)

    def _log(self, run_id: str, figures: dict[str, float]) -> None:
        points = [Metric(name, value, 0, 0) for name, value in figures.items()]
        self._client.log_batch(run_id, metrics=points)


def roots(client: mlflow.MlflowClient) -> list[Run]:
    """The runs of all experiments that are below no other, the oldest first."""
    return [run for run in _all(client) if "mlflow.parentRunId" not in run.data.tags]


def below(client: mlflow.MlflowClient, run_id: str) -> list[Run]:
    """The runs below a run, the oldest first."""
    return [run for run in _all(client) if run.data.tags.get("mlflow.parentRunId") == run_id]


def tree(client: mlflow.MlflowClient, run: Run, depth: int = 0) -> str:
    """The run and those below it as MLflow shows them: a line each."""
    made = "  from the cache" if "flagscale.cached_from" in run.data.tags else ""
    line = f"{'  ' * depth}{run.info.run_name} {run.info.status}{made}\n"
    children = below(client, run.info.run_id)
    return line + "".join(tree(client, child, depth + 1) for child in children)


def _all(client: mlflow.MlflowClient) -> list[Run]:
    ids = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(ids, order_by=["attributes.start_time ASC"]))
