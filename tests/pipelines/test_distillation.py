from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec import pipeline_spec_pb2

from components.image import image
from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines.__main__ import main
from pipelines.compiling import compile_recipe
from pipelines.distillation import SECTIONS, build_pipeline, source_version

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "recipes" / "smollm2-135m-to-10-layers.yaml"
GOLDEN = ROOT / "pipelines" / "compiled" / "distillation.yaml"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(DEFAULT)


@pytest.fixture(autouse=True)
def own_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAGSCALE_IMAGE", raising=False)


def compiled(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(compile_recipe(recipe, folder / "p.yaml").read_text()))


def test_the_compiled_pipeline_is_current(recipe: Recipe, tmp_path: Path) -> None:
    fresh = compile_recipe(recipe, tmp_path / "p.yaml").read_text()
    assert fresh == GOLDEN.read_text(), f"run: python -m pipelines compile {DEFAULT.name}"


def test_a_cluster_would_take_it_strictly(recipe: Recipe, tmp_path: Path) -> None:
    gpus = recipe.resources.model_copy(update={"accelerator_count": 2})
    for candidate in (recipe, recipe.model_copy(update={"resources": gpus})):
        spec, *platforms = compiled(candidate, tmp_path)
        parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(
            json_format.MessageToDict(parsed.deployment_spec),
            pipeline_spec_pb2.PipelineDeploymentConfig(),
        )
        for platform in platforms:
            executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
            for executor in executors.values():
                json_format.ParseDict(executor, KubernetesExecutorConfig())


def test_the_recipes_values_are_the_defaults(recipe: Recipe, tmp_path: Path) -> None:
    spec = compiled(recipe, tmp_path)[0]
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    whole = recipe.model_dump(mode="json", exclude_none=True)
    for section in SECTIONS:
        assert inputs[section]["defaultValue"] == whole[section]
        kind = type(getattr(recipe, section))
        assert kind.model_validate(inputs[section]["defaultValue"]) == getattr(recipe, section)
    assert inputs["code_version"]["defaultValue"] == "flagscale-distillation 0.1.0"


def test_each_step_sees_only_what_it_depends_on(recipe: Recipe, tmp_path: Path) -> None:
    tasks = compiled(recipe, tmp_path)[0]["root"]["dag"]["tasks"]
    sections = {
        name: set(task["inputs"]["parameters"]) & set(SECTIONS) for name, task in tasks.items()
    }
    assert sections == {
        "prepare-data": {"data"},
        "prepare-teacher": {"teacher"},
        "convert-student": {"student"},
        "distil-student": {"distillation", "training"},
        "evaluate": {"evaluation"},
        "export-student": {"export"},
    }
    depends = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert depends["prepare-data"] == set()
    assert depends["distil-student"] == {"prepare-data", "prepare-teacher", "convert-student"}
    assert depends["export-student"] == {"distil-student", "evaluate"}
    assert all("code_version" in task["inputs"]["parameters"] for task in tasks.values())
    assert tasks["distil-student"]["taskInfo"]["name"] == "Distil student"


def test_resources_go_to_the_steps_that_run_models(recipe: Recipe, tmp_path: Path) -> None:
    resources = recipe.resources.model_copy(
        update={"accelerator_count": 8, "memory": "64G", "accelerator_type": "amd.com/gpu"}
    )
    spec = compiled(recipe.model_copy(update={"resources": resources}), tmp_path)[0]
    executors = spec["deploymentSpec"]["executors"]
    assert len(executors) == 6
    data = executors.pop("exec-prepare-data")["container"]
    assert data["image"] == image()
    assert "resources" not in data
    for executor in executors.values():
        container = executor["container"]
        assert container["image"] == image(accelerators=8)
        asked = container["resources"]
        assert asked["accelerator"]["resourceType"] == "amd.com/gpu"
        assert asked["accelerator"]["resourceCount"] == "8"
        assert asked["resourceMemoryLimit"] == asked["resourceMemoryRequest"] == "64G"


def test_local_runs_see_the_code_and_compiled_ones_the_release(recipe: Recipe) -> None:
    assert source_version().startswith("sources ")
    assert source_version() == source_version()
    inputs = build_pipeline(recipe, "x").pipeline_spec.root.input_definitions.parameters
    assert inputs["code_version"].default_value.string_value == "x"


def test_the_command_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "p.yaml"
    overrides = ["--set", "distillation.temperature=3"]
    assert main(["compile", str(DEFAULT), "-o", str(output), *overrides]) == 0
    assert capsys.readouterr().out == f"wrote {output}\n"
    spec = yaml.safe_load(output.read_text())
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert inputs["distillation"]["defaultValue"]["temperature"] == 3


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(tmp_path / "none.yaml")]) == 2
    assert "error: recipe" in capsys.readouterr().err
    assert main(["run", str(DEFAULT), "--set", "training.lrr=1"]) == 2
    assert "did you mean 'lr'?" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"must end in \.yaml"):
        compile_recipe(load_recipe(DEFAULT), tmp_path / "p.json")
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--set distillation.temperature=2" in capsys.readouterr().out
