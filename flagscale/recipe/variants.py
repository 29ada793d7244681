"""The trainings of a sweep or a search, each a whole recipe, validated when theirs is read.

So no variant fails after hours for what could be seen at once.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

from pydantic import ValidationError

from flagscale.recipe.decisive import decisive
from flagscale.recipe.explaining import explain
from flagscale.recipe.search import SearchRecipe
from flagscale.recipe.section import Section, SectionT
from flagscale.recipe.sweep import VARIED, SweepRecipe, changed, describe


@dataclass(frozen=True)
class Variant(Generic[SectionT]):
    """One training of a sweep, or one candidate of a search.

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
    telling = [path for path, values in sweep.vary.items() if len(values) > 1]
    found = [
        _variant(recipe, "sweep.vary: the variant", changes, telling)
        for changes in _combinations(sweep.vary)
    ]
    check_distinct("sweep.vary", ((variant.name, variant.recipe) for variant in found))
    return found


def candidates(recipe: SectionT, search: SearchRecipe) -> list[Variant[SectionT]]:
    """A search's candidates, in their order, each under a name of its own.

    Args:
        recipe: the whole recipe; each candidate is of its class.
        search: its section.

    Raises:
        ValueError: one is no valid recipe, or the same student as another.
    """
    found: list[Variant[SectionT]] = []
    names = Counter[str]()
    for given in search.candidates:
        telling = [path for path, values in given.vary.items() if len(values) > 1]
        if given.name is None:
            telling = telling or [*given.vary]
        for changes in _combinations(given.vary):
            one = _variant(recipe, "search.candidates:", changes, telling)
            name = " ".join(part for part in (given.name, one.name) if part)
            names[name] += 1
            if names[name] > 1:
                name = f"{name} #{names[name]}"
            found.append(replace(one, name=name))
    check_distinct("search.candidates", ((one.name, one.recipe) for one in found))
    return found


def _combinations(vary: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*vary.values()):
        yield dict(zip(vary, values, strict=True))


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
    recipe: SectionT, where: str, changes: dict[str, Any], telling: Sequence[str]
) -> Variant[SectionT]:
    kind = type(recipe)
    values = recipe.model_dump(mode="json", exclude={"sweep", "search"})
    for path, value in changes.items():
        section, _, field = path.partition(".")
        values[section] = changed(values[section], field, value)
    try:
        whole = kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(line.strip() for line in explain(kind, error))
        raise ValueError(f"{where} {describe(changes)!r}: {problems}") from None
    dumped = whole.model_dump(mode="json")
    validated = {path: _at(dumped, path) for path in changes}
    return Variant(describe({path: validated[path] for path in telling}), validated, whole)


def _at(values: Any, path: str) -> Any:  # noqa: ANN401 - any JSON value
    for name in path.split("."):
        values = values[name]
    return values
