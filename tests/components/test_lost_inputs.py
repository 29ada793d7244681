"""Cached artifacts whose objects are gone: KFP's launcher downloads nothing, without a word."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from components.__main__ import all_components
from flagscale.execution.notes import FOLDER_VARIABLE, read_error
from flagscale.recipe import load_recipe

RECIPE = load_recipe("recipes/tiny.yaml").model_dump(mode="json", exclude_none=True)
RECIPE |= {"met": {}, "of_many": {}}  # follow from it, and from the pipeline
RECIPE["ranking"] = {
    "rung": 2, "slots": 1, "bootstrap_samples": 100, "confidence": 0.95, "margin": 0.5,
}  # fmt: skip
CASES = [
    (component, name)
    for component in all_components().values()
    for name in sorted(
        component.pipeline_spec.components[f"comp-{component.name}"].input_definitions.artifacts
    )
    if not name.endswith("_metrics")  # a file; what record-run does without has tests of its own
]


def arguments(component: BaseComponent, lost: str, folder: Path, uri: str) -> dict[str, Any]:
    """Artifacts that are there, but for the lost one."""
    spec = component.pipeline_spec.components[f"comp-{component.name}"]
    given: dict[str, Any] = {}
    for name, kind in inspect.signature(component.python_func).parameters.items():
        if name in spec.input_definitions.artifacts:
            path = folder / name
            path.mkdir()
            (path / "something").touch()
            one = dsl.Artifact(uri=uri if name == lost else str(path))
            is_list = spec.input_definitions.artifacts[name].is_artifact_list
            given[name] = [one] if is_list else one
        elif name in spec.output_definitions.artifacts:
            given[name] = dsl.Artifact(uri=str(folder / f"{name}-out"))
        elif kind.annotation is dict:
            given[name] = {"cpu": "1"} if name == "pods" else RECIPE[name.removesuffix("_recipe")]
        else:
            given[name] = {list: [], int: 2, str: "0", bool: False}[kind.annotation]
    return given


@pytest.mark.parametrize(
    ("component", "lost"), CASES, ids=lambda value: getattr(value, "name", value)
)
@pytest.mark.parametrize("empty", [True, False], ids=["an empty folder", "no folder"])
def test_a_step_says_which_input_is_gone_and_what_helps(
    component: BaseComponent,
    lost: str,
    empty: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    uri = "s3://bucket/gone"  # whose folder, /s3/bucket/gone, is not there
    if empty:
        (tmp_path / "empty").mkdir()
        uri = str(tmp_path / "empty")
    with pytest.raises(SystemExit) as end:
        component.python_func(**arguments(component, lost, tmp_path, uri))
    assert end.value.code == 1
    message = str(read_error(tmp_path))
    assert message.startswith(f"input {lost}: nothing is left at {uri}; KFP's cache still names it")
    assert "another where_code_version" in message
