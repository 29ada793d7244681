"""Takes away what a go made, on the server and in MLflow; the shared volume is out of reach."""

from __future__ import annotations

import json
from collections.abc import Callable

import kfp_server_api
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flagscale.errors import UserError
from tests.cluster.runs import ENDED, Run, Runs
from tests.cluster.table import Failed


def clean(runs: Runs) -> str:
    """Delete the go's runs, pipeline and experiments; gives what was deleted.

    Raises:
        Failed: something stayed.
    """
    stayed: list[str] = []

    def attempt(what: str, call: Callable[[], object]) -> None:
        try:
            runs.server.write(f"deleting {what}", call)
        except UserError as error:
            stayed.append(str(error))

    for run in runs.started:
        _delete_run(runs, run, attempt)
    for schedule in schedules(runs):
        attempt(schedule, lambda s=schedule: runs.server.client.delete_recurring_run(s))
    _delete_pipeline(runs, attempt)
    _delete_experiment(runs, attempt)
    if runs.settings.tracking:
        try:
            _clean_mlflow(MlflowClient(runs.settings.tracking), runs.settings.name)
        except MlflowException as error:
            stayed.append(f"MLflow: {error}")
    if stayed:
        raise Failed("; ".join(stayed))
    return f"{len(runs.started)} runs; checkpoints of a run that failed stay on the volume"


def schedules(runs: Runs) -> list[str]:
    """Ids of this go's schedules."""
    name, server = runs.settings.name, runs.server
    found = server.read(
        "looking for schedules",
        lambda: server.client.list_recurring_runs(
            page_size=100, namespace=server.namespace, filter=_named(name)
        ),
    )
    return [str(schedule.recurring_run_id) for schedule in found.recurring_runs or []]


def _delete_run(runs: Runs, run: Run, attempt: Callable[[str, Callable[[], object]], None]) -> None:
    client = runs.server.client
    if runs.look(run).state not in ENDED:
        attempt(f"run {run.run_id}", lambda: client.terminate_run(run.run_id))
    attempt(f"run {run.run_id}", lambda: client.delete_run(run.run_id))


def _delete_pipeline(runs: Runs, attempt: Callable[[str, Callable[[], object]], None]) -> None:
    name, server = runs.settings.name, runs.server
    client = server.client
    try:
        found = client.pipelines.pipeline_service_get_pipeline_by_name(
            name, namespace=server.namespace or ""
        )
    except kfp_server_api.ApiException:
        return
    pipeline = found.pipeline_id
    listed = server.read(
        f"versions of {name}", lambda: client.list_pipeline_versions(pipeline, page_size=100)
    )
    for version in listed.pipeline_versions or []:
        ids = (pipeline, version.pipeline_version_id)
        attempt(f"version {ids[1]}", lambda i=ids: client.delete_pipeline_version(*i))
    attempt(f"pipeline {name}", lambda: client.delete_pipeline(pipeline))


def _delete_experiment(runs: Runs, attempt: Callable[[str, Callable[[], object]], None]) -> None:
    name, server = runs.settings.name, runs.server
    found = server.read(
        "looking for the experiment",
        lambda: server.client.list_experiments(namespace=server.namespace, filter=_named(name)),
    )
    for experiment in found.experiments or []:
        made = experiment.experiment_id
        attempt(f"experiment {name}", lambda i=made: server.client.delete_experiment(i))


def _clean_mlflow(client: MlflowClient, name: str) -> None:
    for model in client.search_registered_models(f"name LIKE '{name}%'"):
        client.delete_registered_model(model.name)
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        client.delete_experiment(experiment.experiment_id)


def _named(name: str) -> str:
    return json.dumps(
        {"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]}
    )
