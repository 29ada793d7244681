"""Section `sweep`: one recipe, many trainings, which share data and teacher.

Each combination of the varied values is a variant: a whole recipe of its own, validated as one
when the recipe is read, so that no variant fails after hours for what could be seen at once.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.explaining import explain
from flagscale.recipe.models import StudentRecipe
from flagscale.recipe.section import PositiveInt, Section
from flagscale.recipe.training import TrainingRecipe, decisive

if TYPE_CHECKING:
    from flagscale.recipe.recipe import Recipe

MOST_VARIANTS = 64
VARIED: dict[str, type[Section]] = {
    "student": StudentRecipe,
    "distillation": DistillationRecipe,
    "training": TrainingRecipe,
}
_LONGEST_VALUE = 32  # characters of a value in a variant's name

Metric = Literal["kl", "lm_loss", "top1_agreement", "accuracy"]


class SweepRecipe(Section):
    """Which fields vary, and what decides between the variants."""

    vary: dict[str, tuple[Any, ...]] = Field(
        description="section.field: [values]; every combination is a variant. Sections: student, "
        "distillation, training. A field that stands only here may be left out of its section"
    )
    parallelism: PositiveInt = Field(
        2, description="Variants at a time, on a cluster; this machine takes one after another"
    )
    metric: Metric = Field("kl", description="Figure of the evaluation that orders the leaderboard")

    @model_validator(mode="after")
    def _check(self) -> SweepRecipe:
        for path, values in self.vary.items():
            _check_field(path)
            if not values:
                raise ValueError(f"vary.{path}=[]: needs at least one value")
        total = math.prod(len(values) for values in self.vary.values())
        if total < 2 or not self.vary:
            raise ValueError(
                f"vary={self.vary}: makes {total if self.vary else 0} variant(s), a sweep needs at "
                "least 2; give a field two values, or leave the section out"
            )
        if total > MOST_VARIANTS:
            raise ValueError(
                f"vary: {' x '.join(str(len(v)) for v in self.vary.values())} = {total} variants, "
                f"at most {MOST_VARIANTS} make one sweep; vary fewer fields or values"
            )
        return self


@dataclass(frozen=True)
class Variant:
    """One training of a sweep.

    Attributes:
        name: the fields with several values, and this one's: `temperature=2.0 num_layers=3`.
        changes: `section.field` -> value, as validated.
        recipe: the whole recipe of this variant alone.
    """

    name: str
    changes: dict[str, Any]
    recipe: Recipe

    @property
    def sections(self) -> dict[str, Any]:
        """What a pipeline's loop is given: the name and the sections that may vary."""
        names = {*VARIED}
        return {
            "name": self.name,
            **self.recipe.model_dump(mode="json", include=names, exclude_none=True),
        }


def variants(recipe: Recipe) -> list[Variant]:
    """The sweep's variants, in the order of `vary`, the last field fastest; none without a sweep.

    Raises:
        ValueError: a combination is no valid recipe, or the same training as another.
    """
    if recipe.sweep is None:
        return []
    paths = list(recipe.sweep.vary)
    base = recipe.model_dump(mode="json", exclude={"sweep"})
    found = [
        _variant(recipe, base, dict(zip(paths, values, strict=True)))
        for values in itertools.product(*recipe.sweep.vary.values())
    ]
    check_distinct("sweep.vary", ((variant.name, variant.recipe) for variant in found))
    return found


def check_distinct(where: str, variants: Iterable[tuple[str, Recipe]]) -> None:
    """Refuse two variants that are one training: they would share checkpoints, job and MLflow run.

    Args:
        where: opens the error message.
        variants: name and recipe of each.

    Raises:
        ValueError: which two, and why.
    """
    known: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, recipe in variants:
        sections = recipe.model_dump(mode="json", include={*VARIED})
        training = sections["training"]
        content = json.dumps({**sections, "training": decisive(training)}, sort_keys=True)
        other, its = known.setdefault(content, (name, training))
        if its is training:
            continue
        fields = " or ".join(f"training.{key}" for key in training if training[key] != its[key])
        why = f", because no result depends on {fields}, but for rounding" if fields else ""
        raise ValueError(
            f"{where}: {name!r} and {other!r} are the same training{why}; leave one of them out"
        )


def set_in_vain(recipe: Recipe, path: str, value: Any) -> str | None:  # noqa: ANN401 - of YAML
    """The varied field that setting `path` would set, to no effect; None if there is none."""
    fields = _fields(path, value)
    for varied in recipe.sweep.vary if recipe.sweep else ():
        if any(field == varied or field.startswith(f"{varied}.") for field in fields):
            return varied
    return None


def with_first_values(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's raw values, in which a field that only the sweep gives has its first value.

    So a recipe with `sweep.vary.student.num_layers` need not say `student.num_layers` as well.
    Whatever is not of the right shape is left for the validation to refuse.
    """
    sweep = values.get("sweep")
    vary = sweep.get("vary") if isinstance(sweep, dict) else None
    for path, choices in (vary if isinstance(vary, dict) else {}).items():
        section, _, field = str(path).partition(".")
        given = values.setdefault(section, {}) if section in VARIED else None
        if isinstance(given, dict) and isinstance(choices, list | tuple) and choices:
            values[section] = _changed(given, field, choices[0], keep=True)
    return values


def describe(changes: Mapping[str, Any]) -> str:
    """`temperature=2.0 num_layers=3`: each field by its last name, where that is clear."""
    lasts = [path.rpartition(".")[2] for path in changes]
    return " ".join(
        f"{last if lasts.count(last) == 1 else path}={_text(value)}"
        for (path, value), last in zip(changes.items(), lasts, strict=True)
    )


def _variant(recipe: Recipe, base: Mapping[str, Any], changes: dict[str, Any]) -> Variant:
    values = dict(base)
    for path, value in changes.items():
        section, _, field = path.partition(".")
        values[section] = _changed(values[section], field, value)
    kind = type(recipe)
    try:
        whole = kind.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(line.strip() for line in explain(kind, error))
        raise ValueError(f"sweep.vary: the variant {describe(changes)!r}: {problems}") from None
    dumped = whole.model_dump(mode="json")
    validated = {path: _at(dumped, path) for path in changes}
    assert recipe.sweep is not None
    telling = {p: value for p, value in validated.items() if len(recipe.sweep.vary[p]) > 1}
    return Variant(describe(telling), validated, whole)


def _changed(
    values: Mapping[str, Any],
    path: str,
    value: Any,  # noqa: ANN401 - any JSON value
    keep: bool = False,
) -> dict[str, Any]:
    """A copy with the (nested) field set; `keep` leaves one that is there."""
    name, _, rest = path.partition(".")
    old = values.get(name)
    if rest:
        inner = old if isinstance(old, Mapping) else {}
        return {**values, name: _changed(inner, rest, value, keep)}
    return {**values, name: old if keep and name in values else value}


def _fields(path: str, value: Any) -> list[str]:  # noqa: ANN401 - any YAML value
    """The path, and those of all fields in a section that is its value."""
    inner = value.items() if isinstance(value, Mapping) else ()
    return [path, *(field for name, part in inner for field in _fields(f"{path}.{name}", part))]


def _at(values: Any, path: str) -> Any:  # noqa: ANN401 - any JSON value
    for name in path.split("."):
        values = values[name]
    return values


def _text(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value):
        text = ",".join(str(item) for item in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _check_field(path: str) -> None:
    """Refuse a field that there is not, or that all variants share."""
    section, _, rest = path.partition(".")
    if section not in VARIED:
        raise ValueError(
            f"vary.{path}: only fields of {', '.join(VARIED)} may vary, because all variants share "
            "data, teacher and evaluation, without which their figures could not be compared"
        )
    kind: type[BaseModel] | None = VARIED[section]
    for name in rest.split("."):
        known = list(kind.model_fields) if kind else []
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"vary.{path}: {section} has no field {rest!r}; {hint}")
        assert kind is not None
        kind = _model(kind.model_fields[name].annotation)


def _model(annotation: Any) -> type[BaseModel] | None:  # noqa: ANN401 - a type expression
    """The section in `X` or `X | None`, None where there is no section in it."""
    if get_origin(annotation) is not None:
        annotation = next((a for a in get_args(annotation) if a is not type(None)), None)
    found = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if found else None
