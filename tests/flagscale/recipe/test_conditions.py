"""The language of a gate's conditions, and what a recipe may ask in it."""

from __future__ import annotations

import re

import pytest

from flagscale.errors import UserError
from flagscale.evaluation.fidelity import TEACHER
from flagscale.evaluation.figures import AFTER, BEFORE, DETAILS, SHOWN
from flagscale.recipe import PromoteRecipe, Recipe, parse_section
from flagscale.recipe import promote as section
from flagscale.recipe.conditions import parse_condition
from tests.flagscale.minimal_recipe import MINIMAL

VALUES = {
    "distilled/kl": 0.3,
    "distilled/lm_loss": 2.5,
    "teacher/lm_loss": 2.25,
    "distilled/arc_easy": 0.41,
    "teacher/arc_easy": 0.43,
    "distilled/gsm8k:exact_match,strict-match": 0.2,
}
SAYS = [
    "distilled/kl <= 0.5",
    "distilled/kl<=0.5",
    "  distilled/arc_easy >= 0.97 * teacher/arc_easy  ",
    "0.97*teacher/arc_easy < distilled/arc_easy",
    "distilled/lm_loss <= teacher/lm_loss + 2e-1",
    "distilled/lm_loss - teacher/lm_loss > .1 - 0.5",
    "- 2 * distilled/kl + 1 >= 3. * distilled/lm_loss - distilled/kl",
    "distilled/gsm8k:exact_match,strict-match >= 0.5 * teacher/arc_easy",
    "distilled/kl + distilled/kl <= 1",
]


@pytest.mark.parametrize("text", SAYS)
def test_a_condition_means_what_python_makes_of_it(text: str) -> None:
    """Its sides computed by Python, with each figure's value in its place."""
    written = text
    for name, value in VALUES.items():
        written = written.replace(name, repr(value))
    left, comparison, right = re.split(r"([<>]=?)", written)
    difference = eval(left) - eval(right)
    found = parse_condition(text)
    margin = found.constant + sum(f * VALUES[name] for name, f in found.factors.items())
    assert margin == pytest.approx(difference if ">" in comparison else -difference, abs=1e-12)
    assert found.strict == ("=" not in comparison)
    assert found.confidence is None
    assert found.text == text


@pytest.mark.parametrize(
    ("end", "confidence"), [(" at 95%", 0.95), (" at 99.9 %", 0.999), (" at 50%", 0.5)]
)
def test_the_interval_is_the_conditions_own(end: str, confidence: float) -> None:
    assert parse_condition(SAYS[0] + end).confidence == pytest.approx(confidence, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("distilled/kl", "it ends where a comparison"),
        ("distilled/kl == 3", "'== 3' is no part of a condition"),
        ("distilled/kl = 3", "'= 3' is no part"),
        ("distilled/kl <= ", "it ends where a figure like distilled/kl, or a number"),
        ("distilled/kl <= 3 distilled/kl", "'distilled/kl' stands where the end"),
        ("distilled/kl <= 2 * 3", "'3' stands where a figure like distilled/kl"),
        ("0.1 <= distilled/kl <= 0.2", "'<=' stands where the end, or 'at 95%'"),
        ("kl <= 1", "'kl' stands where a figure like distilled/kl"),
        ("1 >= 0", "says nothing about any figure"),
        ("distilled/kl >= distilled/kl", "says nothing about any figure"),
        ("0 * distilled/kl >= -1", "says nothing about any figure"),
        ("distilled/kl <= 1 at 95", "it ends where %"),
        ("distilled/kl <= 1 at all", "'all' stands where a number of percent"),
        ("distilled/kl <= 1 at 100%", "at 100%: must be more than 0% and less than 100%"),
        ("distilled/kl <= 1 at 0%", "at 0%: must be more"),
        ("distilled/kl <= 1 in 95%", "'in' stands where the end"),
        ("distilled/kl <= 1e400", "1e400: must be no more than"),
        ("distilled/kl <= max(1, 2)", "'(1, 2)' is no part"),
    ],
)
def test_what_is_no_condition_is_told_where(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_condition(text)


def asking(*conditions: str, **changes: object) -> Recipe:
    promote = {"promote": {"conditions": conditions, **changes.pop("promote", {})}}  # type: ignore[dict-item]
    return parse_section(Recipe, {**MINIMAL, **promote, **changes}, where="recipe")


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        (
            "student/kl <= 1",
            "student is the one before distillation; for what is shipped say distilled/kl",
        ),
        ("champion/kl <= 1", "no model 'champion'; say distilled/kl"),
        ("distilled/blue >= 1", "distilled/blue: will not be measured"),
        ("distilled/kl <= 1 at 99.9%", "bootstrap_samples=1000 are too few for intervals of 99.9%"),
        ("distilled/kl <= 1 at 99.9%", "set it to 10,000 or more"),
    ],
)
def test_what_no_run_could_show_is_refused_with_the_recipe(condition: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as error:
        asking("distilled/kl <= 3", condition)
    assert repr(condition) in str(error.value)


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ("heldout_cloze", None),
        ("heldout_cloze:perplexity", None),
        ("heldout_cloze:f1", "no metric 'f1' of heldout_cloze; it has acc, perplexity"),
        ("mmlu", None),
        ("mmlu_anatomy:acc", None),  # of the group
        ("mine", None),
        ("arc_easy", "tasks are heldout_cloze, mmlu, mine"),
        ("heldout_cloze_2", "will not be measured"),
    ],
)
def test_tasks_that_are_asked_are_figures(figure: str, said: str | None) -> None:
    tasks = {"names": ["heldout_cloze", "mmlu"], "own": ["task: mine\ndataset_path: json\n"]}
    condition = f"distilled/{figure} >= 0.9 * teacher/{figure}"
    if said is None:
        assert asking(condition, tasks=tasks).promote is not None
    else:
        with pytest.raises(UserError, match=re.escape(said)):
            asking(condition, tasks=tasks)


def test_the_usual_interval_must_be_one_that_can_be_told() -> None:
    few = {"bootstrap_samples": 150}
    with pytest.raises(UserError, match="set it to 200 or more"):
        asking("distilled/kl <= 3", evaluation=few)
    asking("distilled/kl <= 3 at 90%", evaluation=few)


@pytest.mark.parametrize(
    ("alias", "said"),
    [
        ("latest", "reserved by MLflow"),
        ("V12", "reserved by MLflow"),
        ("candidate", "alias of whatever is exported"),
        ("a b", "should match pattern"),
        ("", "should match pattern"),
    ],
)
def test_an_alias_that_would_be_refused_at_the_end(alias: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        asking("distilled/kl <= 3", promote={"alias": alias})


def test_a_gate_without_conditions_would_promote_everything() -> None:
    with pytest.raises(UserError, match="at least 1 item"):
        asking()


def test_the_section_comes_back_as_it_was() -> None:
    recipe = asking(*SAYS[:2])
    assert recipe.promote == PromoteRecipe(conditions=tuple(SAYS[:2]))
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert Recipe.model_validate(MINIMAL).promote is None


def test_names_are_the_evaluations() -> None:
    assert (section.TEACHER, section.STUDENT, section.DISTILLED) == (TEACHER, BEFORE, AFTER)
    assert {*section.FIGURES} == {*SHOWN, *DETAILS}
