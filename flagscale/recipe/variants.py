"""The trainings of a sweep, each a whole recipe, validated as one when the sweep's recipe is read.

So no variant fails after hours for what could be seen at once.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from pydantic import ValidationError

from flagscale.recipe.decisive import decisive
from flagscale.recipe.explaining import explain
from flagscale.recipe.section import Section, SectionT
from flagscale.recipe.sweep import VARIED, SweepRecipe, changed, describe


@dataclass(frozen=True)
class Variant(Generic[SectionT]):
    """One training of a sweep.

    Attributes:
        name: the fields with several values, and this one's: `temperature=2.0 num_layers=3`.
        changes: `section.field` -> value, as validated.
        recipe: the whole recipe of this variant alone.
    """

    name: str
    changes: dict[str, Any]
    recipe: SectionT

    @property
    def sections(self) -> dict[str, Any]:
        """What a pipeline's loop is given: the name and the sections that may vary."""
        names = {*VARIED}
        return {
            "name": self.name,
            **self.recipe.model_dump(mode="json", include=names, exclude_none=True),
        }


def variants(recipe: SectionT, sweep: SweepRecipe) -> list[Variant[SectionT]]:
    """A sweep's variants, in the order of `vary`, the last field fastest.

    Args:
        recipe: the whole recipe; each variant is of its class.
        sweep: its section.

    Raises:
        ValueError: a combination is no valid recipe, or the same training as another.
    """
    base = recipe.model_dump(mode="json", exclude={"sweep"})
    found = [
        _variant(type(recipe), base, sweep, dict(zip(sweep.vary, values, strict=True)))
        for values in itertools.product(*sweep.vary.values())
    ]
    check_distinct("sweep.vary", ((variant.name, variant.recipe) for variant in found))
    return found


def check_distinct(where: str, variants: Iterable[tuple[str, Section]]) -> None:
    """Refuse two variants that are one training: they would share checkpoints, job and MLflow run.

    Args:
        where: opens the error message.
        variants: name and whole recipe of each.

    Raises:
        ValueError: which two, and why.
    """
    known: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, recipe in variants:
        sections = recipe.model_dump(mode="json", include={*VARIED})
        content = json.dumps(decisive(sections), sort_keys=True)
        other, its = known.setdefault(content, (name, sections))
        if its is sections:
            continue
        fields = " or ".join(
            f"{section}.{key}"
            for section, values in sections.items()
            for key in values
            if values[key] != its[section][key]
        )
        why = f", because no result depends on {fields}, but for rounding" if fields else ""
        raise ValueError(
            f"{where}: {name!r} and {other!r} are the same training{why}; leave one of them out"
        )


def _variant(
    kind: type[SectionT], base: Mapping[str, Any], sweep: SweepRecipe, changes: dict[str, Any]
) -> Variant[SectionT]:
    values = dict(base)
    for path, value in changes.items():
        section, _, field = path.partition(".")
        values[section] = changed(values[section], field, value)
    try:
        whole = kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(line.strip() for line in explain(kind, error))
        raise ValueError(f"sweep.vary: the variant {describe(changes)!r}: {problems}") from None
    dumped = whole.model_dump(mode="json")
    validated = {path: _at(dumped, path) for path in changes}
    telling = {path: value for path, value in validated.items() if len(sweep.vary[path]) > 1}
    return Variant(describe(telling), validated, whole)


def _at(values: Any, path: str) -> Any:  # noqa: ANN401 - any JSON value
    for name in path.split("."):
        values = values[name]
    return values
