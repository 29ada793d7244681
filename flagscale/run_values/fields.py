"""Single fields of the recipe as parameters of a run: what people change most.

Each is a text and stands beside its section's JSON in KFP's form; empty, it leaves the field as the
section has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from flagscale.errors import UserError
from flagscale.recipe import DistillationRecipe, strict_yaml


@dataclass(frozen=True)
class Field:
    """A parameter that sets a field of a section.

    Attributes:
        section: of the recipe.
        field: that takes the value.
        cleared: fields that say the same in another way, and then say nothing.
        choices: all values there are; none where there are many.
    """

    section: str
    field: str
    cleared: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the parameter: it stands beside its section's where names are sorted."""
        return f"{self.section}_{self.field}"


FIELDS = (
    Field("data", "max_documents"),
    Field(
        "distillation",
        "loss",
        choices=get_args(DistillationRecipe.model_fields["loss"].annotation),
    ),
    Field("distillation", "temperature"),
    Field("student", "num_layers", cleared=("keep_layers",)),
    Field("training", "global_batch_size"),
    Field("training", "lr"),
    Field("training", "train_iters"),
)


def set_fields(
    sections: dict[str, dict[str, Any]],
    defaults: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
) -> None:
    """Put the fields that a run gives into its sections.

    Args:
        sections: changed in place.
        defaults: the sections as the pipeline has them.
        values: the run's parameters by name.

    Raises:
        UserError: a value is no single one, or its section gives the field as well.
    """
    for field in FIELDS:
        text = str(values.get(field.name, "")).strip()
        if not text:
            continue
        section, default = sections[field.section], defaults[field.section]
        for name in (field.field, *field.cleared):
            if section.get(name) not in (None, default.get(name)):
                raise UserError(
                    f"parameter {field.name}={text}: {field.section}.{name}={section[name]} is "
                    "given as well; leave one of the two as it was"
                )
            section.pop(name, None)
        section[field.field] = _scalar(field.name, text)


def _scalar(name: str, text: str) -> Any:  # noqa: ANN401 - a scalar of YAML
    try:
        value = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"parameter {name}={text}: the value is not valid YAML: {error}") from None
    if isinstance(value, dict | list):
        raise UserError(f"parameter {name}={text}: must be a single value")
    return value
