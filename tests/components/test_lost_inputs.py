"""Cached artifacts whose objects are gone: KFP's launcher downloads nothing, without a word."""

from pathlib import Path

import pytest
from kfp.dsl.base_component import BaseComponent

from components.__main__ import all_components
from components.testing import arguments, error_of

CASES = [
    (component, name)
    for component in all_components().values()
    for name in sorted(
        component.pipeline_spec.components[f"comp-{component.name}"].input_definitions.artifacts
    )
    if not name.endswith("_metrics")  # a file; what record-run does without has tests of its own
]


@pytest.mark.parametrize(
    ("component", "lost"), CASES, ids=lambda value: getattr(value, "name", value)
)
@pytest.mark.parametrize("empty", [True, False], ids=["an empty folder", "no folder"])
def test_a_step_says_which_input_is_gone_and_what_helps(
    component: BaseComponent, lost: str, empty: bool, tmp_path: Path
) -> None:
    uri = "s3://bucket/gone"  # whose folder, /s3/bucket/gone, is not there
    if empty:
        (tmp_path / "empty").mkdir()
        uri = str(tmp_path / "empty")
    message = error_of(component, arguments(component, tmp_path, **{lost: uri}), tmp_path)
    assert message.startswith(f"input {lost}: nothing is left at {uri}; KFP's cache still names it")
    assert "another where_code_version" in message
