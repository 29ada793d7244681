"""What a run's pipeline says of its tasks: how often each may be tried, what a loop runs over."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flagscale.errors import UserError
from flagscale.run_values.literal import literal
from pipelines.cluster.client import TIMEOUT_SECONDS
from pipelines.cluster.server import Server

_BY_DRIVER = "argostub/"  # images that KFP never pulls
_OF_A_LOOP = "iteration"  # KFP puts nodes of this name between a loop and its tasks


@dataclass(frozen=True)
class Definition:
    """A pipeline's specification, and the parameters of one run.

    Attributes:
        spec: KFP's PipelineSpec; empty where it could not be read.
        parameters: the run's own.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)

    def most_attempts(self, path: Sequence[str]) -> int | None:
        """How often a task is tried at most, its first time included; None: nobody knows.

        Args:
            path: names of tasks, from the pipeline's own to this one.
        """
        task = self._task(path)
        if task is None:
            return None
        return 1 + int(task.get("retryPolicy", {}).get("maxRetryCount", 0))

    def holds_tasks(self, path: Sequence[str]) -> bool | None:
        """Whether a task is a pipeline of its own; None: nobody knows."""
        task = self._task(path)
        return None if task is None else "dag" in self._component(task)

    def has_pod(self, path: Sequence[str]) -> bool:
        """Whether a task has a pod of its own; KFP's driver makes a volume by itself."""
        task = self._task(path)
        label = self._component(task).get("executorLabel", "") if task else ""
        executor = self.spec.get("deploymentSpec", {}).get("executors", {}).get(label, {})
        image: str = executor.get("container", {}).get("image", "")
        return not image.startswith(_BY_DRIVER)

    def item(self, path: Sequence[str], index: int) -> str:
        """What tells one iteration of a loop from the others.

        Args:
            path: of the loop.
            index: of the iteration, from 0.

        Returns:
            The item's own name where it has one, or itself, or its number from 1.
        """
        items = self._items(path)
        item = items[index] if isinstance(items, list) and index < len(items) else None
        if isinstance(item, dict):
            item = item.get("name")
        return str(index + 1) if item is None or isinstance(item, list | dict) else str(item)

    def _items(self, path: Sequence[str]) -> Any:  # noqa: ANN401 - JSON
        task = self._task(path) or {}
        items = task.get("parameterIterator", {}).get("items", {})
        if "raw" in items:
            return json.loads(items["raw"])
        given = task.get("inputs", {}).get("parameters", {}).get(items.get("inputParameter"), {})
        # What the first step gives has the name of the parameter that it has checked.
        of_task = given.get("taskOutputParameter", {})
        name = given.get("componentInputParameter") or of_task.get("outputParameterKey")
        inputs = self.spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
        return literal(self.parameters.get(name, inputs.get(name, {}).get("defaultValue")))

    def _task(self, path: Sequence[str]) -> dict[str, Any] | None:
        holder = self.spec.get("root", {})
        task: dict[str, Any] | None = None
        for name in path:
            if not name.startswith(_OF_A_LOOP):
                task = holder.get("dag", {}).get("tasks", {}).get(name)
                if task is None:
                    return None
                holder = self._component(task)
        return task

    def _component(self, task: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.spec.get("components", {}).get(task["componentRef"]["name"])
        return found or {}


def read_definition(server: Server, run: Any) -> Definition:  # noqa: ANN401 - KFP's
    """The definition of a run, from the run itself or from the version that it is of."""
    config = run.runtime_config
    parameters = dict((config.parameters if config else None) or {})
    spec, reference = run.pipeline_spec, run.pipeline_version_reference
    if not spec and reference and reference.pipeline_id and reference.pipeline_version_id:
        try:
            spec = server.read(
                "reading the run's pipeline",
                lambda: (
                    server.client.pipelines.pipeline_service_get_pipeline_version(
                        reference.pipeline_id,
                        reference.pipeline_version_id,
                        _request_timeout=TIMEOUT_SECONDS,
                    ).pipeline_spec
                ),
            )
        except UserError:  # a deleted version, most often: names and counts are left out then
            spec = None
    spec = spec if isinstance(spec, dict) else {}
    return Definition(spec.get("pipeline_spec", spec), parameters)
