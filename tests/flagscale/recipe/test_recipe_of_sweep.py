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
    recipe = swept({"student.keep_layers": [[0, 1], [0, 3]], "training.seed": [1, 2]})
    assert recipe.variants[3].name == "keep_layers=0,3 seed=2"
    nested = {"student.architecture.num_experts": [2, 4]}
    recipe = swept(nested, student={"init": "scratch"}, export={"format": "megatron"})
    assert recipe.variants[1].name == "num_experts=4"
    architecture = recipe.variants[1].recipe.student.architecture
    assert architecture is not None
    assert architecture.num_experts == 4
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
            {"training.micro_batch_size": [1, 2], "training.global_batch_size": [2]},
            "'micro_batch_size=2' and 'micro_batch_size=1' are the same training, because no "
            "result depends on training.micro_batch_size, but for rounding; leave one of them out",
        ),
        (
            {"training.parallelism.tensor_model_parallel_size": [1, 2]},
            "no result depends on training.parallelism, but for rounding",
        ),
        (
            {"student.init": ["depth", "same"]},
            "the variant 'init=same': student: init=same keeps every layer",
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


def test_when_the_best_checkpoint_is_kept_the_save_interval_decides_on_it() -> None:
    every = {"training.save_interval": [10, 20], "training.eval_interval": [10]}
    recipe = swept({**every, "training.keep_weights": ["best"]})
    assert [variant.name for variant in recipe.variants] == ["save_interval=10", "save_interval=20"]
    with pytest.raises(UserError, match=r"no result depends on training\.save_interval"):
        swept({**every, "training.keep_weights": ["last"]})


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("distillation.temperature=3", "distillation.temperature"),
        ("distillation={temperature: 3, loss: logits}", "distillation.temperature"),
        ("student.num_layers=2", "student.num_layers"),
    ],
)
def test_an_override_that_the_sweep_would_replace_is_refused(override: str, field: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(ROOT / "recipes" / "tiny-sweep.yaml", [override])
    said = f"override {override!r}: the sweep varies {field}, and its values replace this one"
    assert said in str(caught.value)


def test_an_override_inside_of_what_the_sweep_varies_is_refused() -> None:
    parts = "sweep.vary={student.architecture: [{num_experts: 2}, {num_experts: 4}]}"
    scratch = ["student={init: scratch}", "export.format=megatron", parts]
    path = ROOT / "recipes" / "tiny-sweep.yaml"
    assert len(load_recipe(path, scratch).variants) == 2
    with pytest.raises(UserError, match=r"the sweep varies student\.architecture,"):
        load_recipe(path, [*scratch, "student.architecture.num_experts=8"])


def test_other_overrides_of_a_sweeps_sections_hold() -> None:
    given = ["distillation={loss: logits}", "training.lr=0.5", "sweep.metric=lm_loss"]
    recipe = load_recipe(ROOT / "recipes" / "tiny-sweep.yaml", given)
    assert {variant.recipe.training.lr for variant in recipe.variants} == {0.5}
    assert sorted({v.recipe.distillation.temperature for v in recipe.variants}) == [1.0, 2.0]
