"""A run's parameters, against the definitions of a pipeline that was really compiled."""

import json
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from pipelines.cluster import run_parameters
from pipelines.cluster.package import Package, make_package
from pipelines.cluster.parameter_values import check_checkpoints
from pipelines.platform import Platform, load_platform
from tests.pipelines.cluster.kfp_api import check_inputs

GKE = load_platform("gke-h100")
HERE = load_platform("cpu-only")
BUCKET = Platform.model_validate({"shared": {"url": "s3://bucket/distillation"}})


def read_parameters(
    given: list[str], definitions: dict[str, Any], recipe: Recipe, platform: Platform = GKE
) -> dict[str, Any]:
    return run_parameters.read_parameters(given, definitions, recipe, platform)


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
        ("nothing_like_it=2", "known: .*volume_claim"),
        ("training_accelerator_count=many", "must be a whole number, 0 or more"),
        ("training_accelerator_count=-1", "must be a whole number, 0 or more"),
        ("training_accelerator_count=8", "global_batch_size=8 is not a multiple"),
        ("training_accelerator_count=[1]", "must be a text, not a list"),
        ("models_node_selector=[a]", "must be a mapping, e.g. {key: value}, not a list"),
        ("models_node_selector={pool: 1}", "label pool must have a text, not 1"),
        ("models_tolerations={key: a}", "must be a list, e.g. .*, not a mapping"),
        ("models_tolerations=[{kye: a}]", "item 0: .*\n.*did you mean 'key'?"),
        ("models_node_selector={pool: a b}", "models_node_selector: 'a b': String should match"),
        ("models_tolerations=[{key: a, tolerationSeconds: 5}]", "only for effect=NoExecute"),
        ("models_image=", "models_image: is empty"),
        ("models_image=a b", "models_image: 'a b'"),
        ("checkpoints=", "checkpoints: is empty"),
        ("checkpoints=mine", "checkpoints=mine: must be a folder below /mnt/flagscale, or a URL"),
        ("models_node_selector={pool: a, pool: b}", "pool is given twice"),
        ("models_node_selector={pool: a b}", "e.g. h100$"),
        ("checkpoints=s3://key:planted@bucket", r"checkpoints=s3://\*\*\*@bucket: holds cred"),
        ("models_image=https://me:planted@registry/a", "holds credentials"),
        ("volume_claim=my.claim", "volume_claim: 'my.claim'"),
        ("mlflow_secret=My_Secret", "mlflow_secret: 'My_Secret'"),
        ("training=", "must be a mapping, .*, not nothing"),
        ("training=5", "must be a mapping, .*, not a number"),
        ("distillation.temprature=2", "did you mean 'temperature'?"),
        ("distillation={temperature: -1}", "distillation.temperature=-1"),
        ("training={lr: 1e-3}", "training.train_iters: required"),
        ("training.parallelism.tensor_model_parallel_size=3", "recipe with this run's"),
        ("training.lr.deep=3", "lr is a value, not a section"),
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
        (["experiment=123"], {"experiment": "123"}),
        (["experiment='a: b'"], {"experiment": "a: b"}),
        (["experiment="], {"experiment": ""}),
        (["checkpoints=s3://bucket/a=b"], {"checkpoints": "s3://bucket/a=b"}),
        (["training_accelerator_count=2"], {"training_accelerator_count": "2"}),
        (["models_tolerations=[]"], {"models_tolerations": []}),
        (
            ["training_node_selector={a.b/c: d}", "experiment=x", "experiment=y"],
            {"training_node_selector": {"a.b/c": "d"}, "experiment": "y"},
        ),
    ],
)
def test_values_are_those_of_the_pipelines_types(
    recipe: Recipe, package: Package, given: list[str], sent: dict[str, Any]
) -> None:
    values = read_parameters(given, package.definitions, recipe)
    assert values == sent
    check_inputs(package.specification, values)  # as the backend does


ANY_FOLDER = "must be a folder of the pods, from / on"
ON_VOLUME = "must be a folder below /mnt/flagscale, or a URL of an object store; any other folder"
ON_NODES = "must be a folder below /mnt/flagscale, which all 2 nodes see"


@pytest.mark.parametrize(
    ("platform", "nodes", "place", "said"),
    [
        (GKE, 1, "foo://x", "a URL must start with s3://, gs:// or az://, and name a bucket"),
        (GKE, 1, "s3://", "a URL must start with"),
        (GKE, 1, "/tmp/x", ON_VOLUME),
        (GKE, 1, "/mnt/flagscale/../other", ON_VOLUME),
        (GKE, 1, "/mnt/flagscale-2/x", ON_VOLUME),
        (GKE, 2, "s3://b/x", ON_NODES),
        (GKE, 2, "/tmp/x", ON_NODES),
        (HERE, 1, "foo://x", "a URL must start with"),
        (HERE, 1, "x", ANY_FOLDER),
        (BUCKET, 1, "/tmp/x", "must be a URL of an object store; a folder is lost with its pod"),
    ],
)
def test_checkpoints_that_pods_would_lose_or_not_find(
    platform: Platform, nodes: int, place: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_checkpoints(place, platform, nodes)
    assert str(caught.value).startswith(f"parameter checkpoints={place}: {said}")


@pytest.mark.parametrize(
    ("platform", "nodes", "place"),
    [
        (GKE, 1, "/mnt/flagscale/mine"),
        (GKE, 1, "gs://bucket/mine"),
        (GKE, 2, "/mnt/flagscale/a/../b"),
        (HERE, 1, "/tmp/x"),  # where the default lies too
        (HERE, 1, "az://container/mine"),
        (BUCKET, 1, "s3://other/mine"),
    ],
)
def test_checkpoints_that_outlive_their_pod(platform: Platform, nodes: int, place: str) -> None:
    check_checkpoints(place, platform, nodes)


def test_checkpoints_of_several_nodes_are_checked_before_the_run(
    recipe: Recipe, definitions: dict[str, Any]
) -> None:
    nodes = recipe.resources.model_copy(update={"nodes": 2})
    several = recipe.model_copy(update={"resources": nodes})
    with pytest.raises(UserError, match="which all 2 nodes see"):
        read_parameters(["checkpoints=s3://b/x"], definitions, several)


def test_accelerators_where_there_were_none_need_another_image(
    recipe: Recipe, tmp_path: Path
) -> None:
    definitions = make_package(recipe, HERE, tmp_path).definitions
    with pytest.raises(UserError) as caught:
        read_parameters(["training_accelerator_count=1"], definitions, recipe, HERE)
    image = definitions["training_image"]["defaultValue"]
    assert "training_accelerator_count=1: these pods have none" in str(caught.value)
    assert f"{image} is for pods without; give -p training_image=... too" in str(caught.value)
    given = ["models_accelerator_count=1", "training_image=gpu:1"]
    with pytest.raises(UserError, match=r"models_image=.* is for pods without"):
        read_parameters(given, definitions, recipe, HERE)
    given = ["training_accelerator_count=1", "training_image=gpu:1", "models_accelerator_count=0"]
    assert read_parameters(given, definitions, recipe, HERE)["training_image"] == "gpu:1"


def test_parts_of_a_section_add_up(recipe: Recipe, definitions: dict[str, Any]) -> None:
    given = ["training.lr=3e-4", "training.train_iters=40", "distillation.temperature=2"]
    values = read_parameters(given, definitions, recipe)
    default = recipe.training.model_dump(mode="json", exclude_none=True)
    assert values["training"] == default | {"lr": 3e-4, "train_iters": 40}
    assert values["distillation"]["temperature"] == 2.0
    assert sorted(values) == ["distillation", "training"]


def test_another_teacher_brings_its_tokenizer(recipe: Recipe, definitions: dict[str, Any]) -> None:
    values = read_parameters(["teacher.source=org/other"], definitions, recipe)
    assert sorted(values) == ["data", "teacher"]
    assert (values["teacher"]["source"], values["data"]["tokenizer"]) == ("org/other", "org/other")
    own = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": "own"})})
    assert sorted(read_parameters(["teacher.source=org/other"], definitions, own)) == ["teacher"]


def test_without_cache_nothing_nested_is_taken_from_it(package: Package, tmp_path: Path) -> None:
    import yaml

    spec, platforms = yaml.safe_load_all(package.path.read_text(encoding="utf-8"))
    inner = {"dag": {"tasks": {"inner": {"cachingOptions": {"enableCache": True}}}}}
    spec["components"]["comp-loop"] = inner
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump_all([spec, platforms]), encoding="utf-8")
    written = str(Package(path, "name", "version", "").without_cache())
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
    values = read_parameters(
        [f"variants=[{json.dumps(one)}]", "metric=lm_loss"], definitions, recipe
    )
    assert values == {"variants": [one], "metric": "lm_loss"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([{"training": {"lr": 1}}], "'one': .*\n.*training.train_iters: required"),
        ([{"more": 1}], "item 0: must be a mapping of name, student, distillation, training"),
        ([{}, {}], "two variants have this name"),
        ([{}, {"name": "two"}], "variants: 'two' and 'one' are the same training; leave one of"),
    ],
)
def test_variants_are_checked_as_recipes(
    sweep: tuple[Recipe, dict[str, Any]], changes: list[dict[str, Any]], said: str
) -> None:
    recipe, definitions = sweep
    one = recipe.variants[0].sections | {"name": "one"}
    variants = [one | change for change in changes]
    with pytest.raises(UserError, match=said):
        read_parameters([f"variants={json.dumps(variants)}"], definitions, recipe)


def test_variants_that_differ_in_what_changes_no_result_are_one_training(
    sweep: tuple[Recipe, dict[str, Any]],
) -> None:
    recipe, definitions = sweep
    one = recipe.variants[0].sections | {"name": "one"}
    two = {**one, "name": "two", "training": {**one["training"], "async_save": True}}
    with pytest.raises(UserError, match=r"because no result depends on training\.async_save"):
        read_parameters([f"variants={json.dumps([one, two])}"], definitions, recipe)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("variants=[]", "is empty"),
        ("metric=loss", "must be one of kl, lm_loss"),
        ("training.lr=1", "--set training.lr=1"),
        ("distillation.temperature=3", r"varies distillation\.temperature; .* --set 'sweep\.vary="),
        ("student={num_layers: 2}", r"varies student\.num_layers; .* -p 'variants="),
        ("distillation={loss: none}", "change it with --set distillation={loss: none}"),
        ("training_accelerator_count=8", "global_batch_size=8 is not a multiple"),
    ],
)
def test_other_mistakes_in_a_sweep(
    sweep: tuple[Recipe, dict[str, Any]], given: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        read_parameters([given], sweep[1], sweep[0])
