"""The first step of a run, as KFP's form starts it: the component with the form's values."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from components.training.check_recipe.component import check_recipe
from flagscale.errors import UserError
from flagscale.execution.notes import FOLDER_VARIABLE, read_error
from flagscale.recipe import Recipe, load_recipe
from pipelines.cluster.package import make_package
from pipelines.cluster.run_parameters import read_parameters
from pipelines.form import made
from pipelines.platform import Platform, load_platform


class Door:
    """A compiled pipeline, and the two ways to a run of it: the form and `submit`."""

    def __init__(self, recipe: Recipe, platform: Platform, folder: Path) -> None:
        self._recipe, self._platform = recipe, platform
        package = make_package(recipe, platform, folder)
        self.definitions = package.definitions
        tasks = package.specification["root"]["dag"]["tasks"]
        given = tasks["check-recipe"]["inputs"]["parameters"]
        self.made = given["made"]["runtimeValue"]["constant"]

    def form(self, values: dict[str, Any]) -> dict[str, Any]:
        """All arguments of the component: the form sends its defaults as well."""
        defaults = {n: d["defaultValue"] for n, d in self.definitions.items()}
        return {"made": self.made, **defaults, **values}

    def submit(self, values: dict[str, Any]) -> None:
        texts = {n: v if isinstance(v, str) else json.dumps(v) for n, v in values.items()}
        given = [f"{name}={text}" for name, text in texts.items()]
        read_parameters(given, self.definitions, self._recipe, self._platform)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Door:
    recipe = load_recipe("recipes/tiny.yaml")
    return Door(recipe, load_platform("gke-h100"), tmp_path_factory.mktemp("single"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Door:
    recipe = load_recipe("recipes/tiny-sweep.yaml", ["resources.accelerator_count=1"])
    return Door(recipe, load_platform("gke-h100"), tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Door:
    small = ["training.micro_batch_size=1", "training.global_batch_size=8"]
    recipe = load_recipe(
        "recipes/tiny.yaml", ["resources={nodes: 2, accelerator_count: 4}", *small]
    )
    return Door(recipe, load_platform("gke-h100"), tmp_path_factory.mktemp("nodes"))


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


TEACHER = {"source": "org/model"}
TRAINING = {"train_iters": 9, "lr": 1e-3}
VARIANT = {"student": {"num_layers": 1}, "distillation": {}, "training": TRAINING}
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("single", {"distillation_temperature": "-1"}),
    ("single", {"distillation": {"temperature": -1}}),
    ("single", {"distillation_temperature": "2", "distillation": {"temperature": 3}}),
    ("single", {"training": {**TRAINING, "train_itres": 10}}),
    ("single", {"training": {"lr": 1e-3}}),
    ("single", {"training_lr": "fast"}),
    ("single", {"training_global_batch_size": "7"}),
    ("single", {"training": {**TRAINING, "parallelism": {"tensor_model_parallel_size": 3}}}),
    ("single", {"student_num_layers": "2", "student": {"init": "same"}}),
    ("single", {"data_max_documents": "none"}),
    ("single", {"data_max_documents": "5", "data": {"blend": [{"name": "a", "source": "a"}]}}),
    ("single", {"teacher": {**TEACHER, "source": "https://me:planted@example.com/model"}}),
    ("single", {"export": {"format": "megatron", "dtype": "bfloat16"}}),
    ("single", {"evaluation": {"max_document": 5}}),
    ("single", {"tracking_experiment": "https://me:planted@mlflow.example.com"}),
    ("single", {"training_checkpoints": "/tmp/mine"}),
    ("single", {"training_checkpoints": "s3://me:planted@bucket/x"}),
    ("single", {"where_training_accelerator_count": "3"}),
    ("single", {"where_training_accelerator_count": "many"}),
    ("single", {"where_training_tolerations": [{"kye": "gpu"}]}),
    ("single", {"where_models_tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}),
    ("single", {"where_models_node_selector": {"pool": 1}}),
    ("single", {"where_data_image": "Not An Image"}),
    ("single", {"where_volume_claim": "my.claim"}),
    ("single", {"where_mlflow_secret": "My_Secret"}),
    ("nodes", {"training_checkpoints": "s3://bucket/x"}),
    ("nodes", {"training_global_batch_size": "12"}),
    ("sweep", {"sweep_metric": "loss"}),
    ("sweep", {"sweep_variants": []}),
    ("sweep", {"sweep_variants": [{"name": "a"}]}),
    ("sweep", {"sweep_variants": [{"name": "a", **VARIANT}, {"name": "b", **VARIANT}]}),
    ("sweep", {"sweep_variants": [{"name": "a", **VARIANT, "student": {"init": "prun"}}]}),
    ("sweep", {"data": {"seq_length": 1}}),
]


@pytest.mark.parametrize(("door", "values"), MISTAKES)
def test_a_mistake_in_the_form_is_told_in_submits_words(
    door: str, values: dict[str, Any], notes: Path, request: pytest.FixtureRequest
) -> None:
    pipeline: Door = request.getfixturevalue(door)
    with pytest.raises(UserError) as told:
        pipeline.submit(values)
    with pytest.raises(SystemExit) as end:
        check_recipe.python_func(**pipeline.form(values))
    assert end.value.code == 1
    assert read_error(notes) == str(told.value)
    assert "planted" not in str(told.value)


@pytest.mark.parametrize("door", ["single", "nodes", "sweep"])
def test_what_is_right_comes_out_by_the_parameters_names(
    door: str, request: pytest.FixtureRequest
) -> None:
    pipeline: Door = request.getfixturevalue(door)
    outputs = check_recipe.pipeline_spec.components["comp-check-recipe"].output_definitions
    returned = check_recipe.python_func(**pipeline.form({"data_max_documents": "7"}))
    names = inspect.signature(check_recipe.python_func).return_annotation._fields
    assert set(names) == set(outputs.parameters)
    found = dict(zip(names, returned, strict=True))
    assert found["data"]["max_documents"] == 7
    for name, value in found.items():
        default = pipeline.definitions.get(name, {}).get("defaultValue")
        assert value == (default or type(value)()) or name == "data"


def test_the_component_has_an_input_for_every_parameter_that_a_pipeline_can_have(
    single: Door, sweep: Door, nodes: Door
) -> None:
    """Else it could not be checked: KFP refuses an argument that a component has not."""
    inputs = set(inspect.signature(check_recipe.python_func).parameters)
    others = {"search_candidates", "search_metric", "promote"}  # and what all pipelines have
    assert inputs == {"made", *single.definitions, *sweep.definitions, *nodes.definitions} | others


def test_it_needs_nothing_heavy(single: Door, notes: Path) -> None:
    code = (
        "import json, sys\n"
        "from components.training.check_recipe.component import check_recipe\n"
        "check_recipe.python_func(**json.load(sys.stdin))\n"
        "heavy = {'torch', 'transformers', 'megatron', 'mlflow', 'modelopt'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code]
    subprocess.run(command, input=json.dumps(single.form({})), text=True, check=True)


def test_what_the_pipeline_was_made_with_is_its_own_recipes() -> None:
    """`made` has all that a platform and a recipe fix, and no sweep's variants: they are large."""
    recipe = load_recipe("recipes/tiny-sweep.yaml", ["training.micro_batch_size=1"])
    facts = made(recipe, load_platform("on-prem-a100"), ["data"])
    assert "sweep" not in facts.recipe
    assert facts.platform is not None
    assert facts.platform.mount_path == "/mnt/flagscale"
    assert facts.platform.accelerator_counts.keys() == {"models", "training"}
