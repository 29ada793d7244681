"""Whatever the schema of a recipe accepts is refused before the first step, or can be run.

Recipes are the tiny one with a few fields changed to what is at their types' borders, or nasty.
What is accepted goes through all that a run does before it trains: reading back, the parameters of
a pipeline, the first step's check, shapes, Megatron-Core's configurations, the optimiser's, the
schedule, MLflow. `test_extreme_values.py` runs the steps themselves for some.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_experiment_name, _validate_model_name
from pydantic import TypeAdapter, ValidationError

from flagscale.errors import UserError
from flagscale.megatron.arguments import training_arguments
from flagscale.megatron.layout import check_layouts
from flagscale.megatron.performance import resolved
from flagscale.megatron.shape import ModelShape
from flagscale.megatron.transformer_config import transformer_config
from flagscale.models.student_shape import student_shape
from flagscale.recipe import Recipe, parse_section, strict_yaml
from flagscale.recipe.results import ExperimentName, ModelName
from flagscale.run_values import MET, check_run
from flagscale.run_values.literal import carried, literal
from flagscale.tracking import recipe_yaml
from flagscale.tracking.names import flatten, metric_name, parameter
from flagscale.train.setup import _optimizer_config, _scheduler
from pipelines import form
from tests.flagscale.recipe.nasty import TEXTS, Change, changed, changes_of

TEACHER = ModelShape(
    model_type="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=512,
    padded_vocab_size=512,
    max_position_embeddings=256,
    norm_epsilon=1e-5,
    rotary_base=1e4,
)
BASE = yaml.safe_load(Path("recipes/tiny.yaml").read_text(encoding="utf-8"))


@given(changes_of(Recipe))
@settings(max_examples=400)
def test_a_recipe_is_refused_by_name_or_goes_as_far_as_the_first_step(
    changes: list[Change],
) -> None:
    values = changed(BASE, changes)
    try:
        recipe = parse_section(Recipe, values, where="recipe")
    except UserError as error:
        str(error).encode()  # can be printed and stored
        return
    reads_back(recipe)
    travels(recipe)
    try:
        student = fits(recipe)
    except UserError:
        return  # as the checks before a run would say
    trains(recipe, student)


def reads_back(recipe: Recipe) -> None:
    assert strict_yaml.load(recipe_yaml(recipe)) == recipe.model_dump(mode="json")
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


def travels(recipe: Recipe) -> None:
    """To the first step and, as it gives the sections, to the others."""
    parameters = form.parameters(recipe, None, "1")
    made = form.made(recipe, None, [p.name for p in parameters])
    given = {p.name: p.default for p in parameters}
    if recipe.sweep is not None:
        given["sweep_variants"] = [variant.sections for variant in recipe.variants]
        return
    try:
        form.check_size(made, given)
    except UserError:
        return
    arrived = literal(json.loads(json.dumps(carried(given))))
    assert arrived == given
    checked = check_run(made, arrived)
    checked.pop(MET, None)  # follows from the others; no section of the recipe
    assert checked == {name: given[name] for name in checked}


def fits(recipe: Recipe) -> ModelShape:
    own = recipe.student.pretrained is not None  # a model of its own, which nobody has here
    student = TEACHER if own else student_shape(TEACHER, recipe.student)
    check_layouts(recipe, TEACHER, student)
    try:
        training = resolved(recipe.training, student, distilled=recipe.distillation.loss != "none")
        transformer_config(training_arguments(student, recipe.data.seq_length, training))
    except (ValueError, AssertionError) as error:  # as `pipelines.local.preflight` refuses it
        raise UserError(str(error)) from error
    return student


def trains(recipe: Recipe, student: ModelShape) -> None:
    """The schedule's rates, and one step of a lone parameter, are numbers."""
    training = recipe.training
    args = training_arguments(student, recipe.data.seq_length, training)
    config = _optimizer_config(args, training)
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW(
        [{"params": [weight], "wd_mult": 1.0, "lr_mult": 1.0, "is_decoupled_lr": False}],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    schedule = _scheduler(adam, training)  # type: ignore[arg-type]
    weight.grad = torch.tensor([1e-3, 0.0])
    adam.step()
    assert torch.isfinite(weight).all()
    for step in {1, training.train_iters // 2, training.train_iters - 1}:
        schedule.num_steps = step * training.global_batch_size
        rate = schedule.get_lr(adam.param_groups[0])
        assert 0 <= rate <= training.lr * (1 + 1e-9)
    torch.Generator().manual_seed(training.seed + 2**20)
    for name, text in flatten(recipe.model_dump(mode="json")).items():
        assert 0 < len(metric_name(name)) <= 250
        assert len(parameter(text)) <= 500


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


def is_taken(kind: Any, name: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(name)
    except ValidationError:
        return False
    return True


NAMES = st.sampled_from(TEXTS) | st.text() | st.lists(st.sampled_from("a./:.. -")).map("".join)


@given(NAMES)
def test_a_name_that_mlflow_refuses_is_refused(name: str) -> None:
    for kind, check in (
        (ModelName, _validate_model_name),
        (ExperimentName, _validate_experiment_name),
    ):
        try:
            check(name)
        except MlflowException:
            assert not is_taken(kind, name)


@given(NAMES)
@settings(max_examples=20)
def test_a_name_that_is_accepted_can_be_registered(client: mlflow.MlflowClient, name: str) -> None:
    if is_taken(ModelName, name):
        with suppress(MlflowException):  # it is there
            client.create_registered_model(name)
        version = client.create_model_version(name, "runs:/1/model", await_creation_for=0)
        assert client.get_model_version(name, version.version).name == name
    if is_taken(ExperimentName, name) and client.get_experiment_by_name(name) is None:
        client.create_experiment(name)
        assert client.get_experiment_by_name(name).name == name
