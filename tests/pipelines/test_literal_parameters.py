"""A run's texts reach its steps as they were written: here, and in what a cluster is given."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe
from flagscale.run_values.literal import carried, literal
from pipelines import form
from pipelines.cluster.package import Package, make_package
from pipelines.cluster.run_parameters import read_parameters
from pipelines.distillation import build_pipeline
from pipelines.local.step_cache import kfp_local
from pipelines.parameters import make_pipeline
from pipelines.placement import Placement
from pipelines.platform import load_platform
from pipelines.wiring import check

TEXTS = (
    "quotes ' \" `id` and back\\slashes \\n \\\\ \\u0024",
    "$(HOME) $HOME ${HOME} $$ $$$(HOME) $(KFP_POD_NAME)",
    "{{workflow.name}} {{=1+1}} {{inputs.parameters.x}} {{{{",
    "{{$.inputs.parameters['x']}} {{$}} {{$.outputs.output_file}} {{channel:task=;name=x;type=;}}",
    "/kfp-workspace/x {{$.workspace_path}}",
    "--lr=1 -x",
    "%s %(x)s {0} %",
    "lines\nand\r\ntabs\t",
    "émoji 🙂 \u2028 中文 \u200b",
    " blanks ",
    *("yes", "y", "N", "1e3", "7e2", "0o17", "0x1F", "1_000", ".5", "2026-1-5", "null", "~", "="),
    *("# no comment", "- item", "? a", "a: b", "@x", "*a", "&a", "!t", "<<", "[", "{", "|", ">"),
    *("true", "None", "NaN", "123", '{"Concat": []}', '{"IfPresent": {}}'),
    "long " * 1000,
)
EXPERIMENT = "-$(HOME) {{x}} $$ 'y'"
SOURCE = "./y $(HOME)/{{x}} $$'\"/no: #such.jsonl"
REPLACED = ("$$", "$(", "{{", "/kfp-workspace")


def in_yaml(value: object) -> str:
    return json.dumps(value)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(
        "recipes/tiny.yaml",
        [
            f"evaluation.prompts={in_yaml(TEXTS)}",
            f"data.source={in_yaml(SOURCE)}",
            f"tracking.experiment={in_yaml(EXPERIMENT)}",
            "data.text_field='y'",
            "data.revision='7e2'",
        ],
    )


@dsl.component(base_image="python:3.11", install_kfp_package=False)
def keep(
    data_recipe: dict,
    evaluation_recipe: dict,
    checkpoints: str,
    experiment: str,
    found: dsl.Output[dsl.Artifact],
) -> None:
    from flagscale.execution.step_process import step_process

    with step_process("keep", experiment) as step:
        import json
        import os
        from pathlib import Path

        from flagscale.recipe import DataRecipe, EvaluationRecipe

        data = step.section(DataRecipe, data_recipe)
        evaluation = step.section(EvaluationRecipe, evaluation_recipe)
        seen = {
            "texts": evaluation.prompts,
            "data": [data.source, data.text_field, data.revision],
            "checkpoints": step.literal(checkpoints),
            "experiment": os.environ["MLFLOW_EXPERIMENT_NAME"],
        }
        Path(found.path).write_text(json.dumps(seen))


class Found:
    """Keeps what `keep` wrote."""

    seen: dict[str, Any]

    def started(self, name: str) -> None:
        pass

    def reused(self, name: str, outputs: Mapping[str, Path]) -> None:
        raise AssertionError(name)

    def finished(self, name: str, outputs: Mapping[str, Path], gave_values: bool) -> None:
        if name == "keep":
            self.seen = json.loads(outputs["found"].read_text())


@pytest.mark.parametrize("given", [{}, {"checkpoints": "/tmp/$(HOME) $$ {{x}}/-- \\u0024'"}])
def test_on_this_machine(recipe: Recipe, given: dict[str, str], tmp_path: Path) -> None:
    parameters = form.parameters(recipe, None, "1")
    made = form.made(recipe, None, [parameter.name for parameter in parameters])

    def wire(values: Mapping[str, Any]) -> None:
        checked = check(values, Placement(None, recipe, values), made)
        keep(
            data_recipe=checked["data"],
            evaluation_recipe=checked["evaluation"],
            checkpoints=checked["training_checkpoints"],
            experiment=checked["tracking_experiment"],
        )

    pipeline = make_pipeline("literal", "Literal", "Keeps texts.", parameters, wire)
    found = Found()
    places = dict.fromkeys(["training_checkpoints"] * len(given), given.get("checkpoints"))
    with kfp_local(tmp_path / "artifacts", tmp_path / "cache", found, reuse=True):
        pipeline(**carried(places))
    assert found.seen["texts"] == list(TEXTS)
    assert found.seen["data"] == [SOURCE, "y", "7e2"]
    assert found.seen["experiment"] == EXPERIMENT
    default = {p.name: p.default for p in parameters}["training_checkpoints"]
    assert found.seen["checkpoints"] == places.get("training_checkpoints", default)


def texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


@pytest.fixture(scope="module")
def package(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return make_package(recipe, load_platform("gke-h100"), tmp_path_factory.mktemp("package"))


def test_what_a_cluster_is_given_holds_nothing_that_it_would_replace(package: Package) -> None:
    tasks = package.specification["root"]["dag"]["tasks"]
    constants = [
        given["runtimeValue"]["constant"]
        for task in tasks.values()
        for given in task["inputs"].get("parameters", {}).values()
        if "runtimeValue" in given
    ]
    defaults = [one["defaultValue"] for one in package.definitions.values()]
    found = list(texts_in([*constants, *defaults]))
    own = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--where_\w+'\]\}\}")  # KFP's
    replaced = [text for text in found if any(sign in text for sign in REPLACED)]
    assert [text for text in replaced if not own.fullmatch(text)] == []
    assert {*TEXTS, EXPERIMENT, SOURCE, "y", "7e2"} <= {literal(text) for text in found}


def test_no_text_is_a_number_or_a_truth_value_to_the_cluster(package: Package) -> None:
    """PyYAML reads `y` and `7e2` as texts, Go's YAML does not."""
    lines = package.path.read_text(encoding="utf-8").splitlines()
    values = {name: line for line in lines for name in ("text_field", "revision") if name in line}
    assert values["text_field"].strip() == "text_field: 'y'"
    assert values["revision"].strip() == "revision: '7e2'"


def test_submit_takes_texts_as_they_are(recipe: Recipe, package: Package) -> None:
    given = [
        f"evaluation.prompts={in_yaml(TEXTS[:4])}",
        f"tracking_experiment={in_yaml(TEXTS[1])}",
        r"training_checkpoints=/mnt/flagscale/$(HOME)/\u0024",
    ]
    found = read_parameters(given, package.definitions, recipe, load_platform("gke-h100"))
    assert found.sent["evaluation"]["prompts"] == list(TEXTS[:4])
    assert found.sent["tracking_experiment"] == TEXTS[1]
    assert found.sent["training_checkpoints"] == r"/mnt/flagscale/$(HOME)/\u0024"
    assert found.sent.keys() == {"evaluation", "tracking_experiment", "training_checkpoints"}


def test_texts_that_no_step_can_be_given_are_refused_by_name(
    recipe: Recipe, package: Package
) -> None:
    long = load_recipe("recipes/tiny.yaml", [f"evaluation.prompts={in_yaml(['x' * 50_000])}"])
    with pytest.raises(UserError, match=r"^evaluation: takes 50,"):
        build_pipeline(long)
    with pytest.raises(UserError, match=r"^evaluation: takes 95,"):
        read_parameters(
            [f"evaluation.prompts={in_yaml(['x' * 95_000])}"],
            package.definitions,
            recipe,
            load_platform("gke-h100"),
        )
