"""What the first step makes of a run's values reaches the steps after it, on this machine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from flagscale.recipe import load_recipe
from pipelines import form
from pipelines.local.step_cache import kfp_local
from pipelines.parameters import make_pipeline
from pipelines.placement import Placement
from pipelines.wiring import check


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def read_text(data_recipe: dict) -> str:
    return str(data_recipe["max_documents"])


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def train(distillation_recipe: dict) -> str:
    return str(distillation_recipe["temperature"])


class Seen:
    """Notes which steps begin and which are reused."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def started(self, name: str) -> None:
        self.told.append(name)

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        self.told.append(f"{name} reused")

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        assert gave_values


@pytest.fixture(scope="module")
def pipeline() -> BaseComponent:
    recipe = load_recipe("recipes/tiny.yaml")
    parameters = form.parameters(recipe, None, "1")
    made = form.made(recipe, None, [parameter.name for parameter in parameters])

    def wire(values: Mapping[str, Any]) -> None:
        checked = check(values, Placement(None, recipe, values), made)
        read_text(data_recipe=checked["data"])
        train(distillation_recipe=checked["distillation"])

    return make_pipeline("checked", "Checked", "A check and what waits for it.", parameters, wire)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def run(pipeline: BaseComponent, runs: Path, **values: Any) -> list[str]:
    seen = Seen()
    with kfp_local(runs / "artifacts", runs / "cache", seen, reuse=True):
        pipeline(**values)
    return sorted(seen.told)  # KFP runs what does not depend on each other in any order


def test_a_single_field_changes_the_steps_of_its_section_alone(
    pipeline: BaseComponent, runs: Path
) -> None:
    assert run(pipeline, runs) == ["check-recipe", "read-text", "train"]
    warmer = run(pipeline, runs, distillation_temperature="2")
    assert warmer == ["check-recipe", "read-text reused", "train"]
    whole = form.made(load_recipe("recipes/tiny.yaml"), None, []).recipe["distillation"]
    again = run(pipeline, runs, distillation={**whole, "temperature": 2})
    assert again == ["check-recipe", "read-text reused", "train reused"]  # the same, said otherwise
    assert run(pipeline, runs, distillation_temperature="2")[0] == "check-recipe reused"


def test_after_a_mistake_nothing_begins(pipeline: BaseComponent, runs: Path) -> None:
    seen = Seen()
    with (
        kfp_local(runs / "artifacts", runs / "cache", seen, reuse=True),
        pytest.raises(RuntimeError, match="check-recipe"),
    ):
        pipeline(distillation_temperature="-1")
    assert seen.told == ["check-recipe"]
