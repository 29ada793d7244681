"""The sweep as a pipeline: what a cluster is given, and what this machine does with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec import pipeline_spec_pb2
from references import unresolved

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines.compiling import LOADER, compile_recipe
from pipelines.golden import COMPILED, FOLDER
from pipelines.platform import load_platform
from pipelines.sweep import build_sweep

ROOT = Path(__file__).parents[2]
PLATFORMS = ("cpu-only", "gke-h100", "on-prem-a100")
Compiled = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    small = ["training.micro_batch_size=1"]  # eight ranks share the batch on gke-h100
    return load_recipe(ROOT / "recipes" / "tiny-sweep.yaml", small)


@pytest.fixture(scope="module")
def compiled(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Compiled]:
    folder = tmp_path_factory.mktemp("compiled")
    found = {}
    for name in PLATFORMS:
        output = compile_recipe(recipe, load_platform(name), folder / f"{name}.yaml")
        spec, platform = yaml.load_all(output.read_text(), LOADER)
        found[name] = (spec, platform)
    return found


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_cluster_would_take_it_strictly(compiled: dict[str, Compiled], name: str) -> None:
    spec, platform = compiled[name]
    parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    deployment = json_format.MessageToDict(parsed.deployment_spec)
    json_format.ParseDict(deployment, pipeline_spec_pb2.PipelineDeploymentConfig())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert set(executors) >= {"exec-distil-student", "exec-leaderboard", "exec-export-winner"}
    for executor in executors.values():
        json_format.ParseDict(executor, KubernetesExecutorConfig())


@pytest.mark.parametrize("name", PLATFORMS)
def test_every_reference_leads_somewhere(compiled: dict[str, Compiled], name: str) -> None:
    assert unresolved(*compiled[name]) == []


def test_every_reference_of_the_golden_files_leads_somewhere() -> None:
    files = [f"{recipe}-{p}.yaml" for recipe, platforms in COMPILED.items() for p in platforms]
    for file in files:
        spec, *platform = yaml.load_all((FOLDER / file).read_text(), LOADER)
        assert unresolved(spec, *platform) == [], file


def body_of(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["components"][spec["root"]["dag"]["tasks"]["for-loop-1"]["componentRef"]["name"]]


def test_a_reference_that_leads_nowhere_is_found(compiled: dict[str, Compiled]) -> None:
    """What KFP makes of an accelerator count that nobody registers, and other faults."""
    good, platform = compiled["gke-h100"]

    def broken(forget: str) -> list[str]:
        spec = copy.deepcopy(good)
        del body_of(spec)["inputDefinitions"]["parameters"][f"pipelinechannel--{forget}"]
        return unresolved(spec, platform)

    count, selector = (
        broken("where_training_accelerator_count"),
        broken("where_models_node_selector"),
    )
    assert any("distil-student: the DAG has no parameter" in problem for problem in count)
    assert len(selector) == 2  # convert-student and evaluate
    spec = copy.deepcopy(good)
    del spec["root"]["dag"]["tasks"]["for-loop-1"]["inputs"]["parameters"][
        "pipelinechannel--tracking_experiment"
    ]
    assert unresolved(spec, platform) == [
        "root/for-loop-1: is not given its input pipelinechannel--tracking_experiment"
    ]
    spec = copy.deepcopy(good)
    del spec["root"]["dag"]["tasks"]["leaderboard"]["inputs"]["parameters"][
        "pipelinechannel--where_data_image"
    ]
    assert any(
        "asks for pipelinechannel--where_data_image" in x for x in unresolved(spec, platform)
    )
    settings = copy.deepcopy(platform)
    executors = settings["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    selector = executors["exec-evaluate"]["nodeSelector"]["nodeSelectorJson"]
    selector["componentInputParameter"] = (
        "where_models_node_selector"  # the root's name, in the loop
    )
    assert len(unresolved(good, settings)) == 1


def test_data_and_teacher_are_made_once_students_in_a_bounded_loop(
    compiled: dict[str, Compiled], recipe: Recipe
) -> None:
    spec = compiled["gke-h100"][0]
    tasks = spec["root"]["dag"]["tasks"]
    assert set(tasks) == {
        "check-recipe",
        "prepare-data",
        "prepare-teacher",
        "for-loop-1",
        "leaderboard",
        "export-winner",
        "record-many",
    }
    loop = tasks["for-loop-1"]
    assert loop["iteratorPolicy"] == {"parallelismLimit": 2}
    assert set(body_of(spec)["dag"]["tasks"]) == {"convert-student", "distil-student", "evaluate"}
    for name in ("leaderboard", "export-winner"):
        results = tasks[name]["inputs"]["artifacts"]["evaluations"]["taskOutputArtifact"]
        assert results["producerTask"] == "for-loop-1"
    recorded = tasks["record-many"]
    assert recorded["cachingOptions"] == {}
    of_variants = {
        name: given["taskOutputArtifact"]["producerTask"]
        for name, given in recorded["inputs"]["artifacts"].items()
        if name in ("student_metrics", "training_metrics", "evaluation_metrics")
    }
    assert of_variants == dict.fromkeys(of_variants, "for-loop-1")
    assert len(of_variants) == 3
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    variants = inputs["sweep_variants"]["defaultValue"]
    assert [variant["name"] for variant in variants] == [v.name for v in recipe.variants]
    for values, variant in zip(variants, recipe.variants, strict=True):
        for section in ("student", "distillation", "training"):
            whole = getattr(variant.recipe, section)
            assert type(whole).model_validate(values[section]) == whole
    assert inputs["sweep_metric"]["defaultValue"] == "kl"
    assert inputs["sweep_metric"]["literals"] == ["kl", "lm_loss", "top1_agreement", "accuracy"]
    fixed = ("student", "distillation", "training")
    single = {name for name in inputs if name.startswith(fixed)} - {"training_checkpoints"}
    assert single == set()  # neither sections nor their single fields


def test_the_loop_is_over_the_checked_variants(compiled: dict[str, Compiled]) -> None:
    """So no student begins before the check, and each has the sections that it gives."""
    spec = compiled["gke-h100"][0]
    tasks = spec["root"]["dag"]["tasks"]
    checked = {"producerTask": "check-recipe", "outputParameterKey": "sweep_variants"}
    loop = tasks["for-loop-1"]
    items = loop["parameterIterator"]["items"]["inputParameter"]
    assert loop["inputs"]["parameters"][items] == {"taskOutputParameter": checked}
    ranked = tasks["leaderboard"]["inputs"]["parameters"]
    assert ranked["variants"] == {"taskOutputParameter": checked}
    assert set(tasks["record-many"]["dependentTasks"]) >= {"leaderboard", "export-winner"}
    between = {n: t for n, t in tasks.items() if n not in ("check-recipe", "record-many")}
    assert all("check-recipe" in task["dependentTasks"] for task in between.values())


def test_a_platform_that_cannot_hold_one_variant_is_refused(recipe: Recipe) -> None:
    values = recipe.model_dump(mode="json")
    values["resources"] = {}  # all accelerators of a node
    values["sweep"]["vary"] = {"training.global_batch_size": [8, 9]}
    with pytest.raises(UserError, match="global_batch_size=9 is not a multiple"):
        build_sweep(Recipe.model_validate(values), load_platform("gke-h100"), "")


def test_variants_that_no_pod_could_be_given_are_refused(recipe: Recipe) -> None:
    layers = [f"decoder.layers.{i}.self_attention.linear_proj" for i in range(40)]
    pairs = [[layer, layer] for layer in layers]
    values = recipe.model_dump(mode="json")
    values["distillation"]["intermediate_layer_pairs"] = pairs
    values["sweep"]["vary"] = {"training.seed": list(range(64))}
    with pytest.raises(UserError, match=r"sweep_variants: takes 3\d\d,\d+ characters"):
        build_sweep(Recipe.model_validate(values), None, "")


@pytest.mark.parametrize("name", ["gke-h100", "on-prem-a100"])
def test_a_sweep_of_trainings_on_several_nodes_resolves_too(
    recipe: Recipe, name: str, tmp_path: Path
) -> None:
    values = recipe.model_dump(mode="json")
    values["resources"] = {"nodes": 2, "accelerator_count": 2}
    several = Recipe.model_validate(values)
    output = compile_recipe(several, load_platform(name), tmp_path / "p.yaml")
    spec, platform = yaml.load_all(output.read_text(), LOADER)
    assert "distil-student-on-nodes" in body_of(spec)["dag"]["tasks"]
    assert unresolved(spec, platform) == []
