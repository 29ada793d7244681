"""A run's parameters, against the definitions of a pipeline that was really compiled."""

import json
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines.cluster import run_parameters
from pipelines.cluster.package import Package, make_package
from pipelines.compiling import LOADER
from pipelines.platform import Platform, Trainer, load_platform
from tests.pipelines.cluster.kfp_api import check_inputs

GKE = load_platform("gke-h100")
ONE = GKE.model_copy(update={"trainer": Trainer(min_nodes=1)})
HERE = load_platform("cpu-only")


def read_parameters(
    given: list[str], definitions: dict[str, Any], recipe: Recipe, platform: Platform = GKE
) -> dict[str, Any]:
    return run_parameters.read_parameters(given, definitions, recipe, platform).sent


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("recipes/tiny.yaml")


@pytest.fixture(scope="module")
def package(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return make_package(recipe, GKE, tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="module")
def definitions(package: Package) -> dict[str, Any]:
    return package.definitions


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("resources.nodes=2", "--set resources.nodes=2"),
        ("xyzzy=2", "known: .*where_volume_claim"),
        ("where_training_accelerator_count=many", "must be a whole number, 0 or more"),
        ("where_training_accelerator_count=-1", "must be a whole number, 0 or more"),
        ("where_training_accelerator_count=8", "global_batch_size=8 is not a multiple"),
        ("where_training_accelerator_count=[1]", "must be a text, not a list"),
        ("where_models_node_selector=[a]", "must be a mapping, e.g. {key: value}, not a list"),
        ("where_models_node_selector={pool: 1}", "label pool must have a text, not 1"),
        ("where_models_tolerations={key: a}", "must be a list, e.g. .*, not a mapping"),
        ("where_models_tolerations=[{kye: a}]", "item 0: .*\n.*did you mean 'key'?"),
        (
            "where_models_node_selector={pool: a b}",
            "_selector: 'a b': String should match",
        ),
        ("where_models_tolerations=[{key: a, tolerationSeconds: 5}]", "only for effect=NoExecute"),
        ("where_models_image=", "where_models_image: is empty"),
        ("where_models_image=a b", "where_models_image: 'a b'"),
        ("training_checkpoints=", "training_checkpoints: is empty"),
        (
            "training_checkpoints=mine",
            "=mine: must be a folder below /mnt/flagscale, or a URL",
        ),
        ("where_models_node_selector={pool: a, pool: b}", "pool is given twice"),
        ("where_models_node_selector={pool: a b}", "e.g. h100$"),
        (
            "training_checkpoints=s3://key:planted@bucket",
            r"=s3://\*\*\*@bucket: holds cred",
        ),
        ("where_models_image=https://me:planted@registry/a", "holds credentials"),
        ("where_volume_claim=my.claim", "where_volume_claim: 'my.claim'"),
        ("where_mlflow_secret=My_Secret", "where_mlflow_secret: 'My_Secret'"),
        ("training=", "must be a mapping, .*, not nothing"),
        ("training=5", "must be a mapping, .*, not a number"),
        ("distillation.temprature=2", "did you mean 'temperature'?"),
        ("distillation={temperature: -1}", "distillation.temperature=-1"),
        ("training={lr: 1e-3}", "training.train_iters: required"),
        ("training.parallelism.tensor_model_parallel_size=3", "recipe with this run's"),
        ("training.lr.deep=3", "lr is a value, not a section"),
        ("distillation_temperature=-1", r"distillation\.temperature=-1"),
        ("distillation_loss=kl", r"distillation\.loss='kl': Input should be 'logits' or 'none'"),
        ("training_lr=[1]", "training_lr=.*: must be a text, not a list"),
        ("training_train_iters=many", r"training\.train_iters='many': Input should be a valid int"),
        ("training_global_batch_size=9", "global_batch_size=9 is not a multiple"),
        ("student_num_layers=0", r"student\.num_layers=0"),
        ("data_max_documents=1.5", r"data\.max_documents=1\.5"),
        ("lr", "must read name=value"),
        ("training.lr=[1", "not valid YAML"),
    ],
)
def test_mistakes_are_explained(
    recipe: Recipe, definitions: dict[str, Any], given: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_parameters([given], definitions, recipe)
    assert "planted" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ([], {}),
        (["training.lr=0.001"], {}),  # the default
        (["tracking_experiment=123"], {"tracking_experiment": "123"}),
        (["tracking_experiment='a: b'"], {"tracking_experiment": "a: b"}),
        (["tracking_experiment="], {"tracking_experiment": ""}),
        (["training_checkpoints=s3://bucket/a=b"], {"training_checkpoints": "s3://bucket/a=b"}),
        (["where_training_accelerator_count=2"], {"where_training_accelerator_count": "2"}),
        (["distillation_loss=none"], {"distillation_loss": "none"}),
        (["where_models_tolerations=[]"], {"where_models_tolerations": []}),
        (
            [
                "where_training_node_selector={a.b/c: d}",
                "tracking_experiment=x",
                "tracking_experiment=y",
            ],
            {"where_training_node_selector": {"a.b/c": "d"}, "tracking_experiment": "y"},
        ),
    ],
)
def test_values_are_those_of_the_pipelines_types(
    recipe: Recipe, package: Package, given: list[str], sent: dict[str, Any]
) -> None:
    values = read_parameters(given, package.definitions, recipe)
    assert values == sent
    check_inputs(package.specification, values)  # as the backend does


def test_checkpoints_of_several_nodes_are_checked_before_the_run(
    recipe: Recipe, definitions: dict[str, Any]
) -> None:
    nodes = recipe.resources.model_copy(update={"nodes": 2})
    several = recipe.model_copy(update={"resources": nodes})
    with pytest.raises(UserError, match="which all nodes of a TrainJob see"):
        read_parameters(["training_checkpoints=s3://b/x"], definitions, several)


def test_accelerators_where_there_were_none_need_another_image(
    recipe: Recipe, tmp_path: Path
) -> None:
    definitions = make_package(recipe, HERE, tmp_path).definitions
    with pytest.raises(UserError) as caught:
        read_parameters(["where_training_accelerator_count=1"], definitions, recipe, HERE)
    image = definitions["where_training_image"]["defaultValue"]
    assert "where_training_accelerator_count=1: these pods have none" in str(caught.value)
    assert f"{image} is for pods without; give another where_training_image too" in str(
        caught.value
    )
    given = ["where_models_accelerator_count=1", "where_training_image=gpu:1"]
    with pytest.raises(UserError, match=r"where_models_image=.* is for pods without"):
        read_parameters(given, definitions, recipe, HERE)
    given = [
        "where_training_accelerator_count=1",
        "where_training_image=gpu:1",
        "where_models_accelerator_count=0",
    ]
    assert read_parameters(given, definitions, recipe, HERE)["where_training_image"] == "gpu:1"


def test_parts_of_a_section_add_up(recipe: Recipe, definitions: dict[str, Any]) -> None:
    given = ["training.lr=3e-4", "training.train_iters=40", "distillation.temperature=2"]
    values = read_parameters(given, definitions, recipe)
    default = recipe.training.model_dump(mode="json", exclude_none=True)
    assert values["training"] == default | {"lr": 3e-4, "train_iters": 40}
    assert values["distillation"]["temperature"] == 2.0
    assert sorted(values) == ["distillation", "training"]


def test_another_teacher_brings_its_tokenizer(recipe: Recipe, definitions: dict[str, Any]) -> None:
    found = run_parameters.read_parameters(["teacher.source=org/other"], definitions, recipe, GKE)
    assert sorted(found.sent) == ["teacher"]
    (of_this_run,) = found.recipes
    assert of_this_run.teacher.source == of_this_run.data.tokenizer == "org/other"
    own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": "own"})})
    assert sorted(read_parameters(["teacher.source=org/other"], definitions, own)) == ["teacher"]


def test_a_tokenizer_that_would_be_replaced_is_refused(
    recipe: Recipe, definitions: dict[str, Any]
) -> None:
    """The pipeline's first step could not tell it from the default."""
    own = f"data.tokenizer={recipe.teacher.source}"
    with pytest.raises(UserError, match=r"follows the teacher to org/other; --set data\.tokenizer"):
        read_parameters(["teacher.source=org/other", own], definitions, recipe)
    assert read_parameters([own], definitions, recipe) == {}


def test_without_cache_nothing_nested_is_taken_from_it(package: Package, tmp_path: Path) -> None:
    import yaml

    spec, platforms = yaml.load_all(package.path.read_text(encoding="utf-8"), LOADER)
    inner = {"dag": {"tasks": {"inner": {"cachingOptions": {"enableCache": True}}}}}
    spec["components"]["comp-loop"] = inner
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump_all([spec, platforms]), encoding="utf-8")
    written = str(Package(path, "name", "version", "", {}).without_cache())
    assert "enableCache" not in written
    assert written.count("'cachingOptions': {}") == 1 + len(spec["root"]["dag"]["tasks"])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    recipe = load_recipe("recipes/tiny-sweep.yaml", ["resources.accelerator_count=1"])
    folder = tmp_path_factory.mktemp("sweep")
    return recipe, make_package(recipe, GKE, folder).definitions


def test_a_sweeps_variants_are_a_parameter(sweep: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, definitions = sweep
    one = recipe.variants[0].sections
    given = [f"sweep_variants=[{json.dumps(one)}]", "sweep_metric=lm_loss"]
    found = run_parameters.read_parameters(given, definitions, recipe, GKE)
    assert found.sent == {"sweep_variants": [one], "sweep_metric": "lm_loss"}
    (of_this_run,) = found.recipes
    assert of_this_run.sweep is None
    assert of_this_run.student == recipe.variants[0].recipe.student


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"training": {"lr": 1}}], "'one': .*\n.*training.train_iters: required"),
        ([{"more": 1}], "item 0: must be a mapping of name, student, distillation, training"),
        ([{}, {}], "two have this name"),
        (
            [{}, {"name": "two"}],
            "variants: 'two' and 'one' are the same training; leave one of",
        ),
    ],
)
def test_variants_are_checked_as_recipes(
    sweep: tuple[Recipe, dict[str, Any]], changes: list[dict[str, Any]], said: str
) -> None:
    recipe, definitions = sweep
    one = recipe.variants[0].sections | {"name": "one"}
    variants = [one | change for change in changes]
    with pytest.raises(UserError, match=said):
        read_parameters([f"sweep_variants={json.dumps(variants)}"], definitions, recipe)


def test_variants_that_differ_in_what_changes_no_result_are_one_training(
    sweep: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, definitions = sweep
    one = recipe.variants[0].sections | {"name": "one"}
    two = {**one, "name": "two", "training": {**one["training"], "async_save": True}}
    with pytest.raises(UserError, match=r"because no result depends on training\.async_save"):
        read_parameters([f"sweep_variants={json.dumps([one, two])}"], definitions, recipe)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sweep_variants=[]", "is empty"),
        ("sweep_metric=loss", "must be one of kl, lm_loss"),
        ("training.lr=1", "--set training.lr=1"),
        ("distillation.temperature=3", r"varies distillation\.temperature; .* --set 'sweep\.vary="),
        ("student={num_layers: 2}", r"varies student\.num_layers; .* -p 'sweep_variants="),
        ("distillation={loss: none}", "change it with --set distillation={loss: none}"),
        ("where_training_accelerator_count=8", "global_batch_size=8 is not a multiple"),
    ],
)
def test_other_mistakes_in_a_sweep(
    sweep: tuple[Recipe, dict[str, Any]], given: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_parameters([given], sweep[1], sweep[0])


def test_a_single_field_is_sent_alone_and_takes_effect(
    recipe: Recipe, definitions: dict[str, Any]
) -> None:
    given = ["distillation_temperature=2", "student_num_layers=1", "training_lr=3e-4"]
    found = run_parameters.read_parameters(given, definitions, recipe, GKE)
    assert found.sent == {
        "distillation_temperature": "2",
        "student_num_layers": "1",
        "training_lr": "3e-4",
    }
    (of_this_run,) = found.recipes
    assert of_this_run.distillation.temperature == 2.0
    assert of_this_run.student.num_layers == 1
    assert of_this_run.training.lr == 3e-4


@pytest.mark.parametrize(
    "given",
    [
        ["distillation_temperature=2", "distillation.temperature=3"],
        ["distillation_temperature=2", "distillation.temperature=1"],  # the default, but given
        ["distillation_temperature=2", "distillation={temperature: 3}"],
        ["student_num_layers=1", "student.keep_layers=[0]"],
    ],
)
def test_what_is_given_twice_is_refused(
    recipe: Recipe, definitions: dict[str, Any], given: list[str]
) -> None:
    alone, part = (item.partition("=")[0] for item in given)
    section = part.partition(".")[0]
    said = rf"parameter {alone}=.: {section}\.\w+=.* is given as well"
    for order in (given, given[::-1]):
        with pytest.raises(UserError, match=said):
            read_parameters(order, definitions, recipe)
