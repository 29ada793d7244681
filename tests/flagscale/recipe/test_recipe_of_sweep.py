from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import Recipe, load_recipe, parse_section
from flagscale.recipe.sweep import describe

ROOT = Path(__file__).parents[3]
BASE: dict[str, Any] = {
    "name": "r",
    "teacher": {"source": "t"},
    "student": {"num_layers": 2},
    "training": {"train_iters": 1, "lr": 1e-3},
}


def swept(vary: dict[str, Any], **sections: Any) -> Recipe:
    return parse_section(Recipe, {**BASE, **sections, "sweep": {"vary": vary}}, where="r")


def test_every_combination_is_a_whole_recipe() -> None:
    recipe = swept({"student.num_layers": [2, 3], "distillation.temperature": [1, "2e0"]})
    assert [variant.name for variant in recipe.variants] == [
        "num_layers=2 temperature=1.0",
        "num_layers=2 temperature=2.0",
        "num_layers=3 temperature=1.0",
        "num_layers=3 temperature=2.0",
    ]
    last = recipe.variants[-1]
    assert last.changes == {"student.num_layers": 3, "distillation.temperature": 2.0}
    assert last.recipe.sweep is None
    assert (last.recipe.student.num_layers, last.recipe.distillation.temperature) == (3, 2.0)
    assert last.recipe.training == recipe.training
    assert last.recipe.data == recipe.data
    assert set(last.sections) == {"name", "student", "distillation", "training"}


def test_no_sweep_has_no_variants() -> None:
    assert Recipe.model_validate(BASE).variants == []


def test_a_field_that_only_the_sweep_gives_needs_no_value_of_its_own() -> None:
    recipe = swept({"student.num_layers": [3, 4], "training.lr": [1e-4]}, student={})
    assert recipe.student.num_layers == 3
    assert recipe.training.lr == 1e-3  # given: stays
    assert [v.recipe.training.lr for v in recipe.variants] == [1e-4, 1e-4]
    assert [v.name for v in recipe.variants] == ["num_layers=3", "num_layers=4"]
    again = Recipe.model_validate(recipe.model_dump(mode="json"))
    assert again == recipe


def test_names_of_lists_nested_fields_and_equal_last_names() -> None:
    recipe = swept(
        {
            "student.keep_layers": [[0, 1], [0, 3]],
            "training.parallelism.tensor_model_parallel_size": [1, 2],
        }
    )
    assert recipe.variants[3].name == "keep_layers=0,3 tensor_model_parallel_size=2"
    assert recipe.variants[3].recipe.training.parallelism.tensor_model_parallel_size == 2
    names = describe({"student.seed": 1, "training.seed": 2, "student.num_layers": None})
    assert names == "student.seed=1 training.seed=2 num_layers=null"
    assert len(describe({"a.b": "x" * 99})) == len("b=") + 32


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"data.seq_length": [64, 128]}, "vary.data.seq_length: only fields of student, distilla"),
        ({"teacher.source": ["a", "b"]}, "share data, teacher and evaluation"),
        ({"training.lrr": [1, 2]}, "training has no field 'lrr'; did you mean 'lr'?"),
        ({"training.lr.x": [1, 2]}, "training has no field 'lr.x'; known: none"),
        ({"student": [{}, {}]}, "student has no field ''"),
        ({"training.lr": []}, "vary.training.lr=[]: needs at least one value"),
        ({"training.lr": [1e-3]}, "makes 1 variant(s), a sweep needs at least 2"),
        ({}, "makes 0 variant(s)"),
        (
            {"training.seed": list(range(13)), "student.seed": list(range(5))},
            "13 x 5 = 65 variants, at most 64",
        ),
        (
            {"distillation.temperature": [1, 2, -3]},
            "the variant 'temperature=-3': distillation.temperature=-3: Input should be greater",
        ),
        (
            {"distillation.temperature": [1, 1.0]},
            "'temperature=1.0' and 'temperature=1.0' are the same training",
        ),
        (
            {"student.init": ["prune", "copy"]},
            "the variant 'init=copy': student: init=copy keeps every layer",
        ),
        (  # a check between sections
            {
                "training.parallelism.virtual_pipeline_model_parallel_size": [None, 2],
                "training.parallelism.pipeline_model_parallel_size": [2],
            },
            "virtual_pipeline_model_parallel_size=2 with distillation.loss=logits",
        ),
    ],
)
def test_what_is_no_sweep_is_refused_when_the_recipe_is_read(
    vary: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        swept(vary)
    assert message in str(caught.value)


def test_a_sweep_from_the_command_line() -> None:
    recipe = load_recipe(
        ROOT / "recipes" / "tiny-sweep.yaml",
        ["sweep.vary={distillation.loss: [logits, none]}", "student.num_layers=2"],
    )
    assert [variant.name for variant in recipe.variants] == ["loss=logits", "loss=none"]
    assert [v.recipe.distillation.loss for v in recipe.variants] == ["logits", "none"]
