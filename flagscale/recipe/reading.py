"""Reads a recipe from YAML; explains what is wrong with it by field, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flagscale.errors import UserError
from flagscale.recipe import strict_yaml
from flagscale.recipe.explaining import explain
from flagscale.recipe.recipe import Recipe
from flagscale.recipe.section import SectionT
from flagscale.recipe.sweep import set_in_vain
from flagscale.secrets import hide_in_urls


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: a YAML file.
        overrides: `section.field=value` each; the value is read as YAML.

    Raises:
        UserError: the file is missing or is no YAML, a field is unknown or has a wrong value, or
            an override would have no effect.
    """
    path = Path(path)
    try:
        values = strict_yaml.load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path}: must be a mapping of sections, not {values!r}")
    changes = [_apply(values, override) for override in overrides]
    recipe = parse_section(Recipe, values, where=f"recipe {path}")
    for override, change in zip(overrides, changes, strict=True):
        field = set_in_vain(recipe.sweep, *change)
        if field is not None:
            raise UserError(
                f"override {override!r}: the sweep varies {field}, and its values replace this "
                "one; change sweep.vary (--set 'sweep.vary={...}')"
            )
    return recipe


def parse_section(kind: type[SectionT], values: Any, where: str) -> SectionT:  # noqa: ANN401
    """Validate one section (or a whole recipe); `where` opens the error message.

    Raises:
        UserError: every wrong field, with its value and the nearest valid name.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = explain(kind, error)
        text = "\n".join([f"{where}: {len(lines)} error(s)", *lines])
        raise UserError(hide_in_urls(text)) from None


def _apply(values: dict[str, Any], override: str) -> tuple[str, Any]:
    """Set one field; return its path and value."""
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
        node[last] = strict_yaml.load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {text!r} is not valid YAML: {error}") from error
    return key.strip(), node[last]
