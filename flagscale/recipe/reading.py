"""Reads a recipe from YAML; explains what is wrong with it by field, value and remedy."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flagscale.errors import UserError
from flagscale.recipe.recipe import Recipe
from flagscale.recipe.section import SectionT
from flagscale.secrets import hide_in_urls


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `section.field=value` each; the value is read as YAML.

    Raises:
        UserError: the file is missing or is no YAML, a field is unknown or has a wrong value.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: must be a mapping of sections, not {values!r}")
    for override in overrides:
        _apply(values, override)
    return parse_section(Recipe, values, where=f"recipe {path}")


def parse_section(kind: type[SectionT], values: Any, where: str) -> SectionT:  # noqa: ANN401
    """Validate one section (or a whole recipe); `where` opens the error message.

    Raises:
        UserError: every wrong field, with its value and the nearest valid name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [explain(kind, item) for item in error.errors()]
        text = "\n".join([f"{where}: {len(lines)} error(s)", *lines])
        raise UserError(hide_in_urls(text)) from None


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: must read section.field=value")
    *parents, last = key.strip().split(".")
    node = values
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {text!r} is not valid YAML") from error
    if isinstance(node[last], str) and _is_float(node[last]):
        node[last] = float(node[last])  # YAML 1.1 reads 3e-4 as text


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def explain(kind: type[BaseModel], item: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    """A line about one wrong field: its value, and what would be right."""
    location = [part for part in item["loc"] if isinstance(part, str | int)]
    name = (
        ".".join(str(part) for part in location)
        or kind.__name__.removesuffix("Recipe").lower()
        or "recipe"
    )
    if item["type"] == "extra_forbidden":
        known = _fields(kind, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
        return f"  {name}={item['input']!r}: unknown field; {hint}"
    if item["type"] == "missing":
        return f"  {name}: required, and not given"
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], dict):  # a cross-field check: the message names the values
        return f"  {name}: {message}"
    return f"  {name}={item['input']!r}: {message}"


def _fields(kind: type[BaseModel], location: list[str | int]) -> list[str]:
    """Names of the fields of the section at `location`."""
    for part in (part for part in location if isinstance(part, str)):
        field = kind.model_fields.get(str(part))
        annotation = field.annotation if field else None
        while get_origin(annotation) is not None:  # X | None, list[X] | None
            annotation = next((a for a in get_args(annotation) if a is not type(None)), None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)
