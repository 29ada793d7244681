"""The gate in the pipelines: after the export, before the last step, never from the cache."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from references import unresolved

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines.cluster.run_parameters import read_parameters
from pipelines.compiling import LOADER, compile_recipe
from pipelines.distillation import build_pipeline
from pipelines.local.step_cache import StepCache
from pipelines.platform import load_platform

ROOT = Path(__file__).parents[2]
ASKS = "distilled/accuracy >= 0.9 * teacher/accuracy at 95%"


def asking(name: str) -> Recipe:
    overrides = ["training.micro_batch_size=1", f"promote.conditions=['{ASKS}']"]
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)


@pytest.mark.parametrize(
    ("name", "exporter", "evaluator"),
    [
        ("tiny", "export-student", "evaluate"),
        ("tiny-sweep", "export-winner", "export-winner"),
        ("tiny-search", "export-student", "evaluate"),
    ],
)
def test_it_judges_the_student_that_was_exported(
    name: str, exporter: str, evaluator: str, tmp_path: Path
) -> None:
    output = compile_recipe(asking(name), load_platform("on-prem-a100"), tmp_path / "p.yaml")
    spec, platform = yaml.load_all(output.read_text(), LOADER)
    assert unresolved(spec, platform) == []
    tasks = spec["root"]["dag"]["tasks"]
    task = tasks["promote"]
    made: dict[str, Any] = task["inputs"]["artifacts"]
    producers = {k: v["taskOutputArtifact"]["producerTask"] for k, v in made.items()}
    assert producers == {
        "evaluation": evaluator,
        "exported_student": exporter,
        "export_metrics": exporter,
    }
    assert task["cachingOptions"] == {}
    given = task["inputs"]["parameters"]["promote_recipe"]["taskOutputParameter"]
    assert given == {"outputParameterKey": "promote", "producerTask": "check-recipe"}
    (last,) = (task for key, task in tasks.items() if key.startswith("record-"))
    assert "promote" in last["dependentTasks"]
    outputs = spec["components"]["comp-promote"]["outputDefinitions"]["parameters"]
    assert outputs == {"promoted": {"parameterType": "BOOLEAN"}}
    defaults = spec["root"]["inputDefinitions"]["parameters"]["promote"]["defaultValue"]
    assert defaults["conditions"] == [ASKS]


def test_without_the_section_there_is_no_step_and_no_parameter() -> None:
    spec = build_pipeline(load_recipe(ROOT / "recipes" / "tiny.yaml")).pipeline_spec
    assert "promote" not in spec.root.dag.tasks
    assert "promote" not in spec.root.input_definitions.parameters


def test_a_run_may_ask_something_else(tmp_path: Path) -> None:
    recipe, platform = asking("tiny"), load_platform("on-prem-a100")
    output = compile_recipe(recipe, platform, tmp_path / "p.yaml")
    definitions = next(yaml.load_all(output.read_text(), LOADER))["root"]["inputDefinitions"]
    given = "promote.conditions=['{} <= 2 at 90%']"
    found = read_parameters(
        [given.format("distilled/kl")], definitions["parameters"], recipe, platform
    )
    assert found.sent["promote"]["conditions"] == ["distilled/kl <= 2 at 90%"]
    with pytest.raises(UserError, match="for what is shipped say distilled/kl"):
        read_parameters([given.format("student/kl")], definitions["parameters"], recipe, platform)


class Told:
    def __init__(self) -> None:
        self.steps: list[str] = []

    def started(self, name: str) -> None:
        self.steps.append(f"{name} started")

    def reused(self, name: str, outputs: object) -> None:
        self.steps.append(f"{name} reused")

    def finished(self, name: str, outputs: object, gave_values: bool) -> None:
        self.steps.append(f"{name} finished")


def test_this_machines_cache_does_not_serve_it(tmp_path: Path) -> None:
    told = Told()
    cache = StepCache(str(tmp_path), told, reuse=True)
    for step in ("comp-leaderboard", "comp-promote"):
        key = cache.compute_key(step, "image", [], {})
        cache.put(key, {"promoted": True})
        cache.get(key)
    assert told.steps == [
        "leaderboard finished",
        "leaderboard reused",
        "promote finished",
        "promote started",
    ]
