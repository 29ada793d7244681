"""Brings a pipeline to a KFP server: a version where it changed, and runs or schedules of it.

A version's name says what is in it, so an equal pipeline is found again and nothing is uploaded.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import kfp_server_api

from flagscale.errors import UserError
from flagscale.recipe import Recipe
from flagscale.run_values.literal import carried
from pipelines.cluster.client import TIMEOUT_SECONDS
from pipelines.cluster.package import Package
from pipelines.cluster.server import Server, say

_EQUALS = 1  # of KFP's filters


@dataclass(frozen=True)
class Order:
    """What is asked of the server beside the pipeline.

    Attributes:
        name: of the run or schedule.
        experiment: KFP's; created where it is missing.
        parameters: those that differ from the pipeline's defaults.
        tracking_experiment: MLflow's, for KFP's plugin.
        service_account: of the pods; None: the server's default.
        reuse: whether steps may take results of earlier runs.
    """

    name: str
    experiment: str
    parameters: dict[str, Any]
    tracking_experiment: str
    service_account: str | None = None
    reuse: bool = True


@dataclass(frozen=True)
class Schedule:
    """When runs start.

    Attributes:
        cron: six fields.
        max_concurrency: runs at a time.
        catch_up: whether runs that were missed are made up for.
        enabled: whether it starts runs at all.
    """

    cron: str
    max_concurrency: int = 1
    catch_up: bool = True
    enabled: bool = True


def experiment_name(given: str | None, recipe: Recipe) -> str:
    """Which KFP experiment; the variables are those of KFP's client."""
    default = os.environ.get("KF_PIPELINES_DEFAULT_EXPERIMENT_NAME") or recipe.tracking.experiment
    name = given or default
    instead = os.environ.get("KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME")
    if instead and instead != name:
        say(f"experiment {instead}, not {name}: KF_PIPELINES_OVERRIDE_EXPERIMENT_NAME says so")
    return instead or name


def start_run(server: Server, package: Package, order: Order) -> str:
    """Start a run of the package, uploading it first where the server has no equal one.

    Returns:
        The run's id.

    Raises:
        UserError: the server refused something.
    """
    content = _content(server, package, order)
    experiment = _experiment(server, order.experiment)
    body = kfp_server_api.V2beta1Run(experiment_id=experiment, display_name=order.name, **content)
    run = server.write(
        f"starting run {order.name}",
        lambda: server.client.runs.run_service_create_run(body),
    )
    return str(run.run_id)


def start_schedule(server: Server, package: Package, order: Order, schedule: Schedule) -> str:
    """Create a recurring run, in place of those of its name that were made here.

    Returns:
        Its id.

    Raises:
        UserError: the server refused something, or the name is another pipeline's.
    """
    made_for = f"pipeline {package.name}: {package.description}"
    old = _schedules(server, order.name, f"pipeline {package.name}:")
    content = _content(server, package, order)
    experiment = _experiment(server, order.experiment)
    body = kfp_server_api.V2beta1RecurringRun(
        experiment_id=experiment,
        display_name=order.name,
        description=made_for,
        trigger=kfp_server_api.V2beta1Trigger(
            cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=schedule.cron)
        ),
        max_concurrency=schedule.max_concurrency,
        no_catchup=not schedule.catch_up,
        mode="ENABLE" if schedule.enabled else "DISABLE",
        **content,
    )
    new = server.write(
        f"creating schedule {order.name}",
        lambda: server.client.recurring_runs.recurring_run_service_create_recurring_run(body),
    )
    # The old one goes last: when the new one is refused, runs go on being started.
    for found in old:
        server.write(
            f"deleting the schedule before, {found}",
            lambda found=found: server.client.delete_recurring_run(found),  # type: ignore[misc]
        )
        say(f"replaced schedule {found}")
    return str(new.recurring_run_id)


def _content(server: Server, package: Package, order: Order) -> dict[str, Any]:
    """What a run and a schedule have in common. KFP's client has no argument for plugins.

    A server without the plugin keeps the plugin's input and does nothing with it; one that is
    older than plugins drops it.
    """
    return {
        **_source(server, package, order),
        "runtime_config": kfp_server_api.V2beta1RuntimeConfig(parameters=carried(order.parameters)),
        "service_account": order.service_account,
        "plugins_input": {"mlflow": {"experiment_name": order.tracking_experiment}},
    }


def _source(server: Server, package: Package, order: Order) -> dict[str, Any]:
    """What a run is of: an uploaded version, or a specification of its own.

    KFP has no switch for the cache on a run of a version: it is written in the pipeline. A version
    without cache would become the default of the UI, so such a run carries its pipeline instead.
    """
    if order.reuse:
        pipeline, version = _version(server, package)
        reference = kfp_server_api.V2beta1PipelineVersionReference(
            pipeline_id=pipeline, pipeline_version_id=version
        )
        return {"pipeline_version_reference": reference}
    say("pipeline: without cache, in the run itself; no version is uploaded")
    return {"pipeline_spec": package.without_cache()}


def _version(server: Server, package: Package) -> tuple[str, str]:
    """Ids of the pipeline and of the version that equals the package."""
    pipeline = _pipeline(server, package.name)
    if pipeline is not None:
        known = _known_version(server, pipeline, package)
        if known is not None:
            say(f"pipeline: unchanged, version {package.version}")
            return pipeline, known
        return pipeline, _upload(server, pipeline, package)
    made = server.write(
        f"creating pipeline {package.name}",
        lambda: server.client.pipelines.pipeline_service_create_pipeline(
            kfp_server_api.V2beta1Pipeline(
                name=package.name,
                display_name=package.name,
                namespace=server.namespace,
                description="Distils a teacher into a smaller student.",
                tags={"made-by": "flagscale-distillation"},
            )
        ),
    )
    pipeline = str(made.pipeline_id)
    try:
        return pipeline, _upload(server, pipeline, package)
    except UserError:
        _delete_empty(server, pipeline, package.name)
        raise


def _delete_empty(server: Server, pipeline: str, name: str) -> None:
    """Without a version it helps nobody; where it has to stay, what went wrong before counts."""
    try:
        server.write(f"deleting pipeline {name}", lambda: server.client.delete_pipeline(pipeline))
    except UserError as error:
        say(f"{error}; the empty pipeline stays")


def _pipeline(server: Server, name: str) -> str | None:
    def find() -> str | None:
        try:
            found = server.client.pipelines.pipeline_service_get_pipeline_by_name(
                name, namespace=server.namespace or "", _request_timeout=TIMEOUT_SECONDS
            )
        except kfp_server_api.ApiException as error:
            if error.status == 404:
                return None
            raise
        return str(found.pipeline_id)

    return server.read(f"looking for pipeline {name}", find)


def _known_version(server: Server, pipeline: str, package: Package) -> str | None:
    found = server.read(
        f"looking for version {package.version}",
        lambda: server.client.list_pipeline_versions(pipeline, filter=_named(package.version)),
    )
    versions = found.pipeline_versions or []
    return str(versions[0].pipeline_version_id) if versions else None


def _upload(server: Server, pipeline: str, package: Package) -> str:
    made = server.write(
        f"uploading version {package.version}",
        lambda: server.client.upload_version(
            package.path, package.version, pipeline, package.description, package.tags
        ),
    )
    say(f"pipeline: uploaded version {package.version}")
    return str(made.pipeline_version_id)


def _experiment(server: Server, name: str) -> str:
    """The experiment's id; it is created where there is none."""
    found = server.read(
        f"looking for experiment {name}",
        lambda: server.client.list_experiments(namespace=server.namespace, filter=_named(name)),
    )
    if found.experiments:
        return str(found.experiments[0].experiment_id)
    made = server.write(
        f"creating experiment {name}",
        lambda: server.client.create_experiment(name, namespace=server.namespace),
    )
    return str(made.experiment_id)


def _schedules(server: Server, name: str, made_for: str) -> list[str]:
    """Ids of the recurring runs of this name."""
    found = server.read(
        f"looking for schedules named {name}",
        lambda: server.client.list_recurring_runs(
            page_size=100, namespace=server.namespace, filter=_named(name)
        ),
    )
    schedules = found.recurring_runs or []
    for schedule in schedules:
        if not (schedule.description or "").startswith(made_for):
            raise UserError(
                f"schedule {name}: there is one already that was not made of {made_for[:-1]} "
                f"({schedule.recurring_run_id}); choose another --name, or delete it in the UI"
            )
    return [str(schedule.recurring_run_id) for schedule in schedules]


def _named(name: str) -> str:
    predicate = {"operation": _EQUALS, "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})
