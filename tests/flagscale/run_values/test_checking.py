"""A run's values together. `made` and `values` are those of pipelines that are really made."""

import copy
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import load_recipe
from flagscale.run_values import FIELDS, SECTIONS, Made, check_run
from pipelines.distillation import build_pipeline
from pipelines.form import made, parameters
from pipelines.platform import load_platform

Run = tuple[Made, dict[str, Any]]


def run_of(recipe_name: str, platform_name: str | None, *changes: str) -> Run:
    recipe = load_recipe(f"recipes/{recipe_name}.yaml", changes)
    platform = load_platform(platform_name) if platform_name else None
    pipeline = build_pipeline(recipe, platform, "the code's version")
    names = list(pipeline.pipeline_spec.root.input_definitions.parameters)
    defaults = {p.name: p.default for p in parameters(recipe, platform, "the code's version")}
    if recipe.sweep is not None:
        defaults["sweep_variants"] = [variant.sections for variant in recipe.variants]
        defaults["sweep_metric"] = recipe.sweep.metric
    return made(recipe, platform, names), defaults


@pytest.fixture(scope="module", params=[None, "gke-h100", "cpu-only", "on-prem-a100"])
def run(request: pytest.FixtureRequest) -> Run:
    return run_of("tiny", request.param)


@pytest.fixture(scope="module")
def sweep() -> Run:
    return run_of("tiny-sweep", "gke-h100", "resources.accelerator_count=1")


def test_the_defaults_are_right_and_stay_what_they_are(run: Run) -> None:
    made, defaults = run
    checked = check_run(made, defaults)
    assert checked == {name: defaults[name] for name in SECTIONS if name != "promote"}
    assert check_run(made, {**defaults, **checked}) == checked


def test_a_number_that_kfp_hands_over_as_a_float_gives_the_same_section(run: Run) -> None:
    """Or the cache would not know it again."""
    made, defaults = run
    training = {**defaults["training"], "train_iters": float(defaults["training"]["train_iters"])}
    checked = check_run(made, {**defaults, "training": training})
    assert repr(checked) == repr(check_run(made, defaults))


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("data_max_documents", "7", 7),
        ("data_max_documents", "null", None),
        ("distillation_loss", "none", "none"),
        ("distillation_temperature", " 2.5 ", 2.5),
        ("student_num_layers", "1", 1),
        ("training_global_batch_size", "16", 16),
        ("training_lr", "3e-4", 3e-4),
        ("training_train_iters", "50", 50),
    ],
)
def test_a_single_field_is_set_in_its_section_and_nothing_else(
    run: Run, name: str, text: str, value: object
) -> None:
    made, defaults = run
    before, after = check_run(made, defaults), check_run(made, {**defaults, name: text})
    (field,) = (field for field in FIELDS if field.name == name)
    assert after[field.section].get(field.field) == value
    before[field.section][field.field] = value
    after[field.section][field.field] = value
    assert after == before


def test_layers_are_evenly_spread_in_place_of_those_that_the_section_keeps() -> None:
    made, defaults = run_of("tiny", None, "student.num_layers=null", "student.keep_layers=[0,2]")
    assert check_run(made, defaults)["student"]["keep_layers"] == [0, 2]
    checked = check_run(made, {**defaults, "student_num_layers": "1"})
    assert checked["student"]["num_layers"] == 1
    assert "keep_layers" not in checked["student"]


def test_a_field_that_its_section_gives_too_is_refused_with_both(run: Run) -> None:
    made, defaults = run
    values = copy.deepcopy(defaults)
    values["distillation"]["temperature"] = 3.0
    values["distillation_temperature"] = "2"
    with pytest.raises(UserError) as error:
        check_run(made, values)
    assert str(error.value) == (
        "parameter distillation_temperature=2: distillation.temperature=3.0 is given as well; "
        "leave one of the two as it was"
    )
    values["student"] = {"init": "depth", "keep_layers": [0]}
    del values["distillation_temperature"]
    with pytest.raises(UserError, match=r"student_num_layers=1: student\.keep_layers=\[0\] is giv"):
        check_run(made, {**values, "student_num_layers": "1"})


def test_another_teacher_brings_its_tokenizer_unless_the_text_has_its_own(run: Run) -> None:
    made, defaults = run
    other = {**defaults["teacher"], "source": "org/other", "revision": "v2"}
    checked = check_run(made, {**defaults, "teacher": other})
    found = (checked["data"]["tokenizer"], checked["data"]["tokenizer_revision"])
    assert found == ("org/other", "v2")
    own = {**defaults["data"], "tokenizer": "org/own"}
    checked = check_run(made, {**defaults, "teacher": other, "data": own})
    assert checked["data"]["tokenizer"] == "org/own"


def test_a_sweeps_variants_are_given_as_they_are_checked(sweep: Run) -> None:
    made, defaults = sweep
    checked = check_run(made, defaults)
    assert checked["sweep_variants"] == defaults["sweep_variants"]
    assert not {"student", "distillation", "training"} & set(checked)
    assert check_run(made, {**defaults, "data_max_documents": "7"})["data"]["max_documents"] == 7


def test_what_a_sweeps_variants_share_is_told_once_and_without_their_names(sweep: Run) -> None:
    made, defaults = sweep
    with pytest.raises(UserError) as error:
        check_run(made, {**defaults, "data_max_documents": "-1"})
    assert "sweep_variants" not in str(error.value)
    assert "data.max_documents=-1" in str(error.value)
