"""What a pipeline says of its tasks, as KFP's compiler writes it."""

from typing import Any

import pytest
import yaml

from pipelines.cluster.definition import Definition
from pipelines.cluster.steps import read_steps
from tests.pipelines.cluster.argo_nodes import tasks
from tests.pipelines.cluster.kfp_runs import read_tasks

LOOP = ("for-loop-1",)
IN_THE_LOOP = (*LOOP, "iteration-iterations(1:1)", "iteration-item")


def compiled(name: str) -> dict[str, Any]:
    with open(f"pipelines/compiled/{name}.yaml", encoding="utf-8") as file:
        return next(iter(yaml.load_all(file, yaml.CSafeLoader)))


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return compiled("tiny-sweep-gke-h100")


def test_attempts_of_a_compiled_pipelines_tasks(spec: dict[str, Any]) -> None:
    definition = Definition(spec)
    assert definition.most_attempts(["prepare-data"]) == 3
    assert definition.most_attempts([*IN_THE_LOOP, "distil-student"]) == 6
    assert definition.most_attempts(["distil-student"]) is None
    assert Definition().most_attempts(["prepare-data"]) is None


def test_what_holds_tasks(spec: dict[str, Any]) -> None:
    definition = Definition(spec)
    assert definition.holds_tasks(LOOP) is True
    assert definition.holds_tasks([*IN_THE_LOOP, "distil-student"]) is False
    assert definition.holds_tasks(["unknown"]) is None


def test_a_volume_is_made_without_a_pod() -> None:
    """KFP skips the pod then, as it does where a step is cached."""
    definition = Definition(compiled("smollm2-135m-to-22-layers-on-prem-a100"))
    assert not definition.has_pod(["createpvc"])
    assert definition.has_pod(["prepare-data"])
    details = read_tasks(tasks(createpvc="CACHED", prepare_data="CACHED"))
    steps = read_steps(details, definition)
    assert [(s.label, s.state) for s in steps] == [
        ("createpvc", "SUCCEEDED"),
        ("prepare-data", "CACHED"),
    ]


def test_items_of_a_loop(spec: dict[str, Any]) -> None:
    assert Definition(spec).item(LOOP, 1) == "num_layers=2 temperature=2.0"
    name = "sweep_variants"
    of_run = Definition(spec, {name: [{"name": "a"}, {"name": "b"}]})
    assert of_run.item(LOOP, 1) == "b"
    # What has no name has its number.
    assert of_run.item(LOOP, 2) == "3"
    assert Definition(spec, {name: [{}]}).item(LOOP, 0) == "1"
    assert Definition(spec, {name: "no list"}).item(LOOP, 0) == "1"
    assert Definition().item(LOOP, 0) == "1"


def test_items_that_stand_in_the_loop_itself() -> None:
    loop = {"componentRef": {"name": "c"}, "parameterIterator": {"items": {"raw": "[0.5, 1]"}}}
    spec = {"root": {"dag": {"tasks": {"for-loop-1": loop}}}, "components": {"c": {"dag": {}}}}
    assert [Definition(spec).item(LOOP, index) for index in (0, 1)] == ["0.5", "1"]
