from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components.image import VERSION, image
from flagscale.errors import UserError
from flagscale.recipe import Recipe, TasksRecipe, load_recipe
from flagscale.run_values import SECTIONS
from pipelines import golden
from pipelines.__main__ import main
from pipelines.compiling import LOADER, compile_recipe
from pipelines.distillation import build_pipeline, source_version
from pipelines.platform import Platform, load_platform

ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "recipes" / "smollm2-135m-to-22-layers.yaml"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(DEFAULT)


@pytest.fixture(autouse=True)
def own_image(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLAGSCALE_REGISTRY", "FLAGSCALE_CPU_IMAGE", "FLAGSCALE_GPU_IMAGE"):
        monkeypatch.delenv(name, raising=False)


def compiled(recipe: Recipe, folder: Path) -> dict[str, Any]:
    path = compile_recipe(recipe, load_platform("gke-h100"), folder / "p.yaml")
    return next(yaml.load_all(path.read_text(), LOADER))


def test_what_is_compiled_in_the_repository_is_current(tmp_path: Path) -> None:
    fresh = {path.name: path.read_text() for path in golden.write(tmp_path)}
    kept = {path.name: path.read_text() for path in golden.FOLDER.glob("*.yaml")}
    assert set(fresh) == set(kept), "run: make docs"
    for name, text in fresh.items():
        assert text == kept[name], f"{name}: run: make docs"


def test_the_recipes_values_are_the_defaults(recipe: Recipe, tmp_path: Path) -> None:
    spec = compiled(recipe, tmp_path)
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    whole = recipe.model_dump(mode="json", exclude_none=True)
    for section in (name for name in SECTIONS if getattr(recipe, name) is not None):
        assert inputs[section]["defaultValue"] == whole[section]
        kind = type(getattr(recipe, section))
        assert kind.model_validate(inputs[section]["defaultValue"]) == getattr(recipe, section)
    assert inputs["where_code_version"]["defaultValue"] == "flagscale-distillation 0.1.0"


def test_each_step_sees_only_what_it_depends_on(recipe: Recipe, tmp_path: Path) -> None:
    asks = recipe.model_copy(update={"tasks": TasksRecipe(names=("heldout_cloze",))})
    spec = compiled(asks, tmp_path)
    tasks = spec["root"]["dag"]["tasks"]
    sections = {
        name: {key for key in task["inputs"]["parameters"] if key.endswith("_recipe")}
        for name, task in tasks.items()
    }
    assert sections == {
        "check-recipe": set(),
        "prepare-data": {"data_recipe"},
        "prepare-teacher": {"models_recipe", "teacher_recipe"},
        "convert-student": {"models_recipe", "student_recipe"},
        "distil-student": {"distillation_recipe", "training_recipe"},
        "evaluate": {"models_recipe", "evaluation_recipe"},
        "export-student": {"models_recipe", "export_recipe"},
        "evaluate-tasks": {"models_recipe", "tasks_recipe"},
        "record-run": set(),
    }
    depends = {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()}
    assert depends.pop("record-run") == set(tasks) - {"check-recipe", "record-run"}  # the very last
    assert tasks["record-run"]["cachingOptions"] == {}
    assert depends.pop("check-recipe") == set()
    assert all("check-recipe" in before for before in depends.values())
    assert depends["prepare-data"] == {"check-recipe"}
    before_training = {"check-recipe", "prepare-data", "prepare-teacher", "convert-student"}
    assert depends["distil-student"] == before_training
    assert depends["export-student"] == {"check-recipe", "distil-student", "evaluate"}
    for name in depends:
        given = tasks[name]["inputs"]["parameters"]
        assert given["code_version"] == {"componentInputParameter": "where_code_version"}
        for section in sections[name]:
            key = section.removesuffix("_recipe")
            output = {"outputParameterKey": key, "producerTask": "check-recipe"}
            assert given[section] == {"taskOutputParameter": output}
    # A change of whatever it is given makes the check anew; the others' keys hold what comes of it.
    checked = set(tasks["check-recipe"]["inputs"]["parameters"])
    assert checked > set(spec["root"]["inputDefinitions"]["parameters"])
    assert tasks["distil-student"]["taskInfo"]["name"] == "Distil student"


def test_the_runner_of_this_machine_records_the_run_itself(recipe: Recipe) -> None:
    assert "record-run" not in build_pipeline(recipe).pipeline_spec.root.dag.tasks


def test_local_runs_see_the_code_and_compiled_ones_the_release(recipe: Recipe) -> None:
    assert source_version().startswith("sources ")
    assert source_version() == source_version()
    inputs = build_pipeline(
        recipe, code_version="x"
    ).pipeline_spec.root.input_definitions.parameters
    assert inputs["where_code_version"].default_value.string_value == "x"


def test_the_command_compiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "p.yaml"
    overrides = ["--set", "distillation.temperature=3"]
    assert main(["compile", str(DEFAULT), "-o", str(output), *overrides]) == 0
    assert capsys.readouterr().out.endswith(f"\nwrote {output}\n")
    spec = next(yaml.load_all(output.read_text(), LOADER))
    inputs = spec["root"]["inputDefinitions"]["parameters"]
    assert inputs["distillation"]["defaultValue"]["temperature"] == 3


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(tmp_path / "none.yaml")]) == 2
    assert "error: recipe" in capsys.readouterr().err
    assert main(["run", str(DEFAULT), "--set", "training.lrr=1"]) == 2
    assert "did you mean 'lr'?" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"must end in \.yaml"):
        compile_recipe(load_recipe(DEFAULT), Platform(), tmp_path / "p.json")
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    assert "--set distillation.temperature=2" in capsys.readouterr().out


def test_the_command_writes_kubernetes_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "objects.yaml"
    command = ["compile", str(DEFAULT), "--format", "kubernetes", "--namespace", "ml"]
    assert main([*command, "-o", str(output)]) == 0
    assert "kubectl apply -f" in capsys.readouterr().out
    pipeline, version = yaml.load_all(output.read_text(), LOADER)
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert pipeline["metadata"] == {
        "name": "distillation-smollm2-135m-to-22-layers",
        "namespace": "ml",
    }
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    json_format.ParseDict(version["spec"]["pipelineSpec"], pipeline_spec_pb2.PipelineSpec())
    assert set(version["spec"]["platformSpec"]["platforms"]) == {"kubernetes"}
    assert main([*command, "-o", str(output), "--set", "distillation.temperature=2"]) == 0
    _, other = yaml.load_all(output.read_text(), LOADER)
    assert other["metadata"]["name"] != version["metadata"]["name"]


def test_a_namespace_that_would_be_ignored_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", str(DEFAULT), "--namespace", "ml"]) == 2
    assert "--namespace ml: only --format kubernetes" in capsys.readouterr().err
    assert main(["compile", str(DEFAULT), "--format", "kubernetes", "--namespace", "My_NS"]) == 2
    assert "--namespace My_NS: must be" in capsys.readouterr().err


def test_images_are_named_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert image(1) == f"flagscale-distillation:{VERSION}-gpu"
    monkeypatch.setenv("FLAGSCALE_REGISTRY", "registry.example/ml/")
    assert image() == f"registry.example/ml/flagscale-distillation:{VERSION}-cpu"
    monkeypatch.setenv("FLAGSCALE_GPU_IMAGE", "other@sha256:1")
    assert image(8) == "other@sha256:1"
    monkeypatch.setenv("FLAGSCALE_GPU_IMAGE", "")
    assert image(8) == f"registry.example/ml/flagscale-distillation:{VERSION}-gpu"


@pytest.mark.parametrize("form", ["ir", "kubernetes"])
@pytest.mark.parametrize("output", ["/proc/p.yaml", "file.yaml/p.yaml", "folder.yaml"])
def test_an_output_that_cannot_be_written(
    output: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.yaml").touch()
    (tmp_path / "folder.yaml").mkdir()
    path = tmp_path / output
    assert main(["compile", str(DEFAULT), "--format", form, "-o", str(path)]) == 2
    assert f"error: output {path}: cannot be written (" in capsys.readouterr().err
