"""Section `sweep`: which fields of a recipe vary; variants.py makes the trainings of it."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, model_validator

from flagscale.recipe.distillation import DistillationRecipe
from flagscale.recipe.section import Ranks, Section
from flagscale.recipe.student import StudentRecipe
from flagscale.recipe.training import TrainingRecipe

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
    parallelism: Ranks = Field(
        2, description="Variants at a time, on a cluster; this machine takes one after another"
    )
    metric: Metric = Field("kl", description="Figure of the evaluation that orders the leaderboard")

    @model_validator(mode="after")
    def _check(self) -> SweepRecipe:
        check_vary(self.vary, tuple(VARIED))
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


def check_vary(vary: Mapping[str, tuple[Any, ...]], sections: Sequence[str]) -> None:
    """Refuse fields that there are not, or that may not vary, and fields without a value.

    Args:
        vary: `section.field` -> values.
        sections: whose fields may vary.

    Raises:
        ValueError: which field.
    """
    for path, values in vary.items():
        _check_field(path, sections)
        if not values:
            raise ValueError(f"vary.{path}=[]: needs at least one value")


def set_in_vain(sweep: SweepRecipe | None, path: str, value: Any) -> str | None:  # noqa: ANN401
    """The varied field that setting `path` would set, to no effect; None if there is none."""
    fields = _fields(path, value)
    for varied in sweep.vary if sweep else ():
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
            values[section] = changed(given, field, choices[0], keep=True)
    return values


def describe(changes: Mapping[str, Any]) -> str:
    """`temperature=2.0 num_layers=3`: each field by its last name, where that is clear."""
    lasts = [path.rpartition(".")[2] for path in changes]
    return " ".join(
        f"{last if lasts.count(last) == 1 else path}={_text(value)}"
        for (path, value), last in zip(changes.items(), lasts, strict=True)
    )


def changed(
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
        return {**values, name: changed(inner, rest, value, keep)}
    return {**values, name: old if keep and name in values else value}


def _fields(path: str, value: Any) -> list[str]:  # noqa: ANN401 - any YAML value
    """The path, and those of all fields in a section that is its value."""
    inner = value.items() if isinstance(value, Mapping) else ()
    return [path, *(field for name, part in inner for field in _fields(f"{path}.{name}", part))]


def _text(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value):
        text = ",".join(str(item) for item in value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def _check_field(path: str, sections: Sequence[str]) -> None:
    """Refuse a field that there is not, or that all variants share."""
    section, _, rest = path.partition(".")
    if section not in sections:
        raise ValueError(
            f"vary.{path}: only fields of {', '.join(sections)} may vary, because all share "
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
