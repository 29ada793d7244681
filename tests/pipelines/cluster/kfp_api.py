"""What a KFP server of version 2 answers, strict where the backend is; see kfp_server.py; for
what becomes of runs, kfp_runs.py.

Requests are read and answers written with the official client's models (`kfp_server_api`); what
they do not know is refused. Uploaded pipelines are parsed strictly, both documents and every
executor. A run's parameters are checked as the backend's `validatePipelineJobInputs` checks them.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import kfp_server_api as api
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec import pipeline_spec_pb2

if TYPE_CHECKING:
    from tests.pipelines.cluster.kfp_server import KfpServer

CLIENT = api.ApiClient()
_INT64 = ("max_concurrency",)
_KINDS = {
    "STRING": str,
    "NUMBER_INTEGER": (int, float),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": bool,
    "LIST": list,
    "STRUCT": dict,
}


class Refused(Exception):  # noqa: N818 - an answer
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Broken(Exception):  # noqa: N818 - an answer
    """Something in between answers in the server's place, or cuts its answer off."""


@dataclass
class Text:
    """An answer that is no JSON."""

    text: str
    status: int = 200


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    by_kubernetes: bool = False  # through the API of the cluster
    body: Any = None
    file: bytes = b""


def read(body: Any, kind: str) -> Any:
    """A body as the client's model; what the model does not hold is refused."""
    if not isinstance(body, dict):
        raise Refused(400, "InvalidArgument: a body is needed")
    model = CLIENT.deserialize(SimpleNamespace(data=json.dumps(body)), kind)
    # int64 is a text in the models and in JSON's answers; a number is taken too.
    numbers = {n: str(v) for n, v in body.items() if n in _INT64 and isinstance(v, int)}
    if CLIENT.sanitize_for_serialization(model) != body | numbers:
        raise Refused(400, f"InvalidArgument: not a {kind}: {body}")
    return model


def parse_package(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Check a pipeline as the backend and its compiler would; gives the specification."""
    if not 1 <= len(documents) <= 2:
        raise Refused(400, f"InvalidArgument: {len(documents)} documents")
    spec = documents[0]
    try:
        json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        deployment = spec["deploymentSpec"]
        json_format.ParseDict(deployment, pipeline_spec_pb2.PipelineDeploymentConfig())
        for platforms in documents[1:]:
            json_format.ParseDict(platforms, pipeline_spec_pb2.PlatformSpec())
            executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
            assert executors.keys() <= deployment["executors"].keys()
            for executor in executors.values():
                json_format.ParseDict(executor, KubernetesExecutorConfig())
    except (json_format.ParseError, KeyError, AssertionError) as error:
        raise Refused(400, f"InvalidArgument: invalid v2 pipeline spec: {error}") from error
    return spec


def check_inputs(spec: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse parameters as the backend does when a run is created."""
    wanted = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, definition in wanted.items():
        if name not in values:
            if not definition.get("isOptional") and "defaultValue" not in definition:
                raise Refused(400, f"InvalidArgument: parameter {name} is not optional")
            continue
        kind, value = definition["parameterType"], values[name]
        number_for_bool = isinstance(value, bool) and kind != "BOOLEAN"
        if number_for_bool or not isinstance(value, _KINDS[kind]):
            raise Refused(400, f"InvalidArgument: input parameter {name} requires type {kind}")
        if "literals" in definition and value not in definition["literals"]:
            raise Refused(400, f"InvalidArgument: input parameter {name} is none of its literals")
    if extra := values.keys() - wanted.keys():
        raise Refused(400, f"InvalidArgument: parameter(s) not required by pipeline: {extra}")


def _new_id() -> str:
    return str(uuid.uuid4())


def found(values: dict[str, Any], key: str, what: str) -> Any:
    if key not in values:
        raise Refused(404, f"NotFound: {what} {key} not found")
    return values[key]


def _filtered(values: list[Any], request: Request) -> list[Any]:
    predicates = json.loads(request.query.get("filter", "{}")).get("predicates", [])
    for predicate in predicates:
        assert predicate["operation"] in (1, "EQUALS")
        key, wanted = predicate["key"], predicate["stringValue"]
        values = [value for value in values if getattr(value, key) == wanted]
    return values[: int(request.query.get("page_size", 20))]


def _healthz(kfp: KfpServer, _: Request) -> dict[str, Any]:
    return {"multi_user": kfp.namespaces is not None, **kfp.health}


def _old_healthz(kfp: KfpServer, _: Request) -> dict[str, Any]:
    if kfp.old_tag is None:
        raise Refused(404, "Not Found")
    return {"multi_user": kfp.namespaces is not None, "tag_name": kfp.old_tag}


def _create_pipeline(kfp: KfpServer, request: Request) -> Any:
    made = read(request.body, "V2beta1Pipeline")
    made.namespace = kfp.namespace(made.namespace, needed=False)
    if any((p.name, p.namespace) == (made.name, made.namespace) for p in kfp.pipelines.values()):
        raise Refused(409, f"AlreadyExists: pipeline {made.name}")
    made.pipeline_id = _new_id()
    kfp.pipelines[made.pipeline_id] = made
    return made


def _pipeline_by_name(kfp: KfpServer, request: Request, name: str) -> Any:
    namespace = kfp.namespace(request.query.get("namespace"), needed=False)
    for pipeline in kfp.pipelines.values():
        if (pipeline.name, pipeline.namespace) == (name, namespace):
            return pipeline
    raise Refused(404, f"NotFound: pipeline {name} not found")


def _delete_pipeline(kfp: KfpServer, _: Request, pipeline: str) -> None:
    if any(v.pipeline_id == pipeline for v in kfp.versions.values()):
        raise Refused(400, "InvalidArgument: pipeline has versions")
    del kfp.pipelines[pipeline]


def _upload_version(kfp: KfpServer, request: Request) -> Any:
    pipeline = found(kfp.pipelines, request.query["pipelineid"], "pipeline")
    spec = parse_package(list(yaml.load_all(request.file, yaml.CSafeLoader)))
    name = request.query["name"]
    tags = json.loads(request.query["tags"])
    if any(len(text) > 63 for pair in tags.items() for text in pair):
        raise Refused(400, "InvalidArgument: a tag's key or value exceeds 63 characters")
    if any(v.name == name and v.pipeline_id == pipeline.pipeline_id for v in kfp.versions.values()):
        raise Refused(409, f"AlreadyExists: version {name}")
    made = api.V2beta1PipelineVersion(
        pipeline_id=pipeline.pipeline_id,
        pipeline_version_id=_new_id(),
        name=name,
        display_name=name,
        description=request.query.get("description"),
        pipeline_spec=spec,
        tags=tags,
    )
    kfp.versions[made.pipeline_version_id] = made
    kfp.packages[name] = request.file
    return made


def _list_versions(kfp: KfpServer, request: Request, pipeline: str) -> Any:
    versions = [v for v in kfp.versions.values() if v.pipeline_id == pipeline]
    return api.V2beta1ListPipelineVersionsResponse(pipeline_versions=_filtered(versions, request))


def _create_experiment(kfp: KfpServer, request: Request) -> Any:
    made = read(request.body, "V2beta1Experiment")
    made.namespace = kfp.namespace(made.namespace)
    made.experiment_id = _new_id()
    kfp.experiments[made.experiment_id] = made
    return made


def _list_experiments(kfp: KfpServer, request: Request) -> Any:
    namespace = kfp.namespace(request.query.get("namespace"))
    found = [e for e in kfp.experiments.values() if e.namespace == namespace]
    return api.V2beta1ListExperimentsResponse(experiments=_filtered(found, request))


def _spec_of(kfp: KfpServer, body: Any) -> dict[str, Any]:
    """The specification of a run or schedule: of a version, or of its own."""
    reference = body.pipeline_version_reference
    if (reference is None) == (body.pipeline_spec is None):
        raise Refused(400, "InvalidArgument: one of version and specification is needed")
    if reference is not None:
        version = found(kfp.versions, reference.pipeline_version_id, "version")
        assert version.pipeline_id == reference.pipeline_id
        return version.pipeline_spec
    own = body.pipeline_spec
    if "pipeline_spec" in own:
        return parse_package([own["pipeline_spec"], own["platform_spec"]])
    return parse_package([own])


def _create_run(kfp: KfpServer, request: Request) -> Any:
    made = read(request.body, "V2beta1Run")
    experiment = found(kfp.experiments, made.experiment_id, "experiment")
    kfp.namespace(experiment.namespace)
    check_inputs(_spec_of(kfp, made), made.runtime_config.parameters or {})
    made.run_id = _new_id()
    made.created_at = datetime.now(UTC)
    made.state = "PENDING"
    kfp.runs[made.run_id] = made
    return made


def _create_schedule(kfp: KfpServer, request: Request) -> Any:
    made = read(request.body, "V2beta1RecurringRun")
    found(kfp.experiments, made.experiment_id, "experiment")
    check_inputs(_spec_of(kfp, made), made.runtime_config.parameters or {})
    if not 1 <= int(made.max_concurrency) <= 10:
        raise Refused(400, "InvalidArgument: Max concurrency must be at least 1 and at most 10")
    if len(made.trigger.cron_schedule.cron.split()) not in (5, 6):
        raise Refused(400, "InvalidArgument: Schedule cron is not a supported format")
    made.recurring_run_id = _new_id()
    kfp.schedules[made.recurring_run_id] = made
    return made


def _list_schedules(kfp: KfpServer, request: Request) -> Any:
    kfp.namespace(request.query.get("namespace"))
    found = _filtered(list(kfp.schedules.values()), request)
    return api.V2beta1ListRecurringRunsResponse(recurring_runs=found)


def _delete_schedule(kfp: KfpServer, _: Request, schedule: str) -> None:
    found(kfp.schedules, schedule, "recurring run")
    del kfp.schedules[schedule]


_V2 = "/apis/v2beta1"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("GET", f"{_V2}/healthz", _healthz),
    ("GET", "/apis/v1beta1/healthz", _old_healthz),
    ("POST", f"{_V2}/pipelines", _create_pipeline),
    ("GET", f"{_V2}/pipelines/names/([^/]+)", _pipeline_by_name),
    ("DELETE", f"{_V2}/pipelines/([^/]+)", _delete_pipeline),
    ("POST", f"{_V2}/pipelines/upload_version", _upload_version),
    ("GET", f"{_V2}/pipelines/([^/]+)/versions", _list_versions),
    ("POST", f"{_V2}/experiments", _create_experiment),
    ("GET", f"{_V2}/experiments", _list_experiments),
    ("POST", f"{_V2}/runs", _create_run),
    ("POST", f"{_V2}/recurringruns", _create_schedule),
    ("GET", f"{_V2}/recurringruns", _list_schedules),
    ("DELETE", f"{_V2}/recurringruns/([^/]+)", _delete_schedule),
]
