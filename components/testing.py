"""For tests of components: their bodies run here, on inputs that are not there.

What a step does with inputs that are there is tested where the step is (`tests/flagscale/steps`).
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.documents import example_value
from flagscale.execution.notes import FOLDER_VARIABLE, read_error


def arguments(component: BaseComponent, folder: Path, **uris: str) -> dict[str, Any]:
    """What a component's function is given: likely parameters, and artifacts that hold a file.

    Args:
        component: whose.
        folder: for the artifacts.
        uris: of input artifacts that are elsewhere.
    """
    spec = component.pipeline_spec.components[f"comp-{component.name}"]
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(component.python_func).parameters.items():
        if name in spec.input_definitions.artifacts:
            path = folder / name
            path.mkdir()
            (path / "something").touch()
            one = dsl.Artifact(uri=uris.get(name, str(path)))
            is_list = spec.input_definitions.artifacts[name].is_artifact_list
            given[name] = [one] if is_list else one
        elif name in spec.output_definitions.artifacts:
            given[name] = dsl.Artifact(uri=str(folder / f"{name}-out"))
        else:
            step = component.name.replace("-", "_")
            given[name] = example_value(step, name, parameter.annotation)
    return given


def error_of(component: BaseComponent, given: dict[str, Any], folder: Path) -> str:
    """The message with which a component's step fails.

    Args:
        component: whose.
        given: to its function.
        folder: for the step's notes.
    """
    before = dict(os.environ)
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        with pytest.raises(SystemExit) as end:
            component.python_func(**given)
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert end.value.code == 1
    return str(read_error(folder))
