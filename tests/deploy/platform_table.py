"""The table of docs/cluster.md that lists a platform file's fields: made from the fields."""

import json
import types
import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flagscale.run_values.toleration import Toleration
from pipelines.platform import Platform

HEAD = ("| field | default | what it is |", "|---|---|---|")


def table() -> list[str]:
    """The table's lines."""
    return [*HEAD, *_rows(Platform, "")]


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        nested = _section(field.annotation)
        if prefix == "steps.":
            # The kinds have the same fields; they are listed once, below them all.
            rows.append(_row(path, field, _kind_defaults(section, name)))
        elif nested is None:
            rows.append(_row(path, field, _default(field)))
        elif _is_list(field.annotation):
            rows.append(_row(f"{path}[]", field, "none", _first_line(nested)))
            if nested is not Toleration:  # its fields are Kubernetes' own
                rows += _rows(nested, f"{path}[].")
        else:
            rows += _rows(nested, f"{path}.")
    if prefix == "steps.":
        kind = _section(next(iter(section.model_fields.values())).annotation)
        assert kind is not None
        rows += _rows(kind, "steps.KIND.")
    return rows


def _row(path: str, field: FieldInfo, default: str, meaning: str = "") -> str:
    text = field.description or meaning
    assert text, f"{path} has no description"
    return f"| `{path}` | {default} | {text} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value in ((), {}, ""):
        return "none"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _kind_defaults(section: type[BaseModel], name: str) -> str:
    default = section.model_fields[name].get_default(call_default_factory=True)
    changed = {k: getattr(default, k) for k in default.model_fields_set}
    return ", ".join(f"`{k}: {v}`" for k, v in changed.items()) or "as below"


def _is_list(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, alone, optionally, or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (tuple, types.UnionType, typing.Union):
        found = [_section(a) for a in typing.get_args(annotation) if a is not Ellipsis]
        return next((section for section in found if section is not None), None)
    return None


def _first_line(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]
