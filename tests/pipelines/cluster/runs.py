"""Runs for tests, and the names that Argo gives their pods."""

from __future__ import annotations

from typing import Any

from pipelines.cluster.workflow_nodes import node_id
from tests.pipelines.cluster.argo_nodes import WORKFLOW


def pod_node(step: str, attempt: int = 0, dag: int = 0) -> str:
    """The id of the node of an attempt at a step."""
    name = f"{WORKFLOW}(0).root(0).{step}({dag}).executor({attempt})"
    return node_id(WORKFLOW, name)


def pod_name(step: str, attempt: int = 0) -> str:
    """The name of its pod, of a task with retries."""
    value = pod_node(step, attempt).rpartition("-")[2]
    return f"{WORKFLOW}-retry-system-container-impl-{value}"


def pipeline(**retries: int) -> dict[str, Any]:
    """A pipeline's specification, of which nothing is said but the retries of its tasks."""
    of_names = {
        name.replace("_", "-"): {
            "retryPolicy": {"maxRetryCount": number},
            "componentRef": {"name": "a-step"},
        }
        for name, number in retries.items()
    }
    components = {"a-step": {"executorLabel": "its-pod"}}
    return {"root": {"dag": {"tasks": of_names}}, "components": components}


def sweep_of(parameter: str, default: list[str]) -> dict[str, Any]:
    """A pipeline's specification with a loop over a parameter, as KFP compiles it."""
    channel = f"pipelinechannel--{parameter}"
    loop = {
        "componentRef": {"name": "a-loop"},
        "inputs": {"parameters": {channel: {"componentInputParameter": parameter}}},
        "parameterIterator": {
            "itemInput": f"{channel}-loop-item",
            "items": {"inputParameter": channel},
        },
    }
    variants = [{"name": name} for name in default]
    return {
        "root": {
            "dag": {"tasks": {"for-loop-1": loop}},
            "inputDefinitions": {"parameters": {parameter: {"defaultValue": variants}}},
        },
        "components": {"a-loop": {"dag": {"tasks": {}}}},
    }
