"""What a KFP server tells of runs: states, tasks, logs. Also its cluster's API, where it is asked.

Logs are where the real one has them: Argo's archive is read through the API as artifact `main-logs`
of a node, in base64 within JSON; a pod that is still there through the UI's server, as text. What
the launcher uploads (`executor-logs-N`) is no artifact of Argo's: the API finds none of that name.
"""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import kfp_server_api as api

from tests.pipelines.cluster.argo_nodes import NOT_YET
from tests.pipelines.cluster.kfp_api import CLIENT, Refused, Request, Text, found, read

if TYPE_CHECKING:
    from tests.pipelines.cluster.kfp_server import KfpServer

_ANSWERS = Path(__file__).parent / "answers"
_V2 = "/apis/v2beta1"


def real_run(name: str) -> api.V2beta1Run:
    """What a real server answered of a run, as KFP's client reads it.

    Args:
        name: of the file, without `run-`.
    """
    data = (_ANSWERS / f"run-{name}.json").read_text()
    return CLIENT.deserialize(SimpleNamespace(data=data), "V2beta1Run")


def read_tasks(entries: list[dict[str, Any]]) -> list[api.V2beta1PipelineTaskDetail]:
    """Entries of a run's details as KFP's client reads them."""
    kind = "list[V2beta1PipelineTaskDetail]"
    return CLIENT.deserialize(SimpleNamespace(data=json.dumps(entries)), kind)


def _get_run(kfp: KfpServer, _: Request, run_id: str) -> dict[str, Any]:
    run = found(kfp.runs, run_id, "run")
    number = kfp.looks.get(run_id, 0)
    kfp.looks[run_id] = number + 1
    kfp.on_look(number)
    answer: dict[str, Any] = CLIENT.sanitize_for_serialization(run)
    if run.run_details is not None:
        return answer  # a real one
    last = number >= len(kfp.frames) - 1
    answer["state"] = kfp.outcome if last else "RUNNING"
    answer["finished_at"] = datetime.now(UTC).isoformat() if last else NOT_YET
    if last and kfp.error:
        answer["error"] = {"code": 2, "message": kfp.error}
    frame = kfp.frames[min(number, len(kfp.frames) - 1)] if kfp.frames else []
    answer["run_details"] = {"task_details": frame}
    read(
        {k: v for k, v in answer.items() if not k.endswith("_at") and k != "run_details"},
        "V2beta1Run",
    )
    return answer


def _get_version(kfp: KfpServer, _: Request, pipeline: str, version: str) -> Any:
    made = found(kfp.versions, version, "pipeline version")
    assert made.pipeline_id == pipeline
    return made


def _read_artifact(kfp: KfpServer, _: Request, run: str, node: str, name: str) -> dict[str, str]:
    found(kfp.runs, run, "run")
    if name != kfp.log_artifact or node not in kfp.logs:
        raise Refused(404, f"ResourceNotFoundError: artifact {run}/{node}/{name} not found")
    return {"data": base64.b64encode(kfp.logs[node]).decode()}


def _pod_log(kfp: KfpServer, request: Request) -> Text:
    if kfp.namespaces is not None and "podnamespace" not in request.query:
        return Text("podnamespace argument is required", 422)
    name = request.query["podname"]
    if name not in kfp.pod_logs:
        return Text("Could not get main container logs: Error: not found", 500)
    return Text(kfp.pod_logs[name])


def _config_map(kfp: KfpServer, _: Request, namespace: str, name: str) -> Text:
    """Kubernetes' answer."""
    if kfp.config_maps is None:
        status = {"kind": "Status", "status": "Failure", "reason": "Forbidden", "code": 403}
        return Text(json.dumps(status), 403)
    if (namespace, name) not in kfp.config_maps:
        return Text(json.dumps({"kind": "Status", "reason": "NotFound", "code": 404}), 404)
    data = kfp.config_maps[namespace, name]
    return Text(json.dumps({"kind": "ConfigMap", "metadata": {"name": name}, "data": data}))


ROUTES = [
    ("GET", f"{_V2}/runs/([^/]+)", _get_run),
    ("GET", f"{_V2}/pipelines/([^/]+)/versions/([^/]+)", _get_version),
    ("GET", f"{_V2}/runs/([^/]+)/nodes/([^/]+)/artifacts/([^/]+):read", _read_artifact),
    ("GET", "/k8s/pod/logs", _pod_log),
    ("GET", "/api/v1/namespaces/([^/]+)/configmaps/([^/]+)", _config_map),
]
