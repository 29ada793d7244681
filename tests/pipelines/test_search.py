"""The search as a pipeline: what a cluster is given."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from references import unresolved

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from flagscale.run_values import MEASURED, check_run
from pipelines import form
from pipelines.compiling import LOADER, compile_recipe
from pipelines.platform import load_platform
from pipelines.search import build_search

ROOT = Path(__file__).parents[2]
PLATFORMS = ("gke-h100", "on-prem-a100")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    small = ["training.micro_batch_size=1"]  # eight ranks share the batch on gke-h100
    return load_recipe(ROOT / "recipes" / "tiny-search.yaml", small)


@pytest.fixture(scope="module")
def compiled(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compiled")
    found = {}
    for name in PLATFORMS:
        output = compile_recipe(recipe, load_platform(name), folder / f"{name}.yaml")
        found[name] = tuple(yaml.load_all(output.read_text(), LOADER))
    return found


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_cluster_would_take_it_and_every_reference_leads_somewhere(
    compiled: dict[str, Any], name: str
) -> None:
    spec, platform = compiled[name]
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert unresolved(spec, platform) == []


def test_rungs_are_loops_over_as_many_slots_as_the_recipe_leaves(compiled: dict[str, Any]) -> None:
    spec = compiled["gke-h100"][0]
    tasks = spec["root"]["dag"]["tasks"]
    loops = [task for task in tasks.values() if "parameterIterator" in task]
    assert [loop["taskInfo"]["name"] for loop in loops] == ["rung 1", "rung 2", "rung 3"]
    assert all(loop["iteratorPolicy"] == {"parallelismLimit": 2} for loop in loops)
    items = loops[0]["parameterIterator"]["items"]["inputParameter"]
    checked = {"producerTask": "check-recipe", "outputParameterKey": "search_candidates"}
    assert loops[0]["inputs"]["parameters"][items] == {"taskOutputParameter": checked}
    slots = [len(yaml.safe_load(loop["parameterIterator"]["items"]["raw"])) for loop in loops[1:]]
    assert slots == [3, 2]
    bodies = [
        sorted(spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"]) for loop in loops
    ]
    assert bodies[0] == ["convert-student", "distil-student"]
    assert bodies[1:] == [
        ["distil-student-2", "pick-candidate"],
        ["distil-student-3", "pick-candidate-2"],
    ]


def test_layers_are_measured_once_for_all_candidates(compiled: dict[str, Any]) -> None:
    spec = compiled["gke-h100"][0]
    tasks = spec["root"]["dag"]["tasks"]
    asked = tasks["measure-layers"]["inputs"]["parameters"]["students"]
    checked = {"producerTask": "check-recipe", "outputParameterKey": "measured"}
    assert asked == {"taskOutputParameter": checked}
    (loop,) = (task for task in tasks.values() if task["taskInfo"]["name"] == "rung 1")
    body = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"]["convert-student"]
    given = body["inputs"]["artifacts"]["layer_importance"]["componentInputArtifact"]
    made = loop["inputs"]["artifacts"][given]["taskOutputArtifact"]
    assert made["producerTask"] == "measure-layers"


def test_each_ranking_knows_the_one_before_and_how_many_go_on(compiled: dict[str, Any]) -> None:
    tasks = compiled["gke-h100"][0]["root"]["dag"]["tasks"]
    names = ["rank-candidates", "rank-candidates-2", "rank-candidates-3"]
    given = [tasks[n]["inputs"]["parameters"]["ranking_recipe"] for n in names]
    slots = [one["runtimeValue"]["constant"]["slots"] for one in given]
    assert slots == [3.0, 2.0, 1.0]
    assert "before" not in tasks[names[0]]["inputs"]["artifacts"]
    for earlier, later in pairwise(names):
        before = tasks[later]["inputs"]["artifacts"]["before"]["taskOutputArtifact"]
        assert before["producerTask"] == earlier
    assert {"evaluate", "export-student", "record-many"} <= set(tasks)


def test_only_steps_of_one_of_many_record_their_failures(compiled: dict[str, Any]) -> None:
    spec = compiled["gke-h100"][0]
    bodies = {
        name: task
        for component in (spec["root"], *spec["components"].values())
        for name, task in component.get("dag", {}).get("tasks", {}).items()
    }
    records = {}
    for name, task in bodies.items():
        given = task.get("inputs", {}).get("parameters", {})
        if "record_failure" in given:
            records[name] = given["record_failure"]["runtimeValue"]["constant"]
        if "of_many" in given:
            of_many = given["of_many"]["runtimeValue"]["constant"]
            records[name] = of_many.get("record_failure", False)
    assert records == {
        "measure-layers": True,
        "convert-student": True,
        "distil-student": True,
        "distil-student-2": True,
        "distil-student-3": True,
        "distil-student-4": False,
        "evaluate": False,
    }


def test_trainings_that_could_not_go_on_are_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="by checkpoints that outlive their pods"):
        build_search(recipe, load_platform("cpu-only"), "")


def test_a_run_may_change_candidates_but_not_have_more(recipe: Recipe) -> None:
    pipeline = build_search(recipe, None, "")
    names = list(pipeline.pipeline_spec.root.input_definitions.parameters)
    made = form.made(recipe, None, names)
    values = {p.name: p.default for p in form.parameters(recipe, None, "code")}
    candidates = [{"name": one.name, "student": one.sections["student"]} for one in recipe.variants]
    values |= {"search_candidates": candidates, "search_metric": "lm_loss"}
    checked = check_run(made, values)
    assert [one["name"] for one in checked["search_candidates"]] == [c["name"] for c in candidates]
    assert [one["layer_importance"] for one in checked[MEASURED]] == ["kl", "block_influence"]
    fewer = check_run(made, values | {"search_candidates": candidates[:2]})
    assert len(fewer["search_candidates"]) == 2
    assert [one["layer_importance"] for one in fewer[MEASURED]] == ["kl"]
    more = [*candidates, {"name": "more", "student": {"num_layers": 3}}]
    for change, message in (
        ({"search_candidates": more}, "has 7 candidates, and the pipeline was made for 6"),
        ({"training_train_iters": "16"}, "ends after steps=16, but training.train_iters=16"),
        ({"search_metric": "kl"}, "search_metric=kl: must be one of distillation_loss, lm_loss"),
        ({"search_candidates": [{"name": "x"}]}, "must be a mapping of name, student"),
    ):
        with pytest.raises(UserError, match=message):
            check_run(made, values | change)
