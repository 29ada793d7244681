"""Does every reference of a compiled pipeline lead somewhere, from where it stands?

A task may refer to inputs of its own DAG and to outputs of its sisters, nothing else; inside a loop
the DAG is the loop's body. Kubernetes settings stand in another document, and are resolved by
KFP's driver as if they stood at the task. What the driver would not find is told here.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")


def unresolved(spec: dict[str, Any], platform: dict[str, Any] | None = None) -> list[str]:
    """What leads nowhere.

    Args:
        spec: the PipelineSpec.
        platform: the second document of the compiled file, if there is one.
    """
    executors = spec["deploymentSpec"]["executors"]
    settings: dict[str, Any] = {}
    if platform:
        settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    problems = []
    for name, owner in {"root": spec["root"], **spec["components"]}.items():
        for task_name, task in owner.get("dag", {}).get("tasks", {}).items():
            dag = _Dag(spec, owner)
            component = spec["components"][task["componentRef"]["name"]]
            label = component.get("executorLabel")
            found = [
                *dag.task(task, component),
                *dag.settings(settings.get(label, {})),
                *_placeholders(executors.get(label, {}), task),
            ]
            problems += [f"{name}/{task_name}: {problem}" for problem in found]
        problems += [f"{name}: {problem}" for problem in _Dag(spec, owner).outputs()]
    return problems


class _Dag:
    def __init__(self, spec: dict[str, Any], owner: dict[str, Any]) -> None:
        self._components = spec["components"]
        self._tasks = owner.get("dag", {}).get("tasks", {})
        self._selected = owner.get("dag", {}).get("outputs", {})
        inputs = owner.get("inputDefinitions", {})
        self._parameters = set(inputs.get("parameters", {}))
        self._artifacts = set(inputs.get("artifacts", {}))

    def task(self, task: dict[str, Any], component: dict[str, Any]) -> Iterator[str]:
        """Its inputs, its iterator, and whether its component gets all that it asks for."""
        inputs = task.get("inputs", {})
        for reference in (
            *inputs.get("parameters", {}).values(),
            *inputs.get("artifacts", {}).values(),
        ):
            yield from self._reference(reference)
            constant = reference.get("runtimeValue", {}).get("constant")
            yield from self._placeholders(constant, inputs.get("parameters", {}))
        for name in task.get("dependentTasks", []):
            if name not in self._tasks:
                yield f"depends on {name}, which is not there"
        iterator = task.get("parameterIterator", {})
        item = iterator.get("itemInput")
        source = iterator.get("items", {}).get("inputParameter")
        if source and source not in inputs.get("parameters", {}):
            yield f"iterates over {source}, which it is not given"
        for kind in ("parameters", "artifacts"):
            for name, definition in component.get("inputDefinitions", {}).get(kind, {}).items():
                given = name in inputs.get(kind, {}) or name == item
                if not given and not definition.get("isOptional"):
                    yield f"is not given its input {name}"

    def settings(self, settings: Any) -> Iterator[str]:
        """References at any depth of a task's Kubernetes settings."""
        if isinstance(settings, dict):
            yield from self._reference(settings)
            for value in settings.values():
                yield from self.settings(value)
        elif isinstance(settings, list):
            for value in settings:
                yield from self.settings(value)

    def outputs(self) -> Iterator[str]:
        for selected in self._selected.get("artifacts", {}).values():
            for selector in selected["artifactSelectors"]:
                yield from self._output(selector["producerSubtask"], selector["outputArtifactKey"])

    def _reference(self, reference: dict[str, Any]) -> Iterator[str]:
        parameter = reference.get("componentInputParameter")
        if parameter is not None and parameter not in self._parameters:
            yield f"the DAG has no parameter {parameter}"
        artifact = reference.get("componentInputArtifact")
        if artifact is not None and artifact not in self._artifacts:
            yield f"the DAG has no artifact {artifact}"
        for key, output in (
            ("taskOutputParameter", "outputParameterKey"),
            ("taskOutputArtifact", "outputArtifactKey"),
        ):
            if key in reference:
                yield from self._output(reference[key]["producerTask"], reference[key][output])

    def _output(self, task: str, output: str) -> Iterator[str]:
        if task not in self._tasks:
            yield f"no task {task} is there to give {output}"
            return
        component = self._components[self._tasks[task]["componentRef"]["name"]]
        outputs = component.get("outputDefinitions", {})
        if output not in {**outputs.get("parameters", {}), **outputs.get("artifacts", {})}:
            yield f"{task} has no output {output}"

    @staticmethod
    def _placeholders(text: Any, parameters: dict[str, Any]) -> Iterator[str]:
        for name in _PLACEHOLDER.findall(text if isinstance(text, str) else ""):
            if name not in parameters:
                yield f"the task has no parameter {name}"


def _placeholders(executor: dict[str, Any], task: dict[str, Any]) -> Iterator[str]:
    """Of a container's image, resources and environment, resolved by the task's own inputs."""
    given = task.get("inputs", {}).get("parameters", {})
    container = dict(executor.get("container", {}))
    for code in ("args", "command"):  # the launcher's own placeholder stands there
        container.pop(code, None)
    for name in _PLACEHOLDER.findall(json.dumps(container)):
        if name not in given:
            yield f"its container asks for {name}, which the task is not given"
