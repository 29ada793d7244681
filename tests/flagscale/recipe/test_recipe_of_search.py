"""Section `search`: candidates, rungs, and what is refused when a recipe is read."""

from typing import Any

import pytest

from flagscale.errors import UserError
from flagscale.recipe import Recipe, parse_section

BASE: dict[str, Any] = {
    "name": "r",
    "teacher": {"source": "t"},
    "student": {"num_layers": 2},
    "data": {"seq_length": 64},
    "training": {
        "train_iters": 40,
        "lr": 1e-3,
        "micro_batch_size": 2,
        "global_batch_size": 8,
    },
}
SEARCH: dict[str, Any] = {
    "candidates": [
        {"vary": {"student.layer_importance": ["even", "kl"]}},
        {"name": "by hand", "vary": {"student.keep_layers": [[0, 1], [0, 3]]}},
        {"name": "wide", "vary": {"student.num_layers": [3]}},
    ],
    "rungs": [{"steps": 4}, {"steps": 10}, {"steps": 20}],
    "samples": 16,
}


def read(**changes: Any) -> Recipe:
    sections = {k: v for k, v in changes.items() if k in Recipe.model_fields}
    search = SEARCH | {k: v for k, v in changes.items() if k not in sections}
    whole = {name: {**BASE.get(name, {}), **value} for name, value in sections.items()}
    return parse_section(Recipe, {**BASE, **whole, "search": search}, where="recipe")


def test_candidates_are_whole_recipes_with_names_of_their_own() -> None:
    found = read().variants
    assert [one.name for one in found] == [
        "layer_importance=even",
        "layer_importance=kl",
        "by hand keep_layers=0,1",
        "by hand keep_layers=0,3",
        "wide",
    ]
    assert [one.recipe.student.num_layers for one in found] == [2, 2, 2, 2, 3]
    assert found[3].recipe.student.keep_layers == (0, 3)
    assert all(one.recipe.search is None for one in found)


def test_names_that_would_be_equal_are_numbered() -> None:
    one = {"name": "same", "vary": {"student.num_layers": [3]}}
    other = {"name": "same", "vary": {"student.num_layers": [4]}}
    assert [c.name for c in read(candidates=[one, other]).variants] == ["same", "same #2"]


def test_rungs_say_how_many_candidates_they_train_and_for_how_long() -> None:
    search = read().search
    assert search is not None
    assert search.slots_of(5) == (5, 3, 2)
    assert search.slots_of(2) == (2, 1, 1)
    assert search.steps_of(5, 40) == 5 * 4 + 3 * 6 + 2 * 10 + 20
    third = read(
        rungs=[{"steps": 4, "keep": 1 / 3}, {"steps": 5, "keep": 0.1}, {"steps": 6}]
    ).search
    assert third is not None
    assert third.slots_of(9) == (9, 3, 1)  # 9 / 3 is 3, however it is rounded


def test_rungs_in_tokens_end_after_the_steps_that_hold_them() -> None:
    """A step has 8 x 64 tokens; what the recipe then says of itself is steps, and is the same."""
    rungs = [{"tokens": 4 * 512, "keep": 0.4}, {"tokens": 4 * 512 + 1}, {"tokens": 1e4}]
    found = read(rungs=rungs)
    assert found.search is not None
    assert [(rung.end, rung.keep) for rung in found.search.rungs] == [(4, 0.4), (5, 0.5), (20, 0.5)]
    assert found == read(rungs=[{"steps": 4, "keep": 0.4}, {"steps": 5}, {"steps": 20}])
    again = found.model_dump(mode="json")
    assert [rung["tokens"] for rung in again["search"]["rungs"]] == [None] * 3
    assert parse_section(Recipe, again, where="recipe") == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"candidates": []}, "candidates: make 0; a search needs at least 2"),
        ({"rungs": []}, r"rungs=\[\]: needs at least one"),
        ({"rungs": [{"steps": 9}, {"steps": 9}]}, r"steps=\[9, 9\] must rise from rung to rung"),
        ({"rungs": [{"tokens": 600}, {"tokens": 900}]}, r"steps=\[2, 2\] must rise"),
        ({"rungs": [{"tokens": 9e3}, {"tokens": 9}]}, r"tokens=\[9000.0, 9.0\] must rise"),
        ({"rungs": [{"steps": 9}, {"tokens": 9e3}]}, r"steps=\[9, None\]: all end after steps, or"),
        ({"rungs": [{"steps": 9, "tokens": 9}]}, "steps=9 and tokens=9.0: a rung has one of the"),
        ({"rungs": [{"keep": 0.4}]}, "steps=None and tokens=None: a rung has one of the two"),
        ({"rungs": [{"tokens": 20480}]}, "ends after steps=40, but training.train_iters=40"),
        ({"rungs": [{"steps": 9, "keep": 0.3}]}, "the last has keep=0.3, which has no effect"),
        ({"rungs": [{"steps": 40}]}, "ends after steps=40, but training.train_iters=40"),
        ({"samples": 10}, "samples=10 is not a multiple of the 4 micro-batches"),
        (
            {"budget_tokens": 39935},
            r"budget_tokens=39935, but rungs of \[5, 3, 2\].* 39,936 tokens",
        ),
        (
            {"distillation": {"loss": "none"}},
            "metric=distillation_loss with distillation.loss=none",
        ),
        (
            {"candidates": [{"vary": {"training.lr": [1e-3, 2e-3]}}]},
            r"vary.training.lr: only fields of student may vary",
        ),
        ({"candidates": [{"vary": {"student.num_layer": [1, 2]}}]}, "did you mean 'num_layers'"),
        ({"candidates": [{"vary": {"student.num_layers": [2, 2]}}]}, "are the same training"),
        (
            {"candidates": [{"vary": {"student.keep_layers": [[0, 1], [1, 0]]}}]},
            r"search.candidates: 'keep_layers=1,0'.*must rise",
        ),
        (
            {"sweep": {"vary": {"distillation.temperature": [1, 2]}}},
            "sweep and search are both given",
        ),
    ],
)
def test_what_could_not_be_searched_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_a_budget_that_is_met_is_taken() -> None:
    assert read(budget_tokens=39936).search is not None
    assert read(metric="lm_loss", distillation={"loss": "none"}).search is not None
