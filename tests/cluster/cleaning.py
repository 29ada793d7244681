"""Takes away what a go made, on the server and in MLflow; the shared volume is out of reach."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import kfp_server_api
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flagscale.errors import UserError
from tests.cluster.runs import ENDED, Runs
from tests.cluster.table import Failed

_Deed = tuple[str, Callable[[], object]]  # what is taken away, and how
_ERRORS = (UserError, kfp_server_api.ApiException, MlflowException)


def clean(runs: Runs) -> str:
    """Delete the go's runs, pipeline and experiments; what resists leaves the rest alone.

    Raises:
        Failed: something stayed.
    """
    stayed: list[str] = []
    for part in (_runs, _schedules, _pipeline, _experiment, _mlflow):
        try:
            for what, deed in part(runs):
                try:
                    deed()
                except _ERRORS as error:
                    stayed.append(f"{what}: {error}")
        except _ERRORS as error:
            stayed.append(str(error))
    if stayed:
        raise Failed("; ".join(stayed))
    return f"{len(runs.started)} runs, their pipeline and experiments"


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


def _runs(runs: Runs) -> Iterator[_Deed]:
    client = runs.server.client
    for run in runs.started:
        if runs.look(run).state not in ENDED:
            yield f"run {run.run_id}", lambda run=run: client.terminate_run(run.run_id)
        yield f"run {run.run_id}", lambda run=run: client.delete_run(run.run_id)


def _schedules(runs: Runs) -> Iterator[_Deed]:
    client = runs.server.client
    for made in schedules(runs):
        yield f"schedule {made}", lambda made=made: client.delete_recurring_run(made)


def _pipeline(runs: Runs) -> Iterator[_Deed]:
    """The versions first: a pipeline that has some stays."""
    name, server = runs.settings.name, runs.server
    client = server.client
    try:
        pipeline = client.pipelines.pipeline_service_get_pipeline_by_name(
            name, namespace=server.namespace or ""
        ).pipeline_id
    except kfp_server_api.ApiException as error:
        if error.status == 404:
            return
        raise
    for version in client.list_pipeline_versions(pipeline, page_size=100).pipeline_versions or []:
        ids = (pipeline, version.pipeline_version_id)
        yield f"version {ids[1]}", lambda ids=ids: client.delete_pipeline_version(*ids)
    yield f"pipeline {name}", lambda: client.delete_pipeline(pipeline)


def _experiment(runs: Runs) -> Iterator[_Deed]:
    name, server = runs.settings.name, runs.server
    found = server.client.list_experiments(namespace=server.namespace, filter=_named(name))
    for experiment in found.experiments or []:
        made = experiment.experiment_id
        yield f"experiment {name}", lambda made=made: server.client.delete_experiment(made)


def _mlflow(runs: Runs) -> Iterator[_Deed]:
    if runs.settings.tracking is None:
        return
    client, name = MlflowClient(runs.settings.tracking), runs.settings.name
    for model in client.search_registered_models(f"name LIKE '{name}%'"):
        found = model.name
        yield f"model {found}", lambda found=found: client.delete_registered_model(found)
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        made = experiment.experiment_id
        yield f"MLflow's experiment {name}", lambda: client.delete_experiment(made)


def _named(name: str) -> str:
    predicate = {"operation": 1, "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})
