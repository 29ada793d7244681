"""What is written of a component beside its code: README, example, metadata."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from kfp.dsl.base_component import BaseComponent

from flagscale.recipe import Section, load_recipe

_ROOT = Path(__file__).parents[1]
_KINDS = {
    "STRING": "text",
    "STRUCT": "mapping",
    "LIST": "list",
    "NUMBER_DOUBLE": "number",
    "NUMBER_INTEGER": "whole number",
    "BOOLEAN": "true or false",
}
_STUDENT = {"init": "depth", "num_layers": 2}
_EXAMPLES: dict[type, Any] = {str: "", dict: {}, list: [], int: 1, bool: False}
_EXAMPLES_BY_NAME: dict[str, Any] = {
    "accelerator_count": "8",
    "accelerators": "0",
    "candidates": [{"name": "two layers", "student": _STUDENT}],
    "checkpoints": "/mnt/flagscale/checkpoints",
    "code_version": "release",
    "experiment": "flagscale-distillation",
    "leaderboard: metric": "kl",
    "nodes": 2,
    "promote_recipe": {"conditions": ["distilled/kl <= 1.0 at 95%"]},
    "tasks_recipe": {"names": ["heldout_cloze"]},
    "pods": {"cpu": "16", "memory": "64Gi"},
    "rank_candidates: metric": "distillation_loss",
    "ranking_recipe": {
        "rung": 1,
        "slots": 1,
        "bootstrap_samples": 1000,
        "confidence": 0.95,
        "margin": 0.1,
    },
    "students": [{**_STUDENT, "layer_importance": "kl"}],
    "variants": [
        {
            "name": f"temperature {temperature}",
            "student": _STUDENT,
            "distillation": {"temperature": temperature},
            "training": {"train_iters": 30, "lr": 0.001},
        }
        for temperature in (1.0, 2.0)
    ],
}


def readme(folder: Path, component: BaseComponent) -> str:
    """The README of a component, from its signature, its docstring and its other files."""
    facts = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
    spec = component.pipeline_spec.components[f"comp-{component.name}"]
    inputs, outputs = spec.input_definitions, spec.output_definitions
    texts = _descriptions(component)
    parameters = [(n, _kind(p), texts[n]) for n, p in inputs.parameters.items()]
    artifacts = [(n, _title(a), texts[n]) for n, a in inputs.artifacts.items()]
    written = [
        *((n, _title(a), texts[n]) for n, a in outputs.artifacts.items()),
        *((n, _kind(p), "as checked") for n, p in outputs.parameters.items()),
    ]
    step = f"flagscale/steps/{component.name.replace('-', '_')}.py"
    return "\n\n".join(
        [
            f"# {component.name}",
            f"Stability: {facts['stability']}.",
            "## Overview",
            component.description or "",
            f"The work is in [`{step}`](../../../{step}).",
            "## Inputs\n\n" + _table([*sorted(parameters), *sorted(artifacts)]),
            "## Outputs\n\n" + _table(sorted(written)),
            "## Usage\n\n[`example_pipelines.py`](example_pipelines.py) has a pipeline of this "
            "component alone; [`pipelines/`](../../../pipelines) those that it is made for.",
            f"## Metadata\n\n{_metadata(facts)}",
            "<!-- Made by `python -m components` from the signature: change it there. -->\n",
        ]
    )


def example(component: BaseComponent) -> str:
    """A module with a pipeline of the component alone, whose inputs other runs have made."""
    step = component.name.replace("-", "_")
    signature = inspect.signature(component.python_func).parameters
    spec = component.pipeline_spec.components[f"comp-{component.name}"].input_definitions
    given, loops, arguments = [], [], []
    for name, parameter in signature.items():
        if name in spec.parameters:
            value = example_value(step, name, parameter.annotation)
            given.append(f"{name}: {parameter.annotation.__name__} = {value!r}")
            arguments.append(f"{name}={name}")
        elif name in spec.artifacts and parameter.default is inspect.Parameter.empty:
            uri, artifact = f"{name}_uri", spec.artifacts[name]
            made = f"dsl.importer(artifact_uri={uri}, artifact_class=dsl.{_title(artifact)})"
            if artifact.is_artifact_list:
                given.append(f"{uri}s: list = {[f's3://bucket/{name}/{n}' for n in (1, 2)]!r}")
                loops.append(f"    with dsl.ParallelFor({uri}s) as {uri}:\n        {name} = {made}")
                arguments.append(f"{name}=dsl.Collected({name}.output)")
            else:
                given.append(f"{uri}: str = 's3://bucket/{name}'")
                arguments.append(f"{name}={made}.output")
    lines = [
        f'"""A pipeline of {component.name} alone, on artifacts of other runs.',
        "",
        "Made by `python -m components` from the component's signature: change it there.",
        '"""',
        "",
        "from kfp import dsl",
        "",
        f"from .component import {step}",
        "",
        f'@dsl.pipeline(name="{component.name}-example")',
        f"def {step}_example({', '.join(given)},) -> None:",
        f'    """{(component.description or "").splitlines()[0]}"""',
        *loops,
        f"    {step}({', '.join(arguments)},)",
    ]
    return "\n".join(lines) + "\n"


def metadata(folder: Path) -> str:
    """The metadata of a new component; to be looked through."""
    return f"""name: {folder.name}
stability: beta
dependencies:
  kubeflow:
    - {{name: Pipelines, version: ">=2.17.0"}}
  external_services:
    - {{name: MLflow, version: ">=3.17.0"}}
tags: [{folder.parent.name.replace("_", "-")}, distillation]
lastVerified: {datetime.now(UTC):%Y-%m-%d}T00:00:00Z
ci: {{skip_dependency_probe: false}}
"""


def example_value(step: str, name: str, annotation: type) -> Any:  # noqa: ANN401 - any JSON value
    """A parameter's value: a likely one, or a section of the tiny recipe."""
    for key in (name, f"{step}: {name}"):
        if key in _EXAMPLES_BY_NAME:
            return _EXAMPLES_BY_NAME[key]
    recipe = load_recipe(_ROOT / "recipes" / "tiny.yaml")
    section = getattr(recipe, name.removesuffix("_recipe"), None)
    if annotation is dict and isinstance(section, Section):
        return section.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    return _EXAMPLES[annotation]


def _descriptions(component: BaseComponent) -> dict[str, str]:
    """What the docstring says of each argument; KFP itself keeps only that of the inputs."""
    documented = docstring_parser.parse(component.python_func.__doc__ or "")
    return {param.arg_name: param.description or "" for param in documented.params}


def _metadata(facts: dict[str, Any]) -> str:
    needs = [one for group in facts["dependencies"].values() for one in group]
    rows = {
        "Needs": ", ".join(f"{one['name']} {one['version']}" for one in needs),
        "Tags": ", ".join(facts["tags"]),
        "Last verified": f"{facts['lastVerified']:%Y-%m-%d}",
    }
    return "\n".join(f"* {name}: {value}" for name, value in rows.items())


def _kind(parameter: object) -> str:
    return _KINDS.get(_type_name(parameter), "text")


def _type_name(parameter: object) -> str:
    field = parameter.DESCRIPTOR.fields_by_name["parameter_type"]  # type: ignore[attr-defined]
    return field.enum_type.values_by_number[parameter.parameter_type].name  # type: ignore[attr-defined]


def _title(artifact: object) -> str:
    title = artifact.artifact_type.schema_title  # type: ignore[attr-defined]
    return title.removeprefix("system.")


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| name | type | |", "|---|---|---|"]
    lines += [f"| `{name}` | {kind} | {' '.join(text.split())} |" for name, kind, text in rows]
    return "\n".join(lines)
